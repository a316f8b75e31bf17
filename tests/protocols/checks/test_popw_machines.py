"""Seats, worker and aggregators of a check: what they certify, whatever the network and the others do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.codec import decode, decode_any, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from protocols import actions as do
from protocols import equivocation as proofs
from protocols import popw
from protocols.committees import check_committee
from protocols.interpreter.events import SlotStarted
from protocols.interpreter.state import REGISTERED
from protocols.popw import BADJOB, LATE, NO_COMMIT, PASS, SILENT, WRONG, Challenge, Vote
from protocols.popw_check import Stage
from protocols.popw_seat import SeatMachine
from protocols.popw_worker import WorkerCheckMachine, WorkerFaults
from tests.protocols.checks.conftest import (
    NETWORK,
    PARAMS,
    SEATS,
    SLOT,
    WORKER,
    Node,
    order_of,
    seat_machine,
    state_at,
    swarm_of,
    verdict_of,
)

# ── the worker's behaviour decides ───────────────────────────────────────────────────────────────────────────────────


def test_an_honest_worker_passes() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == PASS
    assert 1 <= len(swarm.certificates()) <= 2
    assert len(swarm.topic("assignment")) == 1
    assert not swarm.topic("evidence")


def test_a_registration_is_checked_with_more_samples() -> None:
    swarm, state = swarm_of(), state_at(status=REGISTERED)
    machine = swarm.nodes[SEATS[0].public_key].machines[0]
    assert isinstance(machine, SeatMachine)
    swarm.start_slot(state)
    swarm.run()
    assert machine.checks[0].due.samples == PARAMS.registration_samples
    assert verdict_of(swarm, state) == PASS


def test_a_wrong_worker_is_certified_and_proven_wrong() -> None:
    swarm, state = swarm_of(WorkerFaults(wrong_tiles=2)), state_at()
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == WRONG
    evidence = [decode(proofs.WrongResult, payload) for payload in swarm.topic("evidence")]
    assert evidence
    assert all(proofs.verify_evidence(each, proofs.context_of(state)) == WORKER.public_key for each in evidence)


def test_a_late_worker_is_late() -> None:
    swarm, state = swarm_of(WorkerFaults(delay_s=PARAMS.deadline_ms / 1000)), state_at()
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == LATE


@pytest.mark.parametrize("faults", [WorkerFaults(silent=True), WorkerFaults(delay_s=9.0)])
def test_a_worker_without_an_answer_is_silent(faults: WorkerFaults) -> None:
    swarm, state = swarm_of(faults), state_at()
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == SILENT
    assert all(certificate.core.commit == NO_COMMIT for certificate in swarm.certificates())  # type: ignore[union-attr]


def test_an_unreachable_worker_is_tried_again_then_silent() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.dead.add(WORKER.public_key)
    swarm.start_slot(state)
    swarm.run(1.0)
    assert not swarm.certificates()  # it still has time
    swarm.run()
    assert verdict_of(swarm, state) == SILENT


def test_a_worker_that_comes_back_in_time_passes() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.dead.add(WORKER.public_key)
    swarm.start_slot(state)
    swarm.run(1.0)
    swarm.dead.clear()
    swarm.step(WORKER.public_key, do.BlockApplied(state, (SlotStarted(SLOT),)))
    swarm.run()
    assert verdict_of(swarm, state) == PASS


def test_a_worker_with_another_job_has_a_bad_job() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    smaller = replace(state, params=replace(PARAMS, job_n=32))
    swarm.put(swarm.now, WORKER.public_key, do.BlockApplied(smaller, ()))
    swarm.run()
    assert verdict_of(swarm, state) == BADJOB


def test_a_worker_that_lags_waits_for_the_block() -> None:
    swarm, state = swarm_of(), state_at()
    before = replace(state, number=state.number - 1, beacons=state.beacons.delete(SLOT))
    swarm.step(WORKER.public_key, do.BlockApplied(before, ()))
    swarm.start_slot(state, {WORKER.public_key: 0.8})
    swarm.run()
    assert verdict_of(swarm, state) == PASS


# ── seats that are away, late or dishonest ───────────────────────────────────────────────────────────────────────────


def test_two_of_seven_seats_may_be_away() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.dead |= {SEATS[0].public_key, SEATS[1].public_key}
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == PASS


def test_without_a_quorum_of_challenges_nothing_is_decided() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.dead |= {seat.public_key for seat in SEATS[:3]}
    swarm.start_slot(state)
    swarm.run()
    assert not swarm.certificates()


def test_late_seats_get_the_same_commitment_and_vote_too() -> None:
    swarm, state = swarm_of(), state_at()
    late = {SEATS[2].public_key: 0.3, SEATS[3].public_key: 0.8}  # during the proof, and after it
    swarm.start_slot(state, late)
    swarm.run()
    assert verdict_of(swarm, state) == PASS
    for key in late:
        machine = swarm.nodes[key].machines[0]
        assert isinstance(machine, SeatMachine)
        check = machine.checks[0]
        assert check.stage is Stage.VOTED
        assert check.commit is not None and not check.commit.mask >> check.challenge.seat & 1
        assert decode(Vote, check.vote).core.verdict == PASS


@pytest.mark.parametrize("dead", [1, 2])
def test_dead_aggregators_are_replaced(dead: int) -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run(0.4)  # all challenges are out
    swarm.dead |= set(order_of(state)[:dead])
    swarm.run()
    assert verdict_of(swarm, state) == PASS


def test_aggregators_that_keep_votes_to_themselves_are_gone_round() -> None:
    class Mute:
        deadline = None

        def step(self, event: do.Event, now: float) -> list[do.Action]:
            if isinstance(event, do.Incoming) and event.protocol == popw.VOTE_PROTOCOL:
                return [do.Reply(event.call_id, b"\x01")]
            return []

    swarm, state = swarm_of(), state_at()
    for key in order_of(state)[:2]:
        swarm.nodes[key] = Node([Mute()])
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == PASS


class Liar:
    """A seat that challenges and votes PASS without looking, then votes something else as well."""

    deadline = None

    def __init__(self, keys: KeyPair) -> None:
        self._inner = seat_machine(keys)
        self._keys = keys
        self.votes: list[Vote] = []
        self.commit = b""

    def step(self, event: do.Event, now: float) -> list[do.Action]:
        if isinstance(event, do.Answer) and event.request_id.startswith("chal/") and not self.commit:
            self.commit = event.payload
        if isinstance(event, do.WorkDone):
            event = do.WorkDone(event.work_id, matproof.CheckResult(True, None, bytes(32)))
        actions = self._inner.step(event, now)
        requests = [each for each in actions if isinstance(each, do.Request) and each.protocol == popw.VOTE_PROTOCOL]
        for request in requests:
            vote = decode(Vote, request.payload)
            self.votes.append(vote)
            actions.append(replace(request, request_id=request.request_id + "x", payload=self._other(vote), duty=None))
        return actions

    def _other(self, vote: Vote) -> bytes:
        core = replace(vote.core, verdict=LATE)
        private = replace(vote.private, core_hash=popw.core_hash(core, NETWORK))
        signatures = [self._keys.sign(each.DOMAIN, NETWORK, encode(each)) for each in (core, private)]
        return encode(Vote(core, signatures[0], private, signatures[1]))


def test_a_lying_seat_changes_nothing_and_is_caught() -> None:
    swarm, state = swarm_of(WorkerFaults(wrong_tiles=2)), state_at()
    liar_keys = next(seat for seat in SEATS if seat.public_key == order_of(state)[-1])
    liar = Liar(liar_keys)
    swarm.nodes[liar_keys.public_key] = Node([liar])
    swarm.start_slot(state)
    swarm.run()
    assert verdict_of(swarm, state) == WRONG
    context = proofs.context_of(state)
    evidence = [decode_any(proofs.EVIDENCE, payload) for payload in swarm.topic("evidence")]
    wrong = next(each for each in evidence if isinstance(each, proofs.WrongResult))
    against = [each for each in evidence if not isinstance(each, proofs.WrongResult)]
    assert {type(each) for each in against} == {proofs.DoubleVote, proofs.FalsePass}
    assert {proofs.verify_evidence(each, context) for each in against} == {liar_keys.public_key}
    lazy = proofs.LazyCheck(liar.votes[0], wrong.commit)
    assert proofs.verify_evidence(lazy, context) == liar_keys.public_key
    false = [proofs.FalsePass(liar.votes[0], replace(wrong, tile=tile)) for tile in range(2)]
    assert liar_keys.public_key in {proofs.verify_evidence(each, context) for each in false}


def test_a_seat_with_two_challenges_is_caught_once() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run(0.0)
    committee = check_committee(state, SLOT, WORKER.public_key)
    assert committee is not None
    seat = committee.seats.index(SEATS[4].public_key)
    for value in (bytes(32), b"\x01" * 32):
        second = Challenge(state.params.epoch_of_slot(SLOT), SLOT, WORKER.public_key, seat, value)
        payload = seal(second, SEATS[4], NETWORK)
        request = do.Request(f"mine/{value.hex()}", WORKER.public_key, popw.CHALLENGE_PROTOCOL, payload, 5.0)
        swarm.carry_out(SEATS[4].public_key, swarm.nodes[SEATS[4].public_key], request)
    swarm.run()
    (payload,) = swarm.topic("evidence")
    assert (
        proofs.verify_evidence(decode(proofs.DoubleChallenge, payload), proofs.context_of(state)) == SEATS[4].public_key
    )
    assert verdict_of(swarm, state) == PASS


# ── one machine at a time: whatever comes in, nothing is raised and nothing is signed twice ──────────────────────────


def test_a_restarted_seat_neither_challenges_nor_votes_again() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run()
    node = swarm.nodes[SEATS[0].public_key]
    restarted = SeatMachine(SEATS[0], lambda n: b"\x07" * n)
    before = dict(node.duties)
    node.machines = [restarted]
    swarm.step(SEATS[0].public_key, do.BlockApplied(state, (SlotStarted(SLOT),)))
    swarm.run()
    assert node.duties == before
    assert restarted.checks[0].stage is Stage.WAITING


def test_while_catching_up_nobody_is_challenged() -> None:
    machine = seat_machine(SEATS[0])
    assert machine.step(do.BlockApplied(state_at(), (SlotStarted(SLOT),), live=False), 0.0) == []
    assert machine.checks == ()


def test_finished_checks_are_forgotten() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run()
    later = replace(state, number=state.number + 20 * PARAMS.slot_blocks)
    machine = swarm.nodes[SEATS[0].public_key].machines[0]
    assert isinstance(machine, SeatMachine) and machine.checks
    machine.step(do.BlockApplied(later, ()), swarm.now)
    assert machine.checks == ()
    assert machine.deadline is None


def test_checks_beyond_the_bound_are_left_out_and_noted() -> None:
    machine = SeatMachine(SEATS[0], bytes, max_checks=0)
    (note,) = machine.step(do.BlockApplied(state_at(), (SlotStarted(SLOT),)), 0.0)
    assert isinstance(note, do.Note) and note.kind == "check_skipped"


def test_a_failed_computation_is_no_opinion() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run(0.58)
    machine = swarm.nodes[SEATS[0].public_key].machines[0]
    assert isinstance(machine, SeatMachine)
    check = machine.checks[0]
    assert check.stage is Stage.CHECKING
    (note,) = machine.step(do.WorkDone(f"check/{check.name}", None, "out of memory"), swarm.now)
    assert isinstance(note, do.Note) and check.stage is Stage.DROPPED


@pytest.mark.parametrize("payload", [b"", b"\xff" * 100, bytes(100_000)])
@pytest.mark.parametrize("frame", [1, 2])
def test_an_unusable_answer_is_no_answer(payload: bytes, frame: int) -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run(0.58 if frame == 2 else 0.3)
    machine = swarm.nodes[SEATS[0].public_key].machines[0]
    assert isinstance(machine, SeatMachine)
    check = machine.checks[0]
    if frame == 2:
        check.stage = Stage.COMMITTED
    machine.step(do.Answer(f"chal/{check.name}/0", payload, swarm.now), swarm.now)
    assert decode(Vote, check.vote).core.verdict == SILENT


def test_events_of_other_machines_are_ignored() -> None:
    machine, worker = seat_machine(SEATS[0]), WorkerCheckMachine(WORKER)
    events: list[do.Event] = [
        do.Wake(),
        do.Answer("deploy/1", b"", 0.0),
        do.Answer("chal/9/zz", b"", 0.0),
        do.RequestEnded("vote/9/zz/0", "gone"),
        do.RequestEnded("chal", ""),
        do.WorkDone("check/1/2", None, "x"),
        do.WorkDone("prove/4", None, "x"),
        do.Gossip("certificate", "nonsense", b"", 0.0),
        do.ProbeReport("p", True, ""),
        do.ContainerReport(b"", "started"),
    ]
    for event in events:
        assert machine.step(event, 0.0) == []
        assert worker.step(event, 0.0) == []


# ── whatever the network does ────────────────────────────────────────────────────────────────────────────────────────


@given(
    offsets=st.lists(st.floats(0.0, 3.0), min_size=8, max_size=8),
    deaths=st.dictionaries(st.integers(0, 7), st.floats(0.0, 1.5), max_size=3),
    wrong_tiles=st.sampled_from([0, 0, 1, 4]),
    delay_s=st.sampled_from([0.0, 0.0, 5.0, 7.0]),
)
def test_no_two_verdicts_and_no_evidence_against_the_honest(
    offsets: list[float], deaths: dict[int, float], wrong_tiles: int, delay_s: float
) -> None:
    """Nodes start late, die at any time, and the worker may cheat: at most one verdict, and only cheats are accused."""
    swarm, state = swarm_of(WorkerFaults(wrong_tiles, delay_s)), state_at()
    everybody = [*(seat.public_key for seat in SEATS), WORKER.public_key]
    swarm.start_slot(state, dict(zip(everybody, offsets, strict=True)))
    for who, at in sorted(deaths.items(), key=lambda death: death[1]):
        swarm.run(max(0.0, at - (swarm.now - 1_000_000.0)))
        swarm.dead.add(everybody[who])
    swarm.run()
    assert len({certificate.core for certificate in swarm.certificates()}) <= 1
    accused = {
        proofs.verify_evidence(decode(proofs.WrongResult, each), proofs.context_of(state))
        for each in swarm.topic("evidence")
    }
    assert accused <= ({WORKER.public_key} if wrong_tiles else set())
    punctual = max(offsets) < 0.5 and not deaths
    if punctual and not delay_s:
        assert verdict_of(swarm, state) == (WRONG if wrong_tiles == 4 else PASS) or wrong_tiles == 1
