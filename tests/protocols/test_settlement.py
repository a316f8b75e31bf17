"""Settlement: from witness windows to seconds, outcome and planck."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.adverts import CPU_CLASS, Spec
from protocols.deploy import CANCELLED, COMPLETED, DOWN, EXPIRED, FAILED, GONE, OPEN, UP
from protocols.epochs import LeaseLeaf
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_CLOSED, OrderState
from protocols.orders import total_planck
from protocols.params import DEMO, KAI
from protocols.quorum import QuorumCertificate, WitnessCore
from protocols.settlement import NEVER, cost_planck, lease_leaf, lease_windows, needs_leaf, up_windows

PARAMS = replace(DEMO, slot_blocks=2, block_ms=1000, deploy_timeout_ms=10_000)  # windows of 2 s; 5 to deploy
ORDER_ID = b"o" * 32
PLACED = 10
GRACE = PARAMS.certificate_grace_slots
SPEC = Spec(CPU_CLASS, 1, 1, 1, 0, 0, "")


def order(duration_s: int = 20, cancelled_slot: int = 0) -> OrderState:
    placed = OrderState(
        b"", b"", b"", b"", b"", SPEC, b"", KAI, duration_s, 0, 0, 0, PLACED * PARAMS.slot_blocks, 0, (), 1
    )
    if not cancelled_slot:
        return placed
    return replace(placed, status=ORDER_CANCELLED, ended_block=cancelled_slot * PARAMS.slot_blocks)


def settle(
    windows,
    last_slot: int,
    the_order: OrderState | None = None,
    previous: LeaseLeaf | None = None,
    gone=(),
    down=(),
) -> LeaseLeaf:
    return lease_leaf(ORDER_ID, the_order or order(), previous, windows, last_slot, PARAMS, gone=gone, down=down)


# ── money ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 10**24), st.integers(0, 10**8))
def test_locked_covers_paid_and_differs_by_less_than_one(price: int, seconds: int) -> None:
    paid, locked = cost_planck(price, seconds), total_planck(price, seconds)
    assert paid * 3600 <= price * seconds <= locked * 3600
    assert locked - paid in (0, 1)


@given(st.integers(0, 10**24), st.lists(st.integers(0, 10**6), max_size=10))
def test_paying_in_steps_pays_the_same(price: int, steps: list[int]) -> None:
    paid, seconds = 0, 0
    for step in steps:
        seconds += step
        paid += cost_planck(price, seconds) - paid
    assert paid == cost_planck(price, sum(steps))


# ── outcomes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_that_is_not_up_yet_is_open() -> None:
    assert settle([], PLACED + 3) == LeaseLeaf(ORDER_ID, 0, NEVER, OPEN, NEVER)


def test_never_up_within_the_deploy_timeout_has_failed() -> None:
    assert settle([], PLACED + 4 + GRACE).outcome == OPEN
    assert settle([], PLACED + 5 + GRACE).outcome == FAILED


def test_each_up_window_is_paid() -> None:
    assert settle([12, 13, 14], 15) == LeaseLeaf(ORDER_ID, 6, 14, OPEN, 12)


def test_windows_before_placement_and_after_the_epoch_are_not() -> None:
    assert settle([8, 9, 12, 16], 15).seconds == 2


def test_all_seconds_witnessed_is_completed_and_no_more_than_the_duration() -> None:
    leaf = settle(range(12, 30), 29)
    assert (leaf.seconds, leaf.outcome) == (20, COMPLETED)
    assert settle(range(12, 30), 29, order(19)).seconds == 19


def test_three_missing_windows_in_a_row_are_a_failure() -> None:
    assert settle([12, 13], 15 + GRACE).outcome == OPEN
    assert settle([12, 13], 16 + GRACE) == LeaseLeaf(ORDER_ID, 4, 13, FAILED, 12)


def test_what_comes_after_a_failure_is_not_paid() -> None:
    assert settle([12, 13, 17, 18], 20) == LeaseLeaf(ORDER_ID, 4, 13, FAILED, 12)


def test_two_missing_windows_are_forgiven_but_not_paid() -> None:
    assert settle([12, 15, 16], 17) == LeaseLeaf(ORDER_ID, 6, 16, OPEN, 12)


def test_windows_whose_certificates_may_still_come_are_not_missing() -> None:
    assert settle([12], 13 + GRACE).outcome == OPEN
    late = settle([14, 13], 17, previous=settle([12, 15], 15))
    assert (late.seconds, late.outcome) == (8, OPEN)


def test_a_cancelled_lease_ends_with_its_last_window() -> None:
    cancelled = order(cancelled_slot=14)
    assert settle([12, 13, 14, 15], 15, cancelled) == LeaseLeaf(ORDER_ID, 6, 14, OPEN, 12)
    assert settle([12, 13, 14, 15], 14 + GRACE, cancelled) == LeaseLeaf(ORDER_ID, 6, 14, CANCELLED, 12)
    assert settle([], 14 + GRACE, cancelled) == LeaseLeaf(ORDER_ID, 0, NEVER, CANCELLED, NEVER)


def test_a_client_who_cancels_a_dead_lease_gets_the_failure() -> None:
    assert settle([12, 13], 20, order(cancelled_slot=17)).outcome == FAILED
    assert settle([12, 13], 20, order(cancelled_slot=15)).outcome == CANCELLED


def test_a_lease_that_ran_to_its_end_is_completed_even_if_a_few_windows_are_missing() -> None:
    served = [slot for slot in range(12, 22) if slot not in (14, 18)]
    assert settle(served, 21 + GRACE - 1).outcome == OPEN
    leaf = settle(served, 21 + GRACE)
    assert (leaf.seconds, leaf.outcome) == (16, COMPLETED)


def test_a_lease_with_many_windows_missing_has_expired() -> None:
    leaf = settle([12, 14, 16, 18, 20, 21], 21 + GRACE)
    assert (leaf.seconds, leaf.outcome) == (12, EXPIRED)


def test_a_worker_that_stops_when_time_is_over_has_not_failed() -> None:
    assert settle(range(12, 22), 60).outcome == COMPLETED


@pytest.mark.parametrize("outcome", [COMPLETED, CANCELLED, FAILED, EXPIRED])
def test_a_leaf_with_an_outcome_never_changes(outcome: int) -> None:
    final = LeaseLeaf(ORDER_ID, 6, 14, outcome, 12)
    assert settle([15, 16], 20, previous=final) is final


def test_a_settled_order_leaves_the_tree() -> None:
    closed = replace(order(), status=ORDER_CLOSED, ended_block=30)
    assert needs_leaf(closed, 15, PARAMS)
    assert not needs_leaf(closed, 16, PARAMS)
    assert needs_leaf(order(), 1_000, PARAMS)


def test_only_up_certificates_are_windows() -> None:
    cores = [WitnessCore(ORDER_ID, bytes(32), slot, status) for slot, status in ((1, UP), (2, DOWN), (1, UP), (3, UP))]
    assert up_windows(QuorumCertificate(core, 1, ()) for core in cores) == {ORDER_ID: frozenset({1, 3})}


# ── whose fault ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gone", "down", "fault"),
    [
        ([14, 15, 16], [], 1),
        ([15, 16], [], 1),  # it vanished in the middle of 14: the witnesses were divided
        ([15, 16], [14], 0),  # the program had stopped before
        ([], [14, 15, 16], 0),  # the tenant may have stopped it
        ([], [], 0),  # the witnesses were absent
        ([14, 15], [], 0),
        ([14, 16], [], 0),
        ([14, 15], [16], 0),
        ([17, 18, 19], [], 0),  # the lease had ended by then
    ],
)
def test_a_failure_is_the_workers_fault_only_if_it_was_certified_as_gone(gone, down, fault) -> None:
    leaf = settle([12, 13], 16 + GRACE, gone=gone, down=down)
    assert leaf == LeaseLeaf(ORDER_ID, 4, 13, FAILED, 12, fault)


def test_a_worker_that_was_gone_and_came_back_has_not_failed() -> None:
    assert settle([12, 15], 17, gone=[13, 14]) == LeaseLeaf(ORDER_ID, 4, 15, OPEN, 12)


def test_a_worker_that_was_gone_before_the_lease_ran_has_no_fault() -> None:
    leaf = settle([], PLACED + 5 + GRACE, gone=range(PLACED, 20))
    assert (leaf.outcome, leaf.fault) == (FAILED, 0)


def test_what_earlier_bodies_saw_of_the_missing_windows_is_remembered() -> None:
    first = settle([12, 13], 14, gone=[14])
    assert first == LeaseLeaf(ORDER_ID, 4, 13, OPEN, 12, 0, 0b1, 0)
    second = settle([], 15, previous=first, down=[15])
    assert (second.gone, second.down) == (0b1, 0b10)
    late = settle([14], 15, previous=first, gone=[15])
    assert (late.last_window, late.gone) == (14, 0b1)
    assert settle([], 18, previous=settle([], 17, previous=first, gone=[15, 16])).fault == 1
    assert settle([], 18, previous=second, gone=[16]).fault == 0


def test_a_lease_that_ended_otherwise_has_no_fault() -> None:
    assert settle(range(12, 22), 60, gone=range(22, 30)).fault == 0
    assert settle([12, 13], 20, order(cancelled_slot=15), gone=[14, 15]).fault == 0
    assert settle([12, 13], 20, order(cancelled_slot=17), gone=[14, 15, 16]).fault == 1


# ── for any windows ──────────────────────────────────────────────────────────────────────────────────────────────────

windows_of = st.sets(st.integers(0, 60))


@given(windows_of, st.integers(PLACED, 70), st.integers(1, 90), st.integers(0, 60))
def test_never_more_than_witnessed_or_the_duration(windows: set[int], last: int, duration: int, cancelled: int) -> None:
    leaf = settle(windows, last, order(duration, max(PLACED, cancelled) if cancelled else 0))
    paid = [slot for slot in windows if PLACED <= slot <= last]
    assert 0 <= leaf.seconds <= min(duration, 2 * len(paid))
    assert leaf.seconds <= 2 * lease_windows(duration, PARAMS)
    assert leaf.last_window in {NEVER, *paid}


@given(windows_of, st.lists(st.integers(1, 12), max_size=8), st.integers(1, 90))
def test_epoch_by_epoch_seconds_grow_and_a_closed_lease_stays_closed(
    windows: set[int], lengths: list[int], duration: int
) -> None:
    previous, last = None, PLACED - 1
    for length in lengths:
        first, last = last + 1, last + length
        leaf = settle({slot for slot in windows if first <= slot <= last}, last, order(duration), previous)
        if previous is not None:
            assert leaf.seconds >= previous.seconds
            assert leaf == previous or previous.outcome == OPEN
        previous = leaf


@given(windows_of, st.integers(PLACED, 70))
def test_the_order_of_windows_does_not_matter(windows: set[int], last: int) -> None:
    assert settle(sorted(windows), last) == settle(sorted(windows, reverse=True) * 2, last)


@given(
    st.dictionaries(st.integers(PLACED, 60), st.sampled_from([UP, UP, DOWN, GONE, GONE])),
    st.lists(st.integers(1, 12), min_size=12, max_size=12),
)
def test_fault_does_not_depend_on_where_bodies_end(seen: dict[int, int], lengths: list[int]) -> None:
    seen = {**seen, PLACED + 1: UP}

    def within(status: int, first: int, last: int) -> list[int]:
        return [slot for slot, each in seen.items() if each == status and first <= slot <= last]

    leaf, first = None, PLACED
    for length in (*lengths, 100):
        last = first + length - 1
        up, down, gone = (within(status, first, last) for status in (UP, DOWN, GONE))
        leaf = settle(up, last, order(90), leaf, gone=gone, down=down)
        assert not leaf.fault or leaf.outcome == FAILED
        assert (leaf.gone, leaf.down) == (0, 0) or leaf.outcome == OPEN
        first = last + 1
    up, down, gone = (within(status, 0, 100) for status in (UP, DOWN, GONE))
    assert leaf == settle(up, first - 1, order(90), gone=gone, down=down)
    if leaf.fault:
        assert {leaf.last_window + 2, leaf.last_window + 3} <= set(gone)


@given(windows_of, st.integers(PLACED + 40, 200))
def test_billing_always_ends(windows: set[int], last: int) -> None:
    never_after = {slot for slot in windows if slot < last - 30}
    assert settle(never_after, last).outcome != OPEN
