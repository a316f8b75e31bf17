"""Escrow that no anchor settles: it is locked for long, never for ever."""

from __future__ import annotations

import pytest

from protocols import deploy
from protocols.interpreter import calls
from protocols.interpreter.events import CallApplied, CallIgnored, LeaseSettled, OrderEnded
from protocols.interpreter.state import ORDER_CLOSED
from protocols.params import KAI

MINUTE_PLANCK = 36 * KAI // 60
WAIT = 20
"""Epochs of four seconds, so longer than deploy timeout and duration together."""


@pytest.fixture
def stalled(new_chain):
    """A network that has an open order of a minute, and anchors no epoch from then on."""
    chain = new_chain(release_epochs=WAIT, points_planck=MINUTE_PLANCK)
    chain.add_worker()
    return chain


@pytest.mark.parametrize("name", ["alice", "provider"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_both_sides_can_end_an_order_that_no_anchor_closes(stalled, name, cancelled):
    before = stalled.account("alice")
    order_id = stalled.place(points_planck=MINUTE_PLANCK // 3)
    if cancelled:
        stalled.do("alice", calls.OrderCancel(order_id))
    stalled.until_epoch(stalled.state.epoch + WAIT + 1)
    stalled.do(name, calls.OrderCancel(order_id))
    assert stalled.account("alice") == before, "what came as points is points again, and the rest KAI"
    order = stalled.order(order_id)
    assert (order.status, order.escrow_planck, order.outcome) == (ORDER_CLOSED, 0, deploy.CANCELLED)
    assert not stalled.state.open_orders
    points = MINUTE_PLANCK // 3
    settled = LeaseSettled(order_id, 0, MINUTE_PLANCK - points, points, True)
    assert settled in stalled.events
    assert (OrderEnded(order_id) in stalled.events) is not cancelled
    stalled.do("provider", calls.WorkerRetire(order.worker))
    assert isinstance(stalled.run(name, calls.OrderCancel(order_id)), CallIgnored)


def test_what_was_settled_stays_paid(stalled):
    order_id = stalled.place(points_planck=MINUTE_PLANCK // 3)
    assert isinstance(stalled.settle(order_id, 30, deploy.OPEN), CallApplied)
    before = stalled.account("alice")
    stalled.until_epoch(stalled.state.epoch + WAIT + 1)
    stalled.do("alice", calls.OrderCancel(order_id))
    after = stalled.account("alice")
    assert after.balance_planck - before.balance_planck == MINUTE_PLANCK // 2, "the points were spent first"
    assert after.points_planck == before.points_planck


def test_while_epochs_are_anchored_only_their_leaves_settle(stalled):
    order_id = stalled.place()
    stalled.do("alice", calls.OrderCancel(order_id))
    stalled.until_epoch(stalled.state.epoch + WAIT - 1)
    stalled.anchor()
    stalled.until_epoch(stalled.state.last_anchor + WAIT)
    for name, reason in (("alice", "the order is not open"), ("provider", "the order is another account's")):
        outcome = stalled.run(name, calls.OrderCancel(order_id))
        assert outcome.reason == reason


def test_an_order_whose_time_is_not_over_is_only_cancelled(new_chain):
    chain = new_chain(release_epochs=1)
    chain.add_worker()
    order_id = chain.place()
    chain.until_epoch(chain.state.epoch + 3)
    assert chain.run("provider", calls.OrderCancel(order_id)).reason == "the order is another account's"
    chain.do("alice", calls.OrderCancel(order_id))
    assert chain.order(order_id).escrow_planck == MINUTE_PLANCK
    chain.do("alice", calls.OrderCancel(order_id))
    assert chain.order(order_id).escrow_planck == 0
