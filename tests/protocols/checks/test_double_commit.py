"""A worker that commits to two runs in one slot is found out, whoever got which commitment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.envelope import Signed, seal
from protocols import actions as do
from protocols.equivocation import DoubleCommit, WrongResult, context_of, verify_evidence
from protocols.popw import CHALLENGE_PROTOCOL, VOTE_PROTOCOL, Commit, CommitRequest
from protocols.popw_check import Stage
from protocols.popw_seat import SeatMachine
from protocols.popw_votes import REFUSED
from protocols.popw_worker import WorkerCheckMachine
from tests.protocols.checks.conftest import (
    NETWORK,
    SEATS,
    SLOT,
    WORKER,
    Node,
    Swarm,
    keys_of,
    order_of,
    state_at,
    swarm_of,
    verdict_of,
)


class TwoFaced:
    """Two runs of one worker: the seats in `others` get the second one, which leaves out one seat's challenge."""

    def __init__(self, others: set[bytes], left_out: bytes) -> None:
        self._faces = [WorkerCheckMachine(WORKER), WorkerCheckMachine(WORKER)]
        self._others, self._left_out = others, left_out
        self._seats: dict[int, bytes] = {}

    @property
    def deadline(self) -> float | None:
        return min((at for face in self._faces if (at := face.deadline) is not None), default=None)

    def step(self, event: do.Event, now: float) -> list[do.Action]:
        if isinstance(event, do.Incoming) and event.protocol == CHALLENGE_PROTOCOL:
            self._seats[event.call_id] = event.peer
        actions: list[do.Action] = []
        for index, face in enumerate(self._faces):
            own = event
            if isinstance(event, do.WorkDone):
                if not event.work_id.endswith(f"#{index}"):
                    continue
                own = replace(event, work_id=event.work_id.partition("#")[0])
            if index and isinstance(event, do.Incoming) and event.peer == self._left_out:
                continue
            for action in face.step(own, now):
                if isinstance(action, do.Compute):
                    actions.append(replace(action, work_id=f"{action.work_id}#{index}"))
                elif isinstance(action, do.Reply):
                    if index == (self._seats[action.call_id] in self._others):
                        actions.append(replace(action, duty=None))
                elif not isinstance(action, do.Note):
                    actions.append(action)
        return actions


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_commitments_to_different_seats_are_evidence(count: int) -> None:
    swarm, state = swarm_of(), state_at()
    order = order_of(state)
    others = set(order[-count:])
    swarm.nodes[WORKER.public_key] = Node([TwoFaced(others, order[0])])
    swarm.start_slot(state)
    swarm.run()
    evidence = {decode(DoubleCommit, payload) for payload in swarm.topic("evidence")}
    assert len(evidence) == 1  # whoever found it, in the same form
    assert verify_evidence(evidence.pop(), context_of(state)) == WORKER.public_key
    if count <= 2:
        verdict_of(swarm, state)  # five agree
    else:
        assert not swarm.certificates()


def test_an_honest_worker_is_not_asked_about() -> None:
    swarm, state = swarm_of(), state_at()
    swarm.start_slot(state)
    swarm.run()
    for node in swarm.nodes.values():
        for machine in node.machines:
            if isinstance(machine, SeatMachine):
                assert not machine.checks[0].commitments._asked


def judged() -> tuple[Swarm, SeatMachine]:
    swarm = swarm_of()
    swarm.start_slot(state_at())
    swarm.run()
    machine = swarm.nodes[SEATS[0].public_key].machines[0]
    assert isinstance(machine, SeatMachine)
    return swarm, machine


def second_commit(machine: SeatMachine, signer: object = WORKER) -> bytes:
    commit = machine.checks[0].commit
    assert commit is not None
    return seal(replace(commit, roots=(bytes(32), *commit.roots[1:])), signer, NETWORK)  # type: ignore[arg-type]


def test_a_second_commitment_in_anybodys_evidence_is_evidence_once() -> None:
    _, machine = judged()
    wrong = WrongResult(decode(Signed, second_commit(machine)), 0, 0, b"", ())
    event = do.Gossip("evidence", wrong, b"", 0.0)
    publish, note = machine.step(event, 0.0)
    assert isinstance(publish, do.Publish) and isinstance(note, do.Note)
    assert verify_evidence(decode(DoubleCommit, publish.payload), context_of(state_at())) == WORKER.public_key
    assert machine.step(event, 0.0) == []


def test_instead_of_tags_a_second_commitment() -> None:
    _, machine = judged()
    check = machine.checks[0]
    check.stage = Stage.COMMITTED
    actions = machine.step(do.Answer(f"chal/{check.name}/0", second_commit(machine), 0.0), 0.0)
    assert isinstance(actions[0], do.Publish) and actions[0].topic == "evidence"


@pytest.mark.parametrize("payload", [b"", REFUSED, b"\xff" * 50, encode(CommitRequest(SLOT, WORKER.public_key))])
def test_an_answer_that_shows_nothing_accuses_nobody(payload: bytes) -> None:
    _, machine = judged()
    assert machine.step(do.Answer(f"commit/{machine.checks[0].name}/1", payload, 0.0), 0.0) == []


def test_somebody_elses_signature_accuses_nobody() -> None:
    _, machine = judged()
    forged = second_commit(machine, keys_of("somebody"))
    assert machine.step(do.Answer(f"commit/{machine.checks[0].name}/1", forged, 0.0), 0.0) == []


def test_a_commitment_is_shown_to_the_committee_only() -> None:
    _, machine = judged()
    request = encode(CommitRequest(SLOT, WORKER.public_key))
    for peer, shown in ((SEATS[3].public_key, True), (keys_of("somebody").public_key, False)):
        (reply,) = machine.step(do.Incoming(1, peer, VOTE_PROTOCOL, request, 0.0), 0.0)
        assert isinstance(reply, do.Reply)
        assert (reply.payload != REFUSED) is shown
        if shown:
            assert isinstance(decode(Commit, decode(Signed, reply.payload).body), Commit)
    unknown = encode(CommitRequest(SLOT + 1, WORKER.public_key))
    assert machine.step(do.Incoming(1, SEATS[3].public_key, VOTE_PROTOCOL, unknown, 0.0), 0.0) == [do.Reply(1, REFUSED)]
