"""A seat's own backlog or isolation is never the worker's silence, and never its delay."""

from __future__ import annotations

import pytest

from kaisar_p2p.wire.codec import decode
from protocols import actions as do
from protocols.interpreter.events import SlotStarted
from protocols.popw import PASS, SILENT, Vote
from protocols.popw_check import Check, Stage
from protocols.popw_seat import RETRY_S, SeatMachine
from tests.protocols.checks.conftest import PARAMS, SEATS, Swarm, seat_machine, state_at, swarm_of, verdict_of

WAIT_S = PARAMS.challenge_wait_ms / 1000


def started() -> tuple[SeatMachine, Check]:
    machine = seat_machine(SEATS[0])
    machine.step(do.BlockApplied(state_at(), (SlotStarted(state_at().slot),)), 0.0)
    return machine, machine.checks[0]


def attempt(check: Check) -> str:
    return f"chal/{check.name}/{check.attempt}"


def test_a_challenge_that_never_left_this_node_accuses_nobody() -> None:
    machine, check = started()
    now, actions = 0.0, []
    while check.stage is Stage.WAITING:
        ended = do.RequestEnded(attempt(check), "too much at once", local=True)
        actions = machine.step(ended, now)
        now += RETRY_S
        actions += machine.step(do.Wake(), now)
    assert now <= WAIT_S + RETRY_S
    assert check.stage is Stage.DROPPED and not check.vote
    assert [type(action) for action in actions] == [do.Note]
    assert machine.deadline is None
    assert machine.step(do.Wake(), now + 60) == []


def test_losing_everybody_between_commitment_and_tags_accuses_nobody() -> None:
    machine, check = started()
    check.stage = Stage.COMMITTED
    machine.step(do.RequestEnded(attempt(check), "timed out", local=True), 1.0)
    assert check.stage is Stage.DROPPED and not check.vote


def test_the_end_of_the_stream_is_still_the_workers_silence() -> None:
    machine, check = started()
    machine.step(do.RequestEnded(attempt(check), "", began_at=0.1), 1.0)
    assert decode(Vote, check.vote).core.verdict == SILENT


@pytest.mark.parametrize("frame", [True, False])
def test_a_seat_that_asked_too_late_does_not_mind_a_refusal(frame: bool) -> None:
    machine, check = started()
    late = WAIT_S * 0.75
    if frame:
        machine.step(do.Answer(attempt(check), b"", late + 0.1, sent_at=late), late + 0.1)
    else:
        machine.step(do.RequestEnded(attempt(check), "", began_at=late), late + 0.1)
    assert check.stage is Stage.DROPPED and not check.vote


class HeldUp(Swarm):
    """Every seat's challenge waits in its own queue for `held_s`."""

    held_s = 0.0
    started_at = 0.0

    def _request(self, key: bytes, action: do.Request) -> None:
        if not action.request_id.startswith("chal/"):
            super()._request(key, action)
            return
        asked_at, self.now = self.now, self.now + self.held_s
        super()._request(key, action)
        self.now = asked_at

    def _reply(self, action: do.Reply) -> None:
        key, request_id = self._calls[action.call_id]
        super()._reply(action)
        for index, (at, count, node, event) in enumerate(self._queue):
            if node == key and isinstance(event, do.Answer) and event.request_id == request_id:
                left_at = self.started_at + self.held_s if request_id.startswith("chal/") else 0.0
                sent = do.Answer(request_id, event.payload, event.received_at, left_at)
                self._queue[index] = (at, count, node, sent)


def held_up(held_s: float) -> HeldUp:
    swarm = HeldUp(swarm_of().nodes)
    swarm.held_s, swarm.started_at = held_s, swarm.now
    return swarm


@pytest.mark.parametrize("held_s", [0.0, 2.0, 5.0, 20.0])
def test_however_long_all_seats_were_held_up_an_honest_worker_passes(held_s: float) -> None:
    swarm, state = held_up(held_s), state_at()
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == PASS


def test_an_answer_after_a_failure_of_the_worker_counts_from_the_first_attempt() -> None:
    """Otherwise a worker could compute for some seats while it turns the others away."""
    machine, check = started()
    machine.step(do.RequestEnded(attempt(check), "reset", began_at=0.2), 0.3)
    machine.step(do.Wake(), 0.3 + RETRY_S)
    assert check.sent_at == 0.2
    machine.step(do.Answer(attempt(check), b"", 1.0, sent_at=0.9), 1.0)
    assert check.sent_at == 0.2


def test_an_answer_after_a_failure_of_ours_counts_from_the_attempt_that_left() -> None:
    machine, check = started()
    machine.step(do.RequestEnded(attempt(check), "too much at once", local=True), 0.3)
    machine.step(do.Wake(), 0.3 + RETRY_S)
    machine.step(do.Answer(attempt(check), b"", 1.0, sent_at=0.9), 1.0)
    assert check.sent_at == 0.9
