"""Which checks are repeated: any course of slots and certificates."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from protocols.adverts import CPU_CLASS, Spec
from protocols.due import RECHECK, due_workers
from protocols.interpreter.state import ACTIVE, REGISTERED, RETIRED, State, WorkerState
from protocols.params import DEMO, MAINNET
from protocols.popw import recheck_slots
from protocols.recheck import MAX_RECHECKS, OpenChecks, can_be_recheck

PARAMS = replace(DEMO, standby_check_permille=100)
AGAIN = recheck_slots(PARAMS)
SPEC = Spec(CPU_CLASS, 1, 1, 1, 0, 0, "")
WORKERS = [sha256(b"worker %d" % index).digest() for index in range(4)]
FIRST, LAST = 8, 80


def state_at(slot: int, status: int = ACTIVE) -> State:
    registered = slot * PARAMS.slot_blocks - 1 if status == REGISTERED else 1
    workers = {key: WorkerState(b"", SPEC, 1, 0, status, registered) for key in WORKERS}
    beacons = Map({slot: sha256(b"beacon %d" % slot).digest()})
    return State(bytes(32), PARAMS, number=slot * PARAMS.slot_blocks, workers=Map(workers), beacons=beacons)


def by_rule(slot: int) -> set[bytes]:
    return {check.worker for check in due_workers(state_at(slot), slot)}


def test_on_mainnet_the_next_slot_repeats() -> None:
    assert recheck_slots(MAINNET) == 1


@given(st.sets(st.tuples(st.integers(FIRST, LAST), st.sampled_from(WORKERS))))
def test_an_open_check_is_repeated_a_few_times_and_a_certified_one_never(certified: set[tuple[int, bytes]]) -> None:
    checks = OpenChecks()
    started: dict[bytes, list[tuple[int, str]]] = {key: [] for key in WORKERS}
    for slot in range(FIRST, LAST):
        for check in checks.start(state_at(slot), slot):
            started[check.worker].append((slot, check.reason))
        for at, worker in certified:
            if at == slot:
                checks.certified(worker, slot)
    assert len(checks) <= len(WORKERS)
    for worker, times in started.items():
        assert [slot for slot, reason in times if reason != RECHECK] == [
            slot for slot in range(FIRST, LAST) if worker in by_rule(slot)
        ]
        due = {slot for slot, reason in times if reason != RECHECK}
        for slot, reason in times:
            if reason != RECHECK:
                continue
            assert can_be_recheck(due, slot, PARAMS)  # the worker expects it
            assert slot - AGAIN in {at for at, _ in times}
            assert not any(worker == who and slot - AGAIN <= at < slot for at, who in certified)
        for (slot, _), (following, _) in pairwise(times):
            silent = not any(worker == who and slot <= at < following for at, who in certified)
            assert not silent or following <= slot + AGAIN or following in due
        runs = "".join("r" if reason == RECHECK else "d" for _, reason in times)
        assert "r" * (MAX_RECHECKS + 1) not in runs


def test_repetitions_come_first_and_keep_the_number_of_samples() -> None:
    slot = next(slot for slot in range(FIRST, LAST) if 0 < len(by_rule(slot)) < len(WORKERS))
    checks = OpenChecks()
    checks.start(state_at(slot - AGAIN, REGISTERED), slot - AGAIN)
    started = checks.start(state_at(slot), slot)
    assert len(started) == len(WORKERS)
    reasons = [check.reason for check in started]
    assert reasons == sorted(reasons, key=lambda reason: reason != RECHECK)
    assert {check.samples for check in started if check.reason == RECHECK} == {PARAMS.registration_samples}


def test_a_worker_that_left_is_not_checked_again() -> None:
    checks, quiet = OpenChecks(), next(slot for slot in range(FIRST, LAST) if not by_rule(slot + AGAIN))
    checks.start(state_at(quiet, REGISTERED), quiet)
    assert checks.start(state_at(quiet + AGAIN, RETIRED), quiet + AGAIN) == ()
    assert len(checks) == 0
