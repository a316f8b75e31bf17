"""Anchored epochs, what they mint, and rewards drawn from it."""

from __future__ import annotations

from dataclasses import replace

from kaisar_p2p.wire.codec import encode
from protocols.committees import header_stake, is_supermajority, verify_header
from protocols.digests import header_hash, registry_root
from protocols.epochs import REWARDS, EpochHeader, RewardLeaf
from protocols.interpreter.calls import MAGIC, AnchorPost, RewardClaim
from protocols.interpreter.draft import Draft, Refused
from protocols.interpreter.events import Anchored, RewardClaimed
from protocols.interpreter.proofs import proven_leaf
from protocols.interpreter.state import Anchor, Registry

FIRST_PREVIOUS = bytes(32)
"""`previous` of the first header that is anchored."""


def post(draft: Draft, call: AnchorPost) -> bytes:
    """Anchor a header signed by ≥ 2/3 of its epoch's stake; what it mints fills the reward pool. Anyone may send it."""
    header = call.header
    registry = _check_header(draft, header)
    signed, total = header_stake(call.certificate, registry)
    if not is_supermajority(signed, total):
        raise Refused("signed by less than two thirds of the stake")
    if not verify_header(call.certificate, header, registry, draft.network):
        raise Refused("a signature of the certificate is wrong")
    if header.registry_root != registry_root(registry):  # last: in a large registry this costs more than a signature
        raise Refused("another registry root")
    digest = header_hash(header, draft.network)
    size = len(MAGIC) + 1 + len(encode(call))
    draft.anchors[header.epoch] = Anchor(header, digest, draft.base.number, signed, total, size)
    draft.last_anchor = header.epoch
    draft.issued_planck += header.minted_planck
    draft.reward_pool_planck += header.minted_planck
    draft.events.append(Anchored(header.epoch))
    return digest


def _check_header(draft: Draft, header: EpochHeader) -> Registry:
    """The registry that must have signed the header, if what it says fits the ledger."""
    last = draft.anchors.get(draft.last_anchor)
    if header.epoch <= draft.last_anchor:
        raise Refused("that epoch, or a later one, is anchored already")
    if header.epoch >= draft.base.epoch:
        raise Refused("that epoch is not over")
    if header.previous != (last.header_hash if last else FIRST_PREVIOUS):
        raise Refused("the header does not continue the last one")
    registry = draft.base.registries.get(header.epoch)
    if not registry:
        raise Refused("the registry of that epoch is not known")
    if header.minted_planck > _epochs_covered(draft, header) * draft.params.epoch_reward_planck:
        raise Refused("mints more than the reward of its epochs")
    return registry


def _epochs_covered(draft: Draft, header: EpochHeader) -> int:
    """A header may reach back over epochs that nobody anchored, and starts where one of them starts."""
    slots = draft.params.epoch_slots
    if header.last_slot != (header.epoch + 1) * slots - 1 or header.first_slot % slots:
        raise Refused("the slots are not those of whole epochs")
    first = header.first_slot // slots
    if not draft.last_anchor < first <= header.epoch:
        raise Refused("the slots are not those since the last anchor")
    return header.epoch - first + 1


def claim(draft: Draft, call: RewardClaim) -> bytes:
    """Pay an account what its leaf says it earned, less what it has drawn; anyone may send it.

    A pool that holds less pays what it holds; the rest can be claimed with the same leaf later.
    """
    leaf = proven_leaf(draft, call.proof, REWARDS, RewardLeaf)
    account = draft.account(leaf.account)
    amount = min(leaf.cumulative_planck - account.claimed_planck, draft.reward_pool_planck)
    if amount <= 0:
        raise Refused("nothing left to claim")
    draft.accounts[leaf.account] = replace(
        account, balance_planck=account.balance_planck + amount, claimed_planck=account.claimed_planck + amount
    )
    draft.reward_pool_planck -= amount
    draft.events.append(RewardClaimed(leaf.account, amount))
    return leaf.account
