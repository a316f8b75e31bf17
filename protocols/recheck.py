"""Checks that ended without a certificate: INCONCLUSIVE has no consequence, but the worker is checked again, and first.

Certificates are not ledger state, so whether a check is repeated is each seat's own view. That is enough, because
nothing happens unless T seats of the new slot's committee share it: a worker proves only for T challenges, and a seat
that is alone with its view gets no answer and certifies nothing. `protocols/README.md`, "Who is due".
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from protocols.due import RECHECK, DueCheck, due_workers, may_be_checked, was_named
from protocols.interpreter.state import State
from protocols.params import Params
from protocols.popw import recheck_slots

MAX_RECHECKS = 3
"""After one check that was due by the ledger; then the worker waits until the ledger's rule names it again."""


@dataclass(frozen=True)
class OpenCheck:
    """A worker's newest check on which no certificate is known, and how many repetitions led to it."""

    slot: int
    samples: int
    rechecks: int = 0


class OpenChecks:
    """A seat's view of which workers await a certificate: at most one check of each registered worker."""

    def __init__(self) -> None:
        self._open: dict[bytes, OpenCheck] = {}

    def __len__(self) -> int:
        return len(self._open)

    def start(self, state: State, slot: int) -> tuple[DueCheck, ...]:
        """The checks that start with `slot`, repetitions first; all of them are open from now on.

        `state` is the one after the slot's first block.
        """
        due = due_workers(state, slot)
        again = self._again(state, slot, {check.worker for check in due})
        self._open.update((check.worker, OpenCheck(slot, check.samples)) for check in due)
        return again + due

    def _again(self, state: State, slot: int, due: Container[bytes]) -> tuple[DueCheck, ...]:
        again: list[DueCheck] = []
        for key, check in sorted(self._open.items()):
            if slot < check.slot + recheck_slots(state.params):
                continue  # its votes may still be on their way
            exact = slot == check.slot + recheck_slots(state.params)
            if key in due or not exact or check.rechecks >= MAX_RECHECKS or not may_be_checked(state, slot, key):
                del self._open[key]
                continue
            self._open[key] = OpenCheck(slot, check.samples, check.rechecks + 1)
            again.append(DueCheck(key, check.samples, RECHECK))
        return tuple(again)

    def certified(self, worker: bytes, slot: int) -> None:
        """A check of `slot`, or any later one, has a certificate: older ones need no repetition."""
        known = self._open.get(worker)
        if known is not None and known.slot <= slot:
            del self._open[worker]


def may_have_been_checked(state: State, slot: int, key: bytes) -> bool:
    """Whether honest seats can have checked a worker in `slot`, judged by any later state that remembers the slot.

    Leases are not looked at, because the state does not say who was leased then. Without this rule, whoever holds a
    quorum of any slot's committee could certify any worker in it, even one whose key was made for that committee.
    """
    step = recheck_slots(state.params)
    return any(was_named(state, slot - step * again, key) for again in range(MAX_RECHECKS + 1))


def can_be_recheck(due_slots: Container[int], slot: int, params: Params) -> bool:
    """Whether `slot` may repeat a check of one of `due_slots`, those in which the ledger's rule named the worker.

    The worker asks this: it takes part whenever a repetition is possible, and T seats decide whether there is one.
    """
    return any(slot - count * recheck_slots(params) in due_slots for count in range(1, MAX_RECHECKS + 1))
