"""`apply`: one finalized block in, the next state and what changed out. Pure, total, and the same on every node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kaisar_p2p.errors import DecodeError
from protocols.interpreter import accounts, anchors, machines, orders
from protocols.interpreter.calls import (
    AnchorPost,
    BootstrapAnnounce,
    CallBody,
    LeaseSettle,
    LicenceBuy,
    MachineBind,
    OrderCancel,
    OrderPlace,
    RewardClaim,
    StakeBond,
    StakeUnbond,
    StakeWithdraw,
    Transfer,
    WorkerActivate,
    WorkerRegister,
    WorkerRetire,
    parse_payload,
)
from protocols.interpreter.draft import Draft, Refused
from protocols.interpreter.events import CallApplied, CallIgnored, LedgerEvent
from protocols.interpreter.rounds import open_block
from protocols.interpreter.state import State


class FinalizedCall(Protocol):
    """A signed call of a finalized block: 32-byte account, payload, 32-byte hash of the signed bytes."""

    @property
    def signer(self) -> bytes: ...

    @property
    def payload(self) -> bytes: ...

    @property
    def call_hash(self) -> bytes: ...


class FinalizedBlock(Protocol):
    """A finalized block of any ledger; hashes are 32 bytes, `time_ms` is Unix time."""

    @property
    def number(self) -> int: ...

    @property
    def hash(self) -> bytes: ...

    @property
    def parent(self) -> bytes: ...

    @property
    def time_ms(self) -> int: ...

    @property
    def calls(self) -> Sequence[FinalizedCall]: ...


def apply(state: State, block: FinalizedBlock) -> tuple[State, tuple[LedgerEvent, ...]]:
    """The state after `block`, and its events in order.

    A call that is unknown, malformed or not allowed has no effect but a `CallIgnored`; its content never raises.

    Raises:
        ValueError: the block does not continue the state.
    """
    if block.number != state.number + 1 or block.parent != state.block_hash:
        raise ValueError(f"block {block.number} does not continue block {state.number}")
    opened, events = open_block(state, block.number, block.hash, block.time_ms)
    draft = Draft(opened, events)
    for call in block.calls:
        _run(draft, call)
    return draft.finish(), tuple(draft.events)


def _run(draft: Draft, call: FinalizedCall) -> None:
    name = ""
    try:
        body = parse_payload(call.payload)
        name = type(body).__name__
        subject = _execute(draft, call.signer, call.call_hash, body)
    except (DecodeError, Refused) as error:
        draft.events.append(CallIgnored(call.call_hash, call.signer, name, error.message))
    else:
        draft.events.append(CallApplied(call.call_hash, call.signer, name, subject))


def _execute(draft: Draft, signer: bytes, call_hash: bytes, body: CallBody) -> bytes:
    """Run the rule of a call; returns its subject. `Refused` means that nothing changed."""
    match body:
        case Transfer():
            return accounts.transfer(draft, signer, body)
        case LicenceBuy():
            return accounts.buy_licences(draft, signer, body)
        case StakeBond():
            return accounts.bond(draft, signer, body)
        case StakeUnbond():
            return accounts.unbond(draft, signer, body)
        case StakeWithdraw():
            return accounts.withdraw(draft, signer)
        case MachineBind():
            return machines.bind(draft, signer, body)
        case WorkerRegister():
            return machines.register(draft, signer, body)
        case WorkerActivate():
            return machines.activate(draft, body)
        case WorkerRetire():
            return machines.retire(draft, signer, body)
        case BootstrapAnnounce():
            return machines.announce(draft, signer, body)
        case OrderPlace():
            return orders.place(draft, signer, body, call_hash)
        case OrderCancel():
            return orders.cancel(draft, signer, body)
        case LeaseSettle():
            return orders.settle(draft, body)
        case AnchorPost():
            return anchors.post(draft, body)
        case RewardClaim():
            return anchors.claim(draft, body)
