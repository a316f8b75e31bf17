"""Any party of a lease may die and come back at any moment."""

from __future__ import annotations

from typing import Any

import pytest

from protocols.actions import (
    Stop,
)
from protocols.deploy import (
    CANCELLED,
    DOWN,
    ENDED,
    FAILED,
    GONE,
    REASONS,
    RUNNING,
    UP,
)
from protocols.interpreter.state import (
    ORDER_CANCELLED,
)
from protocols.lease_client import DEPLOYING_TEXT, RUNNING_TEXT
from protocols.lease_worker import ADOPT_S
from tests.protocols.leases.conftest import BLOCK_S, PARAMS, SLOT_S, WORKLOAD

# ── restarts and losses ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_dies_goes_down_in_three_windows_and_the_client_cancels(world: Any) -> None:
    order_id = world.running()
    world.run(3 * SLOT_S)
    world.kill(world.worker)
    died = world.state.slot
    world.until(lambda: world.client_lease().state == ENDED, within_s=6 * SLOT_S)
    assert world.client_lease().reason == "worker-lost"
    assert len(world.windows(GONE)) == PARAMS.unwitnessed_windows
    assert min(world.windows(GONE)) in (died, died + 1)
    assert not world.windows(DOWN)
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert REASONS["worker-lost"] in world.texts()


def test_a_worker_restarts_and_finds_its_container_again(world: Any) -> None:
    order_id = world.running()
    world.run(SLOT_S)
    world.kill(world.worker)
    world.run(1)
    world.start(world.worker)
    world.run(4 * SLOT_S + ADOPT_S)
    assert world.deploys == 1
    assert not world.worker.done(Stop)
    assert world.worker_state() == "RUNNING"
    assert order_id in world.containers
    assert world.windows(UP)[-1] >= world.state.slot - 1
    assert world.client_lease().state == RUNNING


@pytest.mark.parametrize("moment_s", [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
def test_a_worker_restarts_at_any_moment_of_a_deployment(world: Any, moment_s: float) -> None:
    world.place()
    world.run(moment_s)
    world.kill(world.worker)
    world.run(0.5)
    world.start(world.worker)
    world.until(lambda: RUNNING_TEXT in world.texts(), within_s=25)
    world.run(ADOPT_S)
    assert len(world.containers) == 1
    assert world.deploys <= 2
    events = world.events()
    assert len({(event.sequence, event.state, event.at_ms) for event in events}) == len(
        {event.sequence for event in events}
    )


def test_a_container_that_was_gone_after_a_restart_ends_the_lease(world: Any) -> None:
    order_id = world.running()
    world.run(1)
    world.kill(world.worker)
    world.containers.clear()
    world.start(world.worker)
    world.run(ADOPT_S + 1)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, "exited")
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED


def test_an_order_that_was_cancelled_while_the_worker_was_away_is_stopped(world: Any) -> None:
    order_id = world.running()
    world.kill(world.worker)
    world.to_cancel.add(order_id)
    world.run(2)
    world.start(world.worker)
    world.run(1)
    assert not world.containers


def test_a_container_of_nobody_is_stopped(world: Any) -> None:
    world.containers[b"x" * 32] = "started"
    world.report(b"x" * 32, "started")
    assert not world.containers


def test_seats_that_restart_go_on_witnessing(world: Any) -> None:
    world.running()
    world.run(SLOT_S)
    for seat in world.seats:
        world.kill(seat)
        world.start(seat)
    before = world.state.slot
    world.run(4 * SLOT_S)
    assert set(range(before + 1, world.state.slot)) <= set(world.windows(UP))


def test_seats_that_restart_before_the_ticket_vote_the_same_again(world: Any) -> None:
    world.place()
    for seat in world.seats:
        world.kill(seat)
        world.start(seat)
    world.until(lambda: RUNNING_TEXT in world.texts(), within_s=20)


@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.3, 0.6])
def test_a_client_that_dies_after_paying_comes_back_to_its_lease(world: Any, moment_s: float) -> None:
    world.place(held=False)
    world.run(moment_s)
    world.kill(world.client)
    world.run(1)
    world.start(world.client)
    # Whatever was missed, the next window that is UP says that the lease runs.
    if world.deploys:
        world.until(lambda: RUNNING_TEXT in world.texts(), within_s=3 * SLOT_S)
    else:
        world.run(PARAMS.deploy_timeout_ms / 1000 + 3 * SLOT_S)
        assert world.client_lease().outcome in (FAILED, CANCELLED)
    assert world.texts().count(DEPLOYING_TEXT) <= 1


def test_a_client_that_restarts_in_mid_lease_does_not_repeat_itself(world: Any) -> None:
    world.running()
    world.kill(world.client)
    world.start(world.client)
    world.run(3 * SLOT_S)
    assert world.texts().count(RUNNING_TEXT) == 1
    assert world.client_lease().workload == WORKLOAD
