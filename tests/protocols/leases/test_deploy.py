"""Leases from order to end, as they should go and with programs that fail."""

from __future__ import annotations

import itertools
from hashlib import sha256
from typing import Any

import pytest

from protocols.actions import (
    Action,
    Probe,
    Request,
    Stop,
    Submit,
)
from protocols.deploy import (
    AUTHORISED,
    CANCELLED,
    COMPLETED,
    DEGRADED,
    DEPLOY_PROTOCOL,
    DOWN,
    ENDED,
    EXPIRED,
    FAILED,
    PLACED,
    RUNNING,
    STATE_NAMES,
    UP,
)
from protocols.interpreter.state import (
    ORDER_CANCELLED,
)
from protocols.lease import TRANSITIONS, Signal
from protocols.lease_client import DEPLOYING_TEXT, RUNNING_TEXT
from protocols.lease_votes import aggregators
from protocols.quorum import ReadyCore, TicketCore
from tests.protocols.leases.conftest import BLOCK_S, NETWORK, PARAMS, SEATS, SLOT_S

# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_starts_nothing_without_a_ticket_and_has_no_way_out_of_ended() -> None:
    assert {state for (state, signal) in TRANSITIONS if signal is Signal.WORKLOAD} == {AUTHORISED}
    assert {after for (state, _), after in TRANSITIONS.items() if state == PLACED} == {AUTHORISED, ENDED}
    assert not [state for (state, _) in TRANSITIONS if state == ENDED]
    assert set(TRANSITIONS.values()) <= set(STATE_NAMES)


# ── the way it should go ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_runs_and_the_client_reads_the_two_lines(world: Any) -> None:
    order_id = world.running()
    texts = world.texts()
    assert texts.index(DEPLOYING_TEXT) < texts.index(RUNNING_TEXT)
    assert texts.count(DEPLOYING_TEXT) == texts.count(RUNNING_TEXT) == 1
    world.run(0.5)
    assert world.worker_state() == "RUNNING"
    assert world.deploys == 1
    assert {core.order_id for core in world.certificates(TicketCore)} == {order_id}
    events = world.events()
    assert [event.sequence for event in events] == list(range(len(events)))
    assert [event.reason for event in events] == ["deploying", "healthy", "ready"]
    assert {event.port for event in events} == {8080}


def test_every_window_is_witnessed_until_the_time_is_over_then_the_lease_expires(world: Any) -> None:
    world.running()
    windows = 60_000 // PARAMS.slot_ms
    world.until(lambda: world.worker_state() == "ENDED", within_s=60 + 4 * SLOT_S)
    up = world.windows(UP)
    assert up == list(range(up[0], up[0] + windows))
    assert not world.windows(DOWN)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (EXPIRED, "expired")
    world.run(3 * SLOT_S)
    assert not world.containers
    assert world.windows(UP) == up
    assert not world.client.done(Submit)


def test_probes_come_at_different_moments_and_early_in_the_window(world: Any) -> None:
    world.running()
    world.until(lambda: world.state.slot > 3 and world.state.number % PARAMS.slot_blocks == 0)
    start = world.now
    moments = []
    original = world.do

    def note_moment(peer: Any, action: Action) -> None:
        if isinstance(action, Probe):
            moments.append((world.now - start) * 1000)
        original(peer, action)

    world.do = note_moment  # type: ignore[method-assign]
    world.run(SLOT_S - 0.01)
    assert len(set(moments)) == 7
    assert all(0.1 * PARAMS.slot_ms - 1 <= moment <= 0.3 * PARAMS.slot_ms + 1 for moment in moments)


def test_cancelling_stops_the_container_and_the_witnesses(world: Any) -> None:
    order_id = world.running()
    world.run(2 * SLOT_S)
    world.to_cancel.add(order_id)
    world.run(2 * BLOCK_S)
    assert not world.containers
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (CANCELLED, "cancelled")
    assert world.client_lease().outcome == CANCELLED
    seen = len(world.published)
    world.run(3 * SLOT_S)
    assert len(world.published) == seen
    world.settle(order_id, CANCELLED)
    assert world.client.notes[-1].kind == "settlement"
    assert not any(getattr(machine, "watches", ()) for seat in world.seats for machine in seat.machines)


def test_a_worker_that_forgot_the_workload_gets_it_from_the_client(world: Any) -> None:
    world.running(held=False)
    assert world.deploys == 1
    assert any(r.protocol == DEPLOY_PROTOCOL for r in world.client.done(Request))


def test_two_dead_aggregators_do_not_stop_a_lease(world: Any) -> None:
    order_id = sha256((0).to_bytes(32, "big")).digest()
    world.count = itertools.count()
    ranked = aggregators(tuple(keys.public_key for keys in SEATS), order_id, NETWORK)
    for seat in world.seats:
        if seat.keys.public_key in ranked[:2]:
            world.kill(seat)
    assert world.running() == order_id
    world.run(3 * SLOT_S)
    assert world.windows(UP)


def test_aggregators_that_are_blocks_behind_count_the_votes_later(world: Any) -> None:
    order_id = sha256((0).to_bytes(32, "big")).digest()
    world.count = itertools.count()
    ranked = aggregators(tuple(keys.public_key for keys in SEATS), order_id, NETWORK)
    for seat in world.seats:
        seat.lag_s = 4.0 if seat.keys.public_key in ranked[:2] else 3.0
    world.worker.lag_s = 3.5
    assert world.running() == order_id
    world.run(4 * SLOT_S)
    assert len(world.windows(UP)) >= 2


def test_two_orders_at_once_do_not_mix(world: Any) -> None:
    first, second = world.place(), world.place()
    world.until(lambda: world.texts().count(RUNNING_TEXT) == 2, within_s=20)
    world.to_cancel.add(first)
    world.run(3 * SLOT_S)
    assert list(world.containers) == [second]


# ── programs that fail ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("failed image-not-found: no such image", "image-not-found"),
        ("failed start-failed: No such file", "start-failed"),
        ("failed something else", "start-failed"),
    ],
)
def test_a_program_that_cannot_start_ends_with_its_reason_and_is_cancelled(
    world: Any, program: str, reason: str
) -> None:
    world.program = program
    order_id = world.place()
    world.run(5)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, reason)
    assert world.client_lease().reason == reason
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert RUNNING_TEXT not in world.texts()


@pytest.mark.parametrize(("code", "outcome", "reason"), [("0", COMPLETED, "completed"), ("3", FAILED, "exited")])
def test_a_program_that_ends_keeps_its_logs_until_the_order_is_over(
    world: Any, code: str, outcome: int, reason: str
) -> None:
    order_id = world.running()
    world.becomes(order_id, "exited", code)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (outcome, reason)
    assert not world.worker.done(Stop)
    world.run(3 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert [stop.order_id for stop in world.worker.done(Stop)] == [order_id]


def test_a_program_that_never_listens_is_not_ready_and_everybody_gives_up(world: Any) -> None:
    world.program = "silent"
    order_id = world.place()
    world.run(PARAMS.deploy_timeout_ms / 1000 + 1)
    assert not world.certificates(ReadyCore)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, "deploy-timeout")
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert world.client_lease().reason == "deploy-timeout"


def test_degraded_and_back(world: Any) -> None:
    order_id = world.running()
    world.run(0.5)
    world.report(order_id, "unhealthy", "port 8080")
    assert world.worker_state() == "DEGRADED"
    world.report(order_id, "healthy")
    assert world.worker_state() == "RUNNING"
    assert [event.state for event in world.events()[-2:]] == [DEGRADED, RUNNING]
