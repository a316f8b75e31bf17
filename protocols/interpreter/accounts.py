"""Transfers, licences and stake."""

from __future__ import annotations

from dataclasses import replace

from protocols.interpreter.calls import LicenceBuy, StakeBond, StakeUnbond, Transfer
from protocols.interpreter.draft import Draft, Refused
from protocols.interpreter.state import Unbonding
from protocols.params import PERMILLE

NOBODY = bytes(32)


def transfer(draft: Draft, signer: bytes, call: Transfer) -> bytes:
    """Move KAI; the receiving account need not exist. Points cannot be moved."""
    amount = call.amount_planck
    if amount == 0:
        raise Refused("nothing to move")
    if call.to == signer:
        raise Refused("a transfer to itself")
    account = draft.payer(signer, amount)
    draft.accounts[signer] = replace(account, balance_planck=account.balance_planck - amount)
    draft.add_balance(call.to, amount)
    return call.to


def buy_licences(draft: Draft, signer: bytes, call: LicenceBuy) -> bytes:
    """Buy licences from the treasury; `referral_permille` of the price goes to the referrer instead."""
    params = draft.params
    price = call.count * params.licence_price_planck
    if call.count == 0:
        raise Refused("no licences asked for")
    if draft.licences_sold + call.count > params.licence_supply:
        raise Refused("not so many licences are left")
    if call.referrer == signer:
        raise Refused("an account cannot refer itself")
    if call.referrer != NOBODY and call.referrer not in draft.accounts:
        raise Refused("no such referrer")
    account = draft.payer(signer, price)
    share = price * params.referral_permille // PERMILLE if call.referrer != NOBODY else 0
    draft.accounts[signer] = replace(
        account, balance_planck=account.balance_planck - price, licences=account.licences + call.count
    )
    draft.licences_sold += call.count
    draft.treasury_planck += price - share
    if share:
        draft.add_balance(call.referrer, share)
    return signer


def bond(draft: Draft, signer: bytes, call: StakeBond) -> bytes:
    """Balance becomes stake; it counts from the next epoch's registry on."""
    amount = call.amount_planck
    if amount == 0:
        raise Refused("nothing to bond")
    account = draft.payer(signer, amount)
    draft.accounts[signer] = replace(
        account, balance_planck=account.balance_planck - amount, stake_planck=account.stake_planck + amount
    )
    return signer


def unbond(draft: Draft, signer: bytes, call: StakeUnbond) -> bytes:
    """Stake stops counting, and can be withdrawn `unbonding_epochs` later. Unbondings of one epoch are one entry."""
    amount, account = call.amount_planck, draft.account(signer)
    if amount == 0:
        raise Refused("nothing to unbond")
    if account.stake_planck < amount:
        raise Refused("the stake is too small")
    entries, due = account.unbonding, draft.base.epoch + draft.params.unbonding_epochs
    if entries and entries[-1].due_epoch == due:
        entries, amount_due = entries[:-1], entries[-1].amount_planck + amount
    else:
        amount_due = amount
    draft.accounts[signer] = replace(
        account, stake_planck=account.stake_planck - amount, unbonding=(*entries, Unbonding(amount_due, due))
    )
    return signer


def withdraw(draft: Draft, signer: bytes) -> bytes:
    """Stake whose unbonding is over returns to the balance."""
    account, epoch = draft.account(signer), draft.base.epoch
    amount = sum(entry.amount_planck for entry in account.unbonding if entry.due_epoch <= epoch)
    if amount == 0:
        raise Refused("nothing can be withdrawn yet")
    rest = tuple(entry for entry in account.unbonding if entry.due_epoch > epoch)
    draft.accounts[signer] = replace(account, balance_planck=account.balance_planck + amount, unbonding=rest)
    return signer
