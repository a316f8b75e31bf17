"""Checks without a certificate are repeated by seats and worker."""

from __future__ import annotations

from protocols import actions as do
from protocols import popw
from protocols.due import RECHECK
from protocols.interpreter.events import SlotStarted
from protocols.popw import PASS
from protocols.popw_seat import SeatMachine
from tests.protocols.checks.conftest import PARAMS, SEATS, SLOT, at_slot, seat_machine, state_at, swarm_of, verdict_of


def test_a_check_without_a_certificate_is_repeated_until_there_is_one() -> None:
    swarm, again = swarm_of(), popw.recheck_slots(PARAMS)
    swarm.dead |= {seat.public_key for seat in SEATS[:3]}
    swarm.start_slot(state_at())
    swarm.run()
    assert not swarm.certificates()
    for slot in range(SLOT + 1, SLOT + again):
        swarm.start_slot(at_slot(slot))
        swarm.run(PARAMS.slot_ms / 1000)
    machine = swarm.nodes[SEATS[6].public_key].machines[0]
    assert isinstance(machine, SeatMachine)
    assert {check.challenge.slot for check in machine.checks} <= {SLOT}  # nobody was asked in between
    swarm.dead.clear()
    for key in [seat.public_key for seat in SEATS[:3]]:  # they were away, not restarted: they know what was due
        machine_away = swarm.nodes[key].machines[0]
        assert isinstance(machine_away, SeatMachine)
        machine_away.step(do.BlockApplied(state_at(), (SlotStarted(SLOT),)), swarm.now - 30)
    state = at_slot(SLOT + again)
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == PASS
    assert [check.due.reason for check in machine.checks] == [RECHECK]
    before = len(swarm.certificates())
    for step in range(1, 4):  # and then no more
        swarm.start_slot(at_slot(SLOT + again + step * again))
        swarm.run()
    assert len(swarm.certificates()) == before


def test_a_seat_alone_with_its_view_gets_no_answer_and_certifies_nothing() -> None:
    swarm, again = swarm_of(), popw.recheck_slots(PARAMS)
    swarm.start_slot(state_at())
    swarm.run()
    (core,) = {certificate.core for certificate in swarm.certificates()}
    lonely = SEATS[0].public_key
    swarm.nodes[lonely].machines = [seat_machine(SEATS[0])]
    swarm.nodes[lonely].machines[0].step(do.BlockApplied(state_at(), (SlotStarted(SLOT),)), swarm.now)
    swarm.start_slot(at_slot(SLOT + again))
    swarm.run()
    machine = swarm.nodes[lonely].machines[0]
    assert isinstance(machine, SeatMachine)
    assert [check.due.reason for check in machine.checks if check.challenge.slot == SLOT + again] == [RECHECK]
    assert {certificate.core for certificate in swarm.certificates()} == {core}


def test_what_a_node_missed_while_catching_up_is_not_repeated() -> None:
    machine, again = seat_machine(SEATS[0]), popw.recheck_slots(PARAMS)
    machine.step(do.BlockApplied(state_at(), (SlotStarted(SLOT),), live=False), 0.0)
    assert machine.step(do.BlockApplied(at_slot(SLOT + again), (SlotStarted(SLOT + again),)), 0.0) == []
