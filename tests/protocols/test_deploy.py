"""Leases from order to end: client, worker and seven seats back to back in virtual time, with real keys."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
    AUTHORISED,
    CANCELLED,
    COMPLETED,
    DEGRADED,
    DEPLOY_PROTOCOL,
    DEPLOYING,
    DOWN,
    ENDED,
    EXPIRED,
    FAILED,
    LEASE_TOPIC,
    OPEN,
    OUTCOME_NAMES,
    PLACED,
    REASONS,
    RUNNING,
    STATE_NAMES,
    UP,
    DeployOrder,
    DeployReply,
    LeaseEvent,
    ticket_of,
    validate_lease,
)
from protocols.digests import offer_hash, spec_hash, workload_hash
from protocols.equivocation import DoubleVote, validate_evidence
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
from protocols.lease import TRANSITIONS, Signal
from protocols.lease_client import DEPLOYING_TEXT, RUNNING_TEXT, LeaseClientMachine
from protocols.lease_votes import aggregators
from protocols.lease_witness import LeaseSeatMachine
from protocols.lease_worker import ADOPT_S, LeaseWorkerMachine
from protocols.machine import Machine
from protocols.offers import Hold, Holds, OfferMachine
from protocols.orders import Offer, OfferRequest, OrderSpec, Workload
from protocols.params import DEMO
from protocols.popw import VOTE_PROTOCOL, validate_certificate
from protocols.quorum import CoreVote, QuorumCertificate, ReadyCore, TicketCore, WitnessCore

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
        return [OfferMachine(WORKER, self.holds, runtime="process"), leases]

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
        if PARAMS.starts_slot(number):
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
                up = self.worker.up and not self.worker.deaf and self.containers.get(action.order_id) == "healthy"
                report = ProbeReport(action.probe_id, up, "" if up else "refused")
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


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    assert not world.rejected, "an honest node's message was rejected"
    assert not any(peer.refused for peer in world.peers), "a duty was signed twice"
    assert not [d for topic, d in world.published if topic == "evidence"], "an honest node was accused"


def running(world: World, **options: Any) -> bytes:
    order_id = world.place(**options)
    world.until(lambda: RUNNING_TEXT in world.texts(), within_s=20)
    return order_id


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_starts_nothing_without_a_ticket_and_has_no_way_out_of_ended() -> None:
    assert {state for (state, signal) in TRANSITIONS if signal is Signal.WORKLOAD} == {AUTHORISED}
    assert {after for (state, _), after in TRANSITIONS.items() if state == PLACED} == {AUTHORISED, ENDED}
    assert not [state for (state, _) in TRANSITIONS if state == ENDED]
    assert set(TRANSITIONS.values()) <= set(STATE_NAMES)


# ── the way it should go ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_runs_and_the_client_reads_the_two_lines(world: World) -> None:
    order_id = running(world)
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


def test_every_window_is_witnessed_until_the_time_is_over_then_the_lease_expires(world: World) -> None:
    running(world)
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


def test_probes_come_at_different_moments_and_early_in_the_window(world: World) -> None:
    running(world)
    world.until(lambda: world.state.slot > 3 and PARAMS.starts_slot(world.state.number))
    start = world.now
    moments = []
    original = world.do

    def note_moment(peer: Peer, action: Action) -> None:
        if isinstance(action, Probe):
            moments.append((world.now - start) * 1000)
        original(peer, action)

    world.do = note_moment  # type: ignore[method-assign]
    world.run(SLOT_S - 0.01)
    assert len(set(moments)) == 7
    assert all(0.1 * PARAMS.slot_ms - 1 <= moment <= 0.3 * PARAMS.slot_ms + 1 for moment in moments)


def test_cancelling_stops_the_container_and_the_witnesses(world: World) -> None:
    order_id = running(world)
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


def test_a_worker_that_forgot_the_workload_gets_it_from_the_client(world: World) -> None:
    running(world, held=False)
    assert world.deploys == 1
    assert any(r.protocol == DEPLOY_PROTOCOL for r in world.client.done(Request))


def test_two_dead_aggregators_do_not_stop_a_lease(world: World) -> None:
    order_id = sha256((0).to_bytes(32, "big")).digest()
    world.count = itertools.count()
    ranked = aggregators(tuple(keys.public_key for keys in SEATS), order_id, NETWORK)
    for seat in world.seats:
        if seat.keys.public_key in ranked[:2]:
            world.kill(seat)
    assert running(world) == order_id
    world.run(3 * SLOT_S)
    assert world.windows(UP)


def test_aggregators_that_are_blocks_behind_count_the_votes_later(world: World) -> None:
    order_id = sha256((0).to_bytes(32, "big")).digest()
    world.count = itertools.count()
    ranked = aggregators(tuple(keys.public_key for keys in SEATS), order_id, NETWORK)
    for seat in world.seats:
        seat.lag_s = 4.0 if seat.keys.public_key in ranked[:2] else 3.0
    world.worker.lag_s = 3.5
    assert running(world) == order_id
    world.run(4 * SLOT_S)
    assert len(world.windows(UP)) >= 2


def test_two_orders_at_once_do_not_mix(world: World) -> None:
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
    world: World, program: str, reason: str
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
    world: World, code: str, outcome: int, reason: str
) -> None:
    order_id = running(world)
    world.becomes(order_id, "exited", code)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (outcome, reason)
    assert not world.worker.done(Stop)
    world.run(3 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert [stop.order_id for stop in world.worker.done(Stop)] == [order_id]


def test_a_program_that_never_listens_is_not_ready_and_everybody_gives_up(world: World) -> None:
    world.program = "silent"
    order_id = world.place()
    world.run(PARAMS.deploy_timeout_ms / 1000 + 1)
    assert not world.certificates(ReadyCore)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, "deploy-timeout")
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert world.client_lease().reason == "deploy-timeout"


def test_degraded_and_back(world: World) -> None:
    order_id = running(world)
    world.run(0.5)
    world.report(order_id, "unhealthy", "port 8080")
    assert world.worker_state() == "DEGRADED"
    world.report(order_id, "healthy")
    assert world.worker_state() == "RUNNING"
    assert [event.state for event in world.events()[-2:]] == [DEGRADED, RUNNING]


# ── nobody is believed ───────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_quorum_nothing_runs_and_the_order_ends(world: World) -> None:
    for seat in world.seats[:3]:
        world.kill(seat)
    order_id = world.place()
    world.run(PARAMS.deploy_timeout_ms / 1000 + 3 * SLOT_S)
    assert world.deploys == 0
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, "no-ticket")
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert world.client_lease().reason == "no-ticket"


def _signed_by(keys: tuple[KeyPair, ...], core: Any) -> QuorumCertificate:
    seats = [SEATS.index(each) if each in SEATS else 0 for each in keys]
    signatures = tuple(each.sign(core.DOMAIN, NETWORK, encode(core)) for each in keys)
    return QuorumCertificate(core, sum(1 << seat for seat in set(seats)), signatures)


def test_forged_tickets_are_refused(world: World) -> None:
    for seat in world.seats:
        world.kill(seat)
    order_id = world.place()
    order = world.state.orders[order_id]
    ticket = ticket_of(order_id, order)
    good = _signed_by(SEATS[:5], ticket)
    other_network = tuple(keys.sign(ticket.DOMAIN, bytes(32), encode(ticket)) for keys in SEATS[:5])
    forged = [
        _signed_by(SEATS[:4], ticket),
        _signed_by(tuple(keys_of(f"nobody {number}") for number in range(5)), ticket),
        _signed_by(SEATS[:5], replace(ticket, offer_hash=bytes(32))),
        _signed_by(SEATS[:5], replace(ticket, client_key=STRANGER.public_key)),
        _signed_by(SEATS[:5], replace(ticket, worker=STRANGER.public_key)),
        _signed_by(SEATS[:5], replace(ticket, order_id=bytes(32))),
        _signed_by(SEATS[:5], ReadyCore(order_id, order.worker)),
        replace(good, mask=0b1111110),
        replace(good, signatures=other_network),
        replace(good, signatures=good.signatures[:1] * 5),
    ]
    for certificate in forged:
        answer = world.ask(CLIENT, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(certificate, (WORKLOAD,))))
        assert answer is not None
        assert decode(DeployReply, answer).accepted == 0
    for payload in (b"", b"\x93", bytes(100_000), encode(good)):
        answer = world.ask(CLIENT, world.worker, DEPLOY_PROTOCOL, payload)
        assert answer is not None
        assert decode(DeployReply, answer).accepted == 0
    assert world.deploys == 0
    assert world.worker_state() == "PLACED"
    answer = world.ask(CLIENT, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(good, ())))
    assert answer is not None
    assert decode(DeployReply, answer).accepted == 1


def test_another_workload_than_ordered_is_refused(world: World) -> None:
    for seat in world.seats:
        world.kill(seat)
    order_id = world.place(held=False)
    ticket = _signed_by(SEATS[2:], ticket_of(order_id, world.state.orders[order_id]))
    other = replace(WORKLOAD, command=("mine",))
    answer = world.ask(STRANGER, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(ticket, (other,))))
    assert answer is not None
    assert "not the workload" in decode(DeployReply, answer).text
    answer = world.ask(STRANGER, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(ticket, ())))
    assert answer is not None
    assert "not known here" in decode(DeployReply, answer).text
    assert world.deploys == 0
    assert world.worker_state() == "AUTHORISED"


def test_votes_of_strangers_wrong_seats_and_wrong_cores_are_refused(world: World) -> None:
    for seat in world.seats[1:]:
        world.kill(seat)
    order_id = world.place()
    ticket = ticket_of(order_id, world.state.orders[order_id])

    def vote(signer: KeyPair, seat: int, core: Any) -> bytes | None:
        signature = signer.sign(core.DOMAIN, NETWORK, encode(core))
        return world.ask(signer, world.seats[0], VOTE_PROTOCOL, encode(CoreVote(core, seat, signature)))

    assert vote(STRANGER, 1, ticket) == b"\0"
    assert vote(SEATS[1], 2, ticket) == b"\0"
    assert vote(SEATS[1], 1, replace(ticket, offer_hash=bytes(32))) == b"\0"
    assert vote(SEATS[1], 1, replace(ticket, order_id=bytes(32))) == b"\0"
    slot = world.state.slot
    assert vote(SEATS[1], 1, WitnessCore(order_id, ticket.worker, slot + 5, UP)) == b"\0"
    assert vote(SEATS[1], 1, WitnessCore(order_id, ticket.worker, slot, 3)) == b"\0"
    bad = encode(CoreVote(ticket, 1, bytes(64)))
    assert world.ask(SEATS[1], world.seats[0], VOTE_PROTOCOL, bad) == b"\0"
    assert vote(SEATS[1], 1, ticket) == b"\1"
    assert vote(SEATS[1], 1, ticket) == b"\1"
    # What is not a core vote is another machine's business.
    assert world.ask(SEATS[1], world.seats[0], VOTE_PROTOCOL, b"\x95\x19") is None


def test_two_statements_on_one_window_are_evidence() -> None:
    world = World()
    order_id = running(world)
    for status in (UP, DOWN):
        core = WitnessCore(order_id, WORKER.public_key, world.state.slot + 1, status)
        signature = SEATS[1].sign(core.DOMAIN, NETWORK, encode(core))
        world.ask(SEATS[1], world.seats[0], VOTE_PROTOCOL, encode(CoreVote(core, 1, signature)))
    evidence = [payload for topic, payload in world.published if topic == "evidence"]
    assert len(evidence) == 1
    assert decode(DoubleVote, evidence[0]).signer == SEATS[1].public_key


def test_a_workers_word_alone_does_not_make_a_lease_ready(world: World) -> None:
    world.program = "silent"
    order_id = world.place()
    world.run(2)
    # The worker claims health, and its tunnel leads nowhere.
    world.report(order_id, "healthy")
    world.run(6)
    assert not world.certificates(ReadyCore)
    assert RUNNING_TEXT not in world.texts()
    assert len(world.seats[0].done(Probe)) >= 3
    world.containers[order_id] = "healthy"  # it says so again, and now it is true
    world.until(lambda: RUNNING_TEXT in world.texts(), within_s=10)


# ── restarts and losses ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_dies_goes_down_in_three_windows_and_the_client_cancels(world: World) -> None:
    order_id = running(world)
    world.run(3 * SLOT_S)
    world.kill(world.worker)
    died = world.state.slot
    world.until(lambda: world.client_lease().state == ENDED, within_s=6 * SLOT_S)
    assert world.client_lease().reason == "worker-lost"
    assert len(world.windows(DOWN)) == PARAMS.unwitnessed_windows
    assert min(world.windows(DOWN)) in (died, died + 1)
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert REASONS["worker-lost"] in world.texts()


def test_a_worker_restarts_and_finds_its_container_again(world: World) -> None:
    order_id = running(world)
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
def test_a_worker_restarts_at_any_moment_of_a_deployment(world: World, moment_s: float) -> None:
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


def test_a_container_that_was_gone_after_a_restart_ends_the_lease(world: World) -> None:
    order_id = running(world)
    world.run(1)
    world.kill(world.worker)
    world.containers.clear()
    world.start(world.worker)
    world.run(ADOPT_S + 1)
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, "exited")
    world.run(2 * BLOCK_S)
    assert world.state.orders[order_id].status == ORDER_CANCELLED


def test_an_order_that_was_cancelled_while_the_worker_was_away_is_stopped(world: World) -> None:
    order_id = running(world)
    world.kill(world.worker)
    world.to_cancel.add(order_id)
    world.run(2)
    world.start(world.worker)
    world.run(1)
    assert not world.containers


def test_a_container_of_nobody_is_stopped(world: World) -> None:
    world.containers[b"x" * 32] = "started"
    world.report(b"x" * 32, "started")
    assert not world.containers


def test_seats_that_restart_go_on_witnessing(world: World) -> None:
    running(world)
    world.run(SLOT_S)
    for seat in world.seats:
        world.kill(seat)
        world.start(seat)
    before = world.state.slot
    world.run(4 * SLOT_S)
    assert set(range(before + 1, world.state.slot)) <= set(world.windows(UP))


def test_seats_that_restart_before_the_ticket_vote_the_same_again(world: World) -> None:
    world.place()
    for seat in world.seats:
        world.kill(seat)
        world.start(seat)
    world.until(lambda: RUNNING_TEXT in world.texts(), within_s=20)


@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.3, 0.6])
def test_a_client_that_dies_after_paying_comes_back_to_its_lease(world: World, moment_s: float) -> None:
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


def test_a_client_that_restarts_in_mid_lease_does_not_repeat_itself(world: World) -> None:
    running(world)
    world.kill(world.client)
    world.start(world.client)
    world.run(3 * SLOT_S)
    assert world.texts().count(RUNNING_TEXT) == 1
    assert world.client_lease().workload == WORKLOAD


# ── any bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────

READY_WORLD = World()
ORDER = running(READY_WORLD)


@given(st.binary(max_size=200))
def test_any_bytes_are_judged_and_never_raise(data: bytes) -> None:
    verdict, reason, message = validate_lease(data, READY_WORLD.now, READY_WORLD.state)
    assert verdict is not Verdict.ACCEPT
    assert reason
    assert message is None


@given(st.integers(0, len(READY_WORLD.published) - 1), st.integers(0, 2000), st.integers(1, 255))
def test_a_changed_byte_is_never_accepted(which: int, at: int, change: int) -> None:
    topic, payload = READY_WORLD.published[which]
    changed = bytearray(payload)
    changed[at % len(changed)] ^= change
    verdict, _, _ = VALIDATE[topic](bytes(changed), READY_WORLD.now, READY_WORLD.state)
    assert verdict is not Verdict.ACCEPT


@given(
    st.sampled_from([DEPLOY_PROTOCOL, VOTE_PROTOCOL, "/kaisar/offer/1"]),
    st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: b"\x94\x1f\x95\x46" + tail)),
)
def test_any_request_is_answered_or_ignored(protocol: str, payload: bytes) -> None:
    for peer in (READY_WORLD.worker, READY_WORLD.seats[0], READY_WORLD.client):
        for machine in peer.machines:
            actions = machine.step(Incoming(1, STRANGER.public_key, protocol, payload, READY_WORLD.now), 0.0)
            assert all(isinstance(action, Reply) for action in actions)


@given(
    st.text(max_size=40),
    st.binary(max_size=40),
    st.sampled_from(["deliver/", "ticket/", "probe/", "handover/", "witness/", ""]),
)
def test_any_answer_is_ignored(request_id: str, payload: bytes, kind: str) -> None:
    for peer in READY_WORLD.peers:
        for machine in peer.machines:
            for event in (
                Answer(kind + request_id, payload, 0.0),
                RequestEnded(kind + request_id, "x"),
                ProbeReport(kind + request_id, True, ""),
            ):
                assert not [a for a in machine.step(event, READY_WORLD.now) if isinstance(a, Publish)]


# ── gossip on the topic `lease` ──────────────────────────────────────────────────────────────────────────────────────


def lease_event(**changes: Any) -> bytes:
    keys = changes.pop("keys", WORKER)
    event = LeaseEvent(ORDER, WORKER.public_key, 9, RUNNING, OPEN, "ready", "", int(READY_WORLD.now * 1000), 8080)
    return seal(replace(event, **changes), keys, NETWORK)


def judge(data: bytes, state: State | None = None) -> tuple[Verdict, str]:
    return validate_lease(data, READY_WORLD.now, state or READY_WORLD.state)[:2]


def test_gossip_lease__accept_event() -> None:
    assert judge(lease_event()) == (Verdict.ACCEPT, "")
    assert judge(lease_event(state=ENDED, outcome=FAILED, reason="exited"))[0] is Verdict.ACCEPT


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keys": STRANGER}, "impossible"),
        ({"worker": STRANGER.public_key, "keys": STRANGER}, "another worker"),
        ({"state": PLACED}, "impossible"),
        ({"state": 7}, "impossible"),
        ({"state": ENDED}, "impossible"),
        ({"outcome": FAILED}, "impossible"),
        ({"reason": "because"}, "impossible"),
        ({"sequence": 5000}, "impossible"),
    ],
)
def test_gossip_lease__reject_event(changes: dict[str, Any], reason: str) -> None:
    verdict, why = judge(lease_event(**changes))
    assert verdict is Verdict.REJECT
    assert reason in why


def test_gossip_lease__ignore_what_may_be_honest() -> None:
    assert judge(lease_event(order_id=bytes(32)))[0] is Verdict.IGNORE
    assert judge(lease_event(at_ms=int(READY_WORLD.now * 1000) + 3_600_000))[0] is Verdict.IGNORE
    closed = replace(READY_WORLD.state.orders[ORDER], status=ORDER_CLOSED)
    state = replace(READY_WORLD.state, orders=READY_WORLD.state.orders.set(ORDER, closed))
    assert judge(lease_event(), state)[0] is Verdict.IGNORE
    assert judge(lease_event(state=ENDED, outcome=COMPLETED, reason="settled"), state)[0] is Verdict.ACCEPT
    ready = encode(_signed_by(SEATS[:5], ReadyCore(ORDER, WORKER.public_key)))
    assert judge(ready)[0] is Verdict.ACCEPT
    assert judge(ready, state)[0] is Verdict.IGNORE
    assert judge(encode(_signed_by(SEATS[:5], ReadyCore(bytes(32), WORKER.public_key))))[0] is Verdict.IGNORE


def test_gossip_lease__reject_certificates() -> None:
    ready = ReadyCore(ORDER, WORKER.public_key)
    assert judge(encode(_signed_by(SEATS[:4], ready)))[0] is Verdict.REJECT
    assert judge(encode(_signed_by(SEATS[:5], replace(ready, worker=STRANGER.public_key))))[0] is Verdict.REJECT
    window = WitnessCore(ORDER, WORKER.public_key, 1, UP)
    assert judge(encode(_signed_by(SEATS[:5], window)))[0] is Verdict.REJECT
    assert judge(bytes(10_000))[0] is Verdict.REJECT


def test_witness_certificates_are_valid_on_the_topic_certificate() -> None:
    window = WitnessCore(ORDER, WORKER.public_key, READY_WORLD.state.slot, UP)
    good = encode(_signed_by(SEATS[1:6], window))
    assert validate_certificate(good, READY_WORLD.now, READY_WORLD.state)[0] is Verdict.ACCEPT
    bad = encode(_signed_by(SEATS[:4], window))
    assert validate_certificate(bad, READY_WORLD.now, READY_WORLD.state)[0] is Verdict.REJECT


def test_names_are_complete() -> None:
    assert set(OUTCOME_NAMES) == {OPEN, COMPLETED, CANCELLED, FAILED, EXPIRED}
    assert all(len(reason) <= 64 for reason in REASONS)
    assert DEPLOYING in STATE_NAMES
