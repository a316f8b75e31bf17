"""A small world for leases: client, worker and seven seats back to back in virtual time, with real keys."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest
from immutables import Map

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Signed, open_signed, seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.actions import (
    Action,
    Answer,
    BlockApplied,
    ContainerReport,
    Deploy,
    Event,
    Gossip,
    Incoming,
    Note,
    Probe,
    ProbeReport,
    Publish,
    Reply,
    Request,
    RequestEnded,
    Stop,
    Store,
    Submit,
    Wake,
)
from protocols.adverts import CPU_CLASS, Spec
from protocols.deploy import (
    LEASE_TOPIC,
    STATE_NAMES,
    LeaseEvent,
    validate_lease,
)
from protocols.digests import offer_hash, spec_hash, workload_hash
from protocols.equivocation import validate_evidence
from protocols.interpreter.calls import OrderCancel, parse_payload
from protocols.interpreter.events import LeaseSettled, LedgerEvent, OrderEnded, OrderPlaced, SlotStarted
from protocols.interpreter.state import (
    ACTIVE,
    ORDER_CANCELLED,
    ORDER_CLOSED,
    ORDER_OPEN,
    MachineState,
    OrderState,
    State,
    WorkerState,
)
from protocols.lease_client import RUNNING_TEXT, LeaseClientMachine
from protocols.lease_witness import LeaseSeatMachine
from protocols.lease_worker import LeaseWorkerMachine
from protocols.machine import Machine
from protocols.offers import Hold, Holds, OfferMachine
from protocols.orders import Offer, OfferRequest, OrderSpec, Workload
from protocols.params import DEMO
from protocols.popw import validate_certificate
from protocols.quorum import QuorumCertificate, WitnessCore

NETWORK = sha256(b"leases").digest()
PARAMS = DEMO
START_MS = 1_790_000_000_000
OWNER = bytes(31) + b"\1"
CLIENT_OWNER = bytes(31) + b"\2"
SPEC = Spec(CPU_CLASS, 2, 1024, 1024, 0, 0, "")
WORKLOAD = Workload("", ("serve", "{port:8080}"), (), (8080,))
BLOCK_S = PARAMS.block_ms / 1000
SLOT_S = PARAMS.slot_ms / 1000
VALIDATE: dict[str, Callable[[bytes, float, State], tuple[Verdict, str, Any]]] = {
    LEASE_TOPIC: validate_lease,
    "certificate": validate_certificate,
    "evidence": validate_evidence,
}


def keys_of(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(name.encode()).digest())


SEATS = tuple(keys_of(f"seat {number}") for number in range(7))
WORKER, CLIENT, STRANGER = keys_of("worker"), keys_of("client"), keys_of("stranger")


@dataclass
class Peer:
    """One node: its machines, its journal, its store, and whether it is up."""

    name: str
    keys: KeyPair
    make: Callable[[Peer], list[Machine]]
    up: bool = True
    deaf: bool = False
    lag_s: float = 0.0
    machines: list[Machine] = field(default_factory=list)
    duties: dict[str, bytes] = field(default_factory=dict)
    items: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    did: list[Action] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def stored(self, kind: str) -> list[tuple[bytes, bytes]]:
        return list(self.items.get(kind, {}).items())

    def done(self, kind: type[Any]) -> list[Any]:
        return [action for action in self.did if isinstance(action, kind)]


class World:
    """A ledger, gossip, streams, tunnels and containers, all of them simulated; every message is validated."""

    validate = VALIDATE

    def __init__(self, *, duration_s: int = 60, with_ticket_seats: int = 7) -> None:
        self.now = START_MS / 1000
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        self.calls: dict[int, tuple[Peer, Request]] = {}
        self.containers: dict[bytes, str] = {}
        self.program = "healthy"
        self.deploys = 0
        self.published: list[tuple[str, bytes]] = []
        self.rejected: list[tuple[str, str]] = []
        self.to_cancel: set[bytes] = set()
        self.duration_s = duration_s
        workers = Map({WORKER.public_key: WorkerState(OWNER, SPEC, 3600, 1, ACTIVE, 0)})
        machines = Map({keys.public_key: MachineState(OWNER, 7, 0) for keys in (*SEATS, WORKER, CLIENT)})
        self.state = State(NETWORK, PARAMS, number=5, time_ms=START_MS, workers=workers, machines=machines)
        self.holds = Holds()
        self.order = b""
        self.worker = self.add("worker", WORKER, self._worker_machines)
        self.client = self.add("client", CLIENT, lambda peer: [
            LeaseClientMachine(CLIENT, NETWORK, peer.stored("order"))
        ])  # fmt: skip
        self.seats = [
            self.add(f"seat {number}", keys, self._seat_machines)
            for number, keys in enumerate(SEATS[:with_ticket_seats])
        ]
        self.peers = [self.worker, self.client, *self.seats]
        self.later(BLOCK_S, self.next_block)

    def _worker_machines(self, peer: Peer) -> list[Machine]:
        leases = LeaseWorkerMachine(WORKER, NETWORK, self.holds, peer.stored("lease"), peer.stored("workload"))
        return [OfferMachine(WORKER, self.holds, runtime="process", max_leases=8), leases]

    def _seat_machines(self, peer: Peer) -> list[Machine]:
        counter = itertools.count()

        def entropy(size: int) -> bytes:
            return sha256(f"{peer.name} {next(counter)}".encode()).digest()[:size]

        return [LeaseSeatMachine(peer.keys, entropy, peer.stored("watch"))]

    def add(self, name: str, keys: KeyPair, make: Callable[[Peer], list[Machine]]) -> Peer:
        peer = Peer(name, keys, make)
        peer.machines = make(peer)
        self.feed(peer, BlockApplied(self.state, ()))
        return peer

    # ── time and the ledger ──────────────────────────────────────────────────────────────────────────────────────────

    def later(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now + delay_s, next(self.count), do))

    def run(self, seconds: float) -> World:
        end = self.now + seconds
        while self.heap and self.heap[0][0] <= end:
            self.now, _, do = heapq.heappop(self.heap)
            do()
        self.now = end
        return self

    def until(self, true: Callable[[], object], *, within_s: float = 60) -> World:
        end = self.now + within_s
        while not true():
            assert self.heap and self.heap[0][0] <= end, "it did not happen in time"
            self.now, _, do = heapq.heappop(self.heap)
            do()
        return self

    def next_block(self, *events: LedgerEvent, again: bool = True) -> None:
        number, time_ms = self.state.number + 1, round(self.now * 1000)
        state = replace(self.state, number=number, time_ms=time_ms, block_hash=number.to_bytes(32, "big"))
        told = list(events)
        if number % PARAMS.slot_blocks == 0:
            slot = PARAMS.slot_of(number)
            state = replace(state, beacons=state.beacons.set(slot, state.block_hash))
            told.insert(0, SlotStarted(slot))
        for order_id in sorted(self.to_cancel):
            order = state.orders[order_id]
            if order.status == ORDER_OPEN:
                ended = replace(order, status=ORDER_CANCELLED, ended_block=number)
                state = replace(state, orders=state.orders.set(order_id, ended))
                told.append(OrderEnded(order_id))
        self.to_cancel.clear()
        self.state = state
        applied = BlockApplied(state, tuple(told))
        for peer in self.peers:
            if peer.lag_s:
                self.later(peer.lag_s, lambda peer=peer: self.feed(peer, applied))
            else:
                self.feed(peer, applied)
        if again:
            self.later(BLOCK_S, self.next_block)

    def place(self, *, held: bool = True, seats: tuple[KeyPair, ...] = SEATS) -> bytes:
        """An order as the ledger would have it, for an offer that the worker holds (or has forgotten)."""
        spec = OrderSpec(
            replace(SPEC, cpu_cores=1, memory_mb=256, disk_mb=64), self.duration_s, workload_hash(WORKLOAD, NETWORK)
        )
        nonce = next(self.count).to_bytes(32, "big")
        valid_ms = round(self.now * 1000) + 8000
        offer = Offer(WORKER.public_key, CLIENT.public_key, spec_hash(spec, NETWORK), 3600, valid_ms, nonce)
        envelope = seal(offer, WORKER, NETWORK)
        if held:
            request = OfferRequest(CLIENT.public_key, spec, WORKLOAD, nonce)
            self.holds.add(Hold(request, offer, envelope, self.now + 10), NETWORK)
        client = next(m for m in self.client.machines if isinstance(m, LeaseClientMachine))
        self.perform(self.client, client.prepare(open_signed(Offer, envelope, NETWORK), spec, WORKLOAD))
        order_id = sha256(nonce).digest()
        order = OrderState(
            client=CLIENT_OWNER,
            client_key=CLIENT.public_key,
            worker=WORKER.public_key,
            worker_owner=OWNER,
            spec_hash=offer.spec_hash,
            resources=spec.resources,
            offer_hash=offer_hash(offer, NETWORK),
            price_planck_per_hour=3600,
            duration_s=self.duration_s,
            escrow_planck=self.duration_s,
            locked_planck=self.duration_s,
            points_planck=0,
            placed_block=self.state.number + 1,
            placed_ms=round(self.now * 1000),
            seats=tuple(keys.public_key for keys in seats),
            threshold=5,
        )
        known = self.state.open_orders.get(WORKER.public_key, ())
        self.state = replace(
            self.state,
            orders=self.state.orders.set(order_id, order),
            open_orders=self.state.open_orders.set(WORKER.public_key, (*known, order_id)),
        )
        self.next_block(OrderPlaced(order_id), again=False)
        return order_id

    def settle(self, order_id: bytes, outcome: int) -> None:
        order = replace(self.state.orders[order_id], status=ORDER_CLOSED, outcome=outcome)
        left = tuple(each for each in self.state.open_orders[order.worker] if each != order_id)
        self.state = replace(
            self.state,
            orders=self.state.orders.set(order_id, order),
            open_orders=self.state.open_orders.set(order.worker, left),
        )
        settled = LeaseSettled(order_id, 10, 5, 0, closed=True)
        self.next_block(settled, OrderEnded(order_id), again=False)

    # ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def feed(self, peer: Peer, event: Event) -> None:
        if not peer.up:
            return
        for machine in list(peer.machines):
            self.perform(peer, machine.step(event, self.now))
        self.schedule(peer)

    def schedule(self, peer: Peer) -> None:
        for machine in peer.machines:
            if machine.deadline is not None:
                self.later(max(0.0, machine.deadline - self.now), lambda machine=machine: self.wake(peer, machine))

    def wake(self, peer: Peer, machine: Machine) -> None:
        if peer.up and machine in peer.machines and machine.deadline is not None and machine.deadline <= self.now:
            self.perform(peer, machine.step(Wake(), self.now))
            assert machine.deadline is None or machine.deadline > self.now, f"{machine} does not let go"
            self.schedule(peer)

    def kill(self, peer: Peer) -> None:
        peer.up, peer.machines = False, []

    def start(self, peer: Peer) -> None:
        peer.up, peer.machines = True, peer.make(peer)
        self.feed(peer, BlockApplied(self.state, ()))
        if peer is self.worker:
            for order_id, phase in list(self.containers.items()):
                self.later(0.1, lambda order_id=order_id: self.report(order_id, "started"))
                if phase == "healthy":
                    self.later(0.2, lambda order_id=order_id: self.report(order_id, "healthy"))

    def perform(self, peer: Peer, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Store):
                peer.items.setdefault(action.kind, {})[action.key] = action.value
            duty = getattr(action, "duty", None)
            if duty is not None and peer.duties.setdefault(duty.key, duty.digest) != duty.digest:
                peer.refused.append(duty.key)
        for action in actions:
            duty = getattr(action, "duty", None)
            if duty is None or duty.key not in peer.refused:
                peer.did.append(action)
                self.do(peer, action)

    def do(self, peer: Peer, action: Action) -> None:
        match action:
            case Note():
                peer.notes.append(action)
            case Publish():
                self.published.append((action.topic, action.payload))
                for other in self.peers:
                    if other is peer or not (peer.deaf or other.deaf):
                        self.later(0.02, lambda other=other: self.gossip(peer, other, action.topic, action.payload))
            case Request():
                self.later(0.02, lambda: self.request(peer, action))
            case Reply():
                asker, request = self.calls.pop(action.call_id)
                self.later(0.02, lambda: self.feed(asker, Answer(request.request_id, action.payload, self.now)))
                self.later(0.03, lambda: self.feed(asker, RequestEnded(request.request_id, "")))
            case Probe():
                answered = self.worker.up and not self.worker.deaf and not peer.deaf
                up = answered and self.containers.get(action.order_id) == "healthy"
                report = ProbeReport(action.probe_id, up, "" if up else "refused", answered, local=peer.deaf)
                self.later(0.05 if up else action.deadline_s, lambda: self.feed(peer, report))
            case Deploy():
                self.deploys += 1
                self.later(0.1, lambda: self.run_program(action.order_id))
            case Stop():
                self.containers.pop(action.order_id, None)
            case Submit():
                call = parse_payload(action.payload)
                assert isinstance(call, OrderCancel)
                self.to_cancel.add(call.order_id)
            case _:
                pass

    def gossip(self, sender: Peer, receiver: Peer, topic: str, payload: bytes) -> None:
        verdict, reason, message = VALIDATE[topic](payload, self.now, self.state)
        if verdict is Verdict.ACCEPT:
            self.feed(receiver, Gossip(topic, message, sender.keys.public_key, self.now))
        elif verdict is Verdict.REJECT:
            self.rejected.append((topic, reason))

    def request(self, peer: Peer, request: Request) -> None:
        target = next((each for each in self.peers if each.keys.public_key == request.peer), None)
        if target is None or not target.up or target.deaf or peer.deaf:
            ended = RequestEnded(request.request_id, "no known address answers")
            self.later(0.1, lambda: self.feed(peer, ended))
            return
        call_id = next(self.count)
        self.calls[call_id] = (peer, request)
        self.feed(target, Incoming(call_id, peer.keys.public_key, request.protocol, request.payload, self.now))

    def ask(self, sender: KeyPair, target: Peer, protocol: str, payload: bytes) -> bytes | None:
        """A request from outside; the answer's frame, or None when there was none."""
        outside = Peer("outside", sender, lambda _: [])
        call_id = next(self.count)
        self.calls[call_id] = (outside, Request("outside", target.keys.public_key, protocol, payload, 1.0))
        before = len(target.did)
        self.feed(target, Incoming(call_id, sender.public_key, protocol, payload, self.now))
        replies = [a for a in target.did[before:] if isinstance(a, Reply) and a.call_id == call_id]
        return replies[0].payload if replies else None

    # ── containers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def run_program(self, order_id: bytes) -> None:
        if self.program.startswith("failed"):
            self.report(order_id, "failed", self.program.removeprefix("failed ").strip())
            return
        self.containers[order_id] = "started"
        self.report(order_id, "started")
        if self.program == "healthy":
            self.later(0.3, lambda: self.becomes(order_id, "healthy"))

    def becomes(self, order_id: bytes, phase: str, detail: str = "") -> None:
        self.containers[order_id] = phase
        self.report(order_id, phase, detail)

    def report(self, order_id: bytes, phase: str, detail: str = "") -> None:
        self.feed(self.worker, ContainerReport(order_id, phase, detail))

    # ── what was observed ────────────────────────────────────────────────────────────────────────────────────────────

    def texts(self, key: str = "text") -> list[str]:
        return [str(dict(note.data)[key]) for note in self.client.notes if key in dict(note.data)]

    def events(self) -> list[LeaseEvent]:
        found = []
        for topic, payload in self.published:
            if topic == LEASE_TOPIC and payload[1] == Signed.TAG:  # type: ignore[attr-defined]
                found.append(open_signed(LeaseEvent, payload, NETWORK).message)
        return found

    def certificates(self, kind: type[Any]) -> list[Any]:
        found = []
        for _, payload in self.published:
            if payload[1] == QuorumCertificate.TAG:  # type: ignore[attr-defined]
                core = decode(QuorumCertificate, payload).core
                if isinstance(core, kind):
                    found.append(core)
        return found

    def windows(self, status: int) -> list[int]:
        return sorted({core.slot for core in self.certificates(WitnessCore) if core.status == status})

    def worker_state(self) -> str:
        machine = next(m for m in self.worker.machines if isinstance(m, LeaseWorkerMachine))
        return STATE_NAMES[machine.leases[0].state] if machine.leases else "none"

    def client_lease(self) -> Any:
        machine = next(m for m in self.client.machines if isinstance(m, LeaseClientMachine))
        return machine.leases[0]

    def running(self, **options: Any) -> bytes:
        """Place an order and wait until its client reads that it runs."""
        order_id = self.place(**options)
        self.until(lambda: RUNNING_TEXT in self.texts(), within_s=20)
        return order_id

    def signed_by(self, keys: tuple[KeyPair, ...], core: Any) -> QuorumCertificate:
        seats = [SEATS.index(each) if each in SEATS else 0 for each in keys]
        signatures = tuple(each.sign(core.DOMAIN, NETWORK, encode(core)) for each in keys)
        return QuorumCertificate(core, sum(1 << seat for seat in set(seats)), signatures)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    assert not world.rejected, "an honest node's message was rejected"
    assert not any(peer.refused for peer in world.peers), "a duty was signed twice"
    assert not [d for topic, d in world.published if topic == "evidence"], "an honest node was accused"


@pytest.fixture
def hostile_world() -> World:
    """A world in which something may be rejected."""
    return World()


@pytest.fixture(scope="session")
def ready_world() -> World:
    """One lease runs; for tests that only look."""
    world = World()
    world.order = world.running()
    return world
