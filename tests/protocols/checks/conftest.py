"""A small world for checks: seats and worker back to back in virtual time, with real keys and real proofs."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from immutables import Map

from kaisar_p2p.hardware.prove import NumpyBackend
from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.codec import decode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.verdict import Verdict
from protocols import actions as do
from protocols import equivocation as proofs
from protocols import popw
from protocols.adverts import GPU_CLASS, Spec
from protocols.committees import check_committee, verify_certificate
from protocols.due import is_grand_slot
from protocols.interpreter.calls import CHECKER, PROVIDER
from protocols.interpreter.events import SlotStarted
from protocols.interpreter.state import ACTIVE, MachineState, State, WorkerState
from protocols.machine import Machine
from protocols.params import DEMO
from protocols.popw_seat import SeatMachine
from protocols.popw_worker import WorkerCheckMachine, WorkerFaults
from protocols.quorum import QuorumCertificate, VerdictCore

NETWORK = sha256(b"test network").digest()
PARAMS = replace(DEMO, job_n=64, job_k=64, job_tile=32, job_rounds=1, standby_check_permille=1000)
SPEC = Spec(GPU_CLASS, 8, 32_000, 100_000, 1, 24_000, "RTX 4090")
SLOT = 9
DELAY_S = 0.03
PROVE_S = 0.5
CHECK_S = 0.05
VALIDATE: dict[str, Callable[..., Any]] = {
    "certificate": popw.validate_certificate,
    "assignment": popw.validate_assignment,
    "evidence": proofs.validate_evidence,
}


def keys_of(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(name.encode()).digest())


SEATS = [keys_of(f"seat {index}") for index in range(7)]
WORKER = keys_of("worker")


def state_at(slot: int = SLOT, status: int = ACTIVE, checkers: list[KeyPair] = SEATS) -> State:
    owner = bytes(32)
    first = slot * PARAMS.slot_blocks
    machines = {seat.public_key: MachineState(owner, CHECKER, 1) for seat in checkers}
    return State(
        NETWORK,
        PARAMS,
        number=first,
        machines=Map({**machines, WORKER.public_key: MachineState(owner, PROVIDER, 1)}),
        workers=Map({WORKER.public_key: WorkerState(owner, SPEC, 1, 0, status, first - 1)}),
        registries=Map({PARAMS.epoch_of_slot(slot): tuple(sorted((seat.public_key, 10**20) for seat in checkers))}),
        beacons=Map({each: sha256(b"beacon %d" % each).digest() for each in (slot - 1, slot)}),
    )


@dataclass
class Node:
    machines: list[Machine]
    duties: dict[str, bytes] = field(default_factory=dict)
    notes: list[do.Note] = field(default_factory=list)
    state: State | None = None


class Swarm:
    """Nodes, one clock, and a network with a fixed delay; `dead` nodes cannot be reached."""

    def __init__(self, nodes: dict[bytes, Node]) -> None:
        self.nodes = nodes
        self.now = 1_000_000.0
        self.dead: set[bytes] = set()
        self.published: list[tuple[str, bytes, bytes]] = []
        self._queue: list[tuple[float, int, bytes, do.Event]] = []
        self._calls: dict[int, tuple[bytes, str]] = {}
        self._open: dict[tuple[bytes, str], int] = {}
        self._count = 0

    def put(self, at: float, node: bytes, event: do.Event) -> None:
        self._count += 1
        heapq.heappush(self._queue, (at, self._count, node, event))

    def start_slot(self, state: State, delays: dict[bytes, float] | None = None) -> None:
        for key, node in self.nodes.items():
            node.state = state
            event = do.BlockApplied(state, (SlotStarted(state.slot),))
            self.put(self.now + (delays or {}).get(key, 0.0), key, event)

    def run(self, seconds: float = 60.0) -> None:
        end = self.now + seconds
        while True:
            alive = [(key, each) for key, node in self.nodes.items() if key not in self.dead for each in node.machines]
            wakes = [(machine.deadline, key) for key, machine in alive if machine.deadline is not None]
            wake = min(wakes, default=(float("inf"), b""))
            head = self._queue[0][0] if self._queue else float("inf")
            at = min(wake[0], head)
            if at > end:
                self.now = end
                return
            self.now = max(self.now, at)
            if head <= wake[0]:
                _, _, key, event = heapq.heappop(self._queue)
                if isinstance(event, do.RequestEnded) and (key, event.request_id) not in self._open:
                    continue  # it had ended before
                if isinstance(event, do.RequestEnded):
                    del self._open[key, event.request_id]
                self.step(key, event)
            else:
                self.step(wake[1], do.Wake())

    def step(self, key: bytes, event: do.Event) -> None:
        if key in self.dead:
            return
        node = self.nodes[key]
        actions = [action for machine in node.machines for action in machine.step(event, self.now)]
        for action in actions:
            duty = getattr(action, "duty", None)
            if duty is None or node.duties.setdefault(duty.key, duty.digest) == duty.digest:
                self.carry_out(key, node, action)

    def carry_out(self, key: bytes, node: Node, action: do.Action) -> None:
        match action:
            case do.Request():
                self._request(key, action)
            case do.Reply():
                self._reply(action)
            case do.Compute(work_id=work_id, task=do.ProveTask() as task):
                proof = NumpyBackend().prove(task.job, task.seed)
                self.put(self.now + PROVE_S, key, do.WorkDone(work_id, proof))
            case do.Compute(work_id=work_id, task=do.CheckTask() as task):
                tags = [matproof.tags_from_bytes(task.job, sent) for sent in task.tags]
                result = matproof.check(task.job, task.seed, task.roots, tags, task.randomness, task.samples)
                self.put(self.now + CHECK_S, key, do.WorkDone(work_id, result))
            case do.Publish():
                self._publish(key, action)
            case do.Note():
                node.notes.append(action)
            case _:
                raise AssertionError(action)

    def _request(self, key: bytes, action: do.Request) -> None:
        self._count += 1
        call = self._count
        self._calls[call], self._open[key, action.request_id] = (key, action.request_id), call
        if action.peer in self.dead:
            self.put(self.now + DELAY_S, key, do.RequestEnded(action.request_id, "unreachable"))
            return
        event = do.Incoming(call, key, action.protocol, action.payload, self.now + DELAY_S)
        self.put(self.now + DELAY_S, action.peer, event)
        self.put(self.now + action.deadline_s, key, do.RequestEnded(action.request_id, "timed out"))

    def _reply(self, action: do.Reply) -> None:
        key, request_id = self._calls[action.call_id]
        at = self.now + DELAY_S
        self.put(at, key, do.Answer(request_id, action.payload, at))
        if action.last:
            self.put(at, key, do.RequestEnded(request_id, ""))

    def _publish(self, key: bytes, action: do.Publish) -> None:
        self.published.append((action.topic, key, action.payload))
        for other, node in self.nodes.items():
            verdict, reason, message = VALIDATE[action.topic](action.payload, self.now, node.state)
            assert verdict is Verdict.ACCEPT, (action.topic, reason)
            at = self.now + (0 if other == key else DELAY_S)
            self.put(at, other, do.Gossip(action.topic, message, key, at))

    def topic(self, name: str) -> list[bytes]:
        return [payload for topic, _, payload in self.published if topic == name]

    def certificates(self) -> list[QuorumCertificate]:
        return [decode(QuorumCertificate, payload) for payload in self.topic("certificate")]


def seat_machine(keys: KeyPair) -> SeatMachine:
    counter = iter(range(10**6))
    return SeatMachine(keys, lambda n: sha256(keys.public_key + b"%d" % next(counter)).digest()[:n])


def swarm_of(faults: WorkerFaults | None = None, seats: list[KeyPair] = SEATS) -> Swarm:
    nodes = {keys.public_key: Node([seat_machine(keys)]) for keys in seats}
    nodes[WORKER.public_key] = Node([WorkerCheckMachine(WORKER, faults)])
    return Swarm(nodes)


def verdict_of(swarm: Swarm, state: State) -> int:
    """The verdict of all certificates, which must agree and verify."""
    certificates = swarm.certificates()
    assert certificates
    committee = check_committee(state, state.slot, WORKER.public_key)
    assert committee is not None
    assert all(verify_certificate(certificate, committee, NETWORK) for certificate in certificates)
    (core,) = {certificate.core for certificate in certificates}
    assert isinstance(core, VerdictCore)
    return core.verdict


def order_of(state: State) -> tuple[bytes, ...]:
    committee = check_committee(state, state.slot, WORKER.public_key)
    assert committee is not None
    return popw.aggregators(committee, state.beacons[state.slot], WORKER.public_key, NETWORK)


def at_slot(slot: int) -> State:
    """A state in which the rule names nobody, also in what would be a grand slot."""
    state = replace(state_at(slot), params=replace(PARAMS, standby_check_permille=0))
    epoch = state.params.epoch_of_slot(slot)
    mixes = (Map({epoch: bytes([index])}) for index in range(256))
    return next(each for mix in mixes if not is_grand_slot(each := replace(state, mixes=mix), slot))
