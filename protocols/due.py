"""Which workers a slot checks, and how thoroughly: a pure rule over the ledger's state, the same on every node."""

from __future__ import annotations

from dataclasses import dataclass

from kaisar_p2p.wire.crypto import domain_hash
from protocols.interpreter.state import ACTIVE, ORDER_OPEN, REGISTERED, OrderState, State, WorkerState
from protocols.params import PERMILLE

REGISTRATION, STANDBY, GRAND, RECHECK = "registration", "standby", "grand", "recheck"


@dataclass(frozen=True)
class DueCheck:
    """One check of a slot: each seat recomputes `samples` tiles; `reason` is REGISTRATION … RECHECK."""

    worker: bytes
    samples: int
    reason: str


def due_workers(state: State, slot: int) -> tuple[DueCheck, ...]:
    """The checks that start with `slot`, sorted by worker, from the state after the slot's first block.

    Empty when the slot's beacon is not in the state (not started yet, or too long ago).
    """
    checks = (due_check(state, slot, key) for key in sorted(state.workers))
    return tuple(check for check in checks if check is not None)


def due_check(state: State, slot: int, key: bytes) -> DueCheck | None:
    """The check of one worker that starts with `slot`, or None."""
    beacon, worker = state.beacons.get(slot), state.workers.get(key)
    reason = _reason(state, slot, beacon, key, worker) if beacon is not None and worker is not None else None
    if reason is None:
        return None
    return DueCheck(key, state.params.registration_samples if reason == REGISTRATION else state.params.samples, reason)


def may_be_checked(state: State, slot: int, key: bytes) -> bool:
    """Whether a worker can be checked in `slot` at all: registered before it, not retired, not leased."""
    worker = state.workers.get(key)
    if worker is None or slot not in state.beacons:
        return False
    if worker.status == REGISTERED:
        # Registered in this slot: not every node may have known it at the slot's first block.
        return worker.registered_block < slot * state.params.slot_blocks
    return worker.status == ACTIVE and not is_leased(state, slot, key)


def is_leased(state: State, slot: int, key: bytes) -> bool:
    """Whether an order may be running on the worker: then its witnesses see whether it is alive.

    One that is cancelled, or whose time is over, spares it one slot more, to clean up; not until it is settled, which
    may be never.
    """
    return any(_may_run(state, slot, state.orders[each]) for each in state.open_orders.get(key, ()))


def _may_run(state: State, slot: int, order: OrderState) -> bool:
    params = state.params
    if order.status != ORDER_OPEN:
        return slot <= params.slot_of(order.ended_block) + 1
    return state.time_ms < order.placed_ms + params.deploy_timeout_ms + 1000 * order.duration_s + 2 * params.slot_ms


def was_named(state: State, slot: int, key: bytes) -> bool:
    """Whether the rule named the worker in `slot`, by a later state: as `due_check`, but whatever was leased then."""
    beacon, worker = state.beacons.get(slot), state.workers.get(key)
    first_block = slot * state.params.slot_blocks
    if beacon is None or worker is None or worker.registered_block >= first_block:
        return False
    if worker.activated_block == 0 or worker.activated_block > first_block:
        return _is_new(state, slot, worker) or wins_standby_draw(state, beacon, key)
    return is_grand_slot(state, slot) or wins_standby_draw(state, beacon, key)


def is_grand_slot(state: State, slot: int) -> bool:
    """Whether every unleased worker is checked in this slot at once: one card under two names cannot answer twice."""
    mix = state.mixes.get(state.params.epoch_of_slot(slot), b"")
    number = int.from_bytes(domain_hash("popw/grand", state.network, mix)[:8], "little")
    return slot % state.params.epoch_slots == number % state.params.epoch_slots


def wins_standby_draw(state: State, beacon: bytes, worker: bytes) -> bool:
    """The lottery of idle workers: `standby_check_permille` of them in each slot."""
    number = int.from_bytes(domain_hash("popw/standby", state.network, beacon, worker)[:8], "little")
    return number % PERMILLE < state.params.standby_check_permille


def _reason(state: State, slot: int, beacon: bytes, key: bytes, worker: WorkerState) -> str | None:
    if not may_be_checked(state, slot, key):
        return None
    if worker.status == REGISTERED:
        return REGISTRATION if _is_new(state, slot, worker) or wins_standby_draw(state, beacon, key) else None
    if is_grand_slot(state, slot):
        return GRAND
    return STANDBY if wins_standby_draw(state, beacon, key) else None


def _is_new(state: State, slot: int, worker: WorkerState) -> bool:
    """A worker that failed for a whole epoch is tried at the standby rate, so that it cannot tire its committees."""
    return slot - state.params.slot_of(worker.registered_block) <= state.params.epoch_slots
