"""What witnesses say when a lease does not answer: whose doing that was, and when they say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from protocols.actions import Probe, ProbeReport
from protocols.deploy import DOWN, ENDED, GONE, UP
from protocols.interpreter.state import ORDER_CANCELLED
from tests.protocols.leases.conftest import BLOCK_S, PARAMS, SLOT_S


def test_a_program_that_stops_while_its_worker_answers_is_down_and_not_gone(world: Any) -> None:
    order_id = world.running()
    world.run(2 * SLOT_S)
    world.containers[order_id] = "stopped"  # by its tenant, or by the worker: nobody can tell
    world.until(lambda: world.client_lease().state == ENDED, within_s=6 * SLOT_S)
    assert world.client_lease().reason == "worker-lost"
    assert len(world.windows(DOWN)) == PARAMS.unwitnessed_windows
    assert not world.windows(GONE)
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED


def test_seats_without_any_peer_say_nothing_and_go_on_afterwards(world: Any) -> None:
    world.running()
    world.run(2 * SLOT_S)
    for seat in world.seats:
        seat.deaf = True
    lonely = world.state.slot + 1
    world.run(3 * SLOT_S)
    back = world.state.slot + 1
    for seat in world.seats:
        for watch in seat.machines[0].watches:
            assert all(watch.windows[slot].core is None for slot in range(lonely, back - 1) if slot in watch.windows)
        seat.deaf = False
    world.run(3 * SLOT_S)
    assert not world.windows(GONE) and not world.windows(DOWN)
    assert max(world.windows(UP)) >= back


@pytest.mark.parametrize(
    ("reports", "status"),
    [
        ([(False, False, False), (False, False, False)], GONE),
        ([(False, True, False), (False, True, False)], DOWN),
        ([(False, True, False), (False, False, False)], DOWN),  # it answered once
        ([(False, False, False), (False, True, False)], DOWN),
        ([(False, True, False), (False, False, True)], DOWN),
        ([(False, False, False), (False, False, True)], None),  # we were alone at the end, perhaps before
        ([(False, False, True), (False, False, True)], None),
        ([(False, False, True), (False, False, False)], GONE),
        ([(False, False, True), (True, True, False)], UP),
    ],
)
def test_two_looks_make_one_statement(
    hostile_world: Any, reports: list[tuple[bool, bool, bool]], status: int | None
) -> None:
    world = hostile_world
    world.running()
    seat = next(seat for seat in world.seats if seat.machines[0].watches)
    seat.deaf = True  # its own looks lead nowhere; the test answers for them
    world.run(SLOT_S)
    machine = seat.machines[0]
    (watch,) = machine.watches
    world.until(lambda: any(look.slot is not None for look in watch.looks.values()), within_s=2 * SLOT_S)
    look = next(look for look in watch.looks.values() if look.slot is not None)
    now, slot = world.now, look.slot
    for up, answered, local in reports:
        now = look.at if look.at is not None else now
        probes = [each for each in machine._look(watch, now) if isinstance(each, Probe)] if look.at is not None else []
        name = probes[0].probe_id if probes else f"probe/{watch.order_id.hex()}/{slot}/{look.attempt}"
        machine.step(ProbeReport(name, up, "", answered, local), now)
    core = watch.window(slot).core
    assert (core.status if core is not None else None) == status
    assert slot not in watch.looks


def test_an_order_that_nobody_settles_is_not_watched_for_ever(world: Any) -> None:
    """A seat watches a bounded number of orders: those that are long over must not take the place of new ones."""
    world.client.up = False  # and so never cancels
    world.place(held=False)
    world.run(BLOCK_S)
    assert {len(seat.machines[0].watches) for seat in world.seats} == {1}
    world.run(PARAMS.deploy_timeout_ms / 1000 + world.duration_s + (PARAMS.certificate_grace_slots + 3) * SLOT_S)
    assert {len(seat.machines[0].watches) for seat in world.seats} == {0}
    seat = world.seats[0]
    world.kill(seat)
    world.start(seat)
    assert seat.machines[0].watches == ()
