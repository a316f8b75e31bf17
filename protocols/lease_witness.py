"""The deploy committee's side of leases: authorise, look at the container as a user would, witness every window.

A seat votes for the order's ticket as soon as the order is final, for READY once its own tunnel reached the container,
and for UP, DOWN or GONE in every window (= slot), at a moment that nobody can predict. What it knows of a lease is
stored, so that a seat that restarts goes on witnessing. Without a peer it sees nothing and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Verified
from protocols.actions import (
    Action,
    Answer,
    BlockApplied,
    Event,
    Gossip,
    Incoming,
    Probe,
    ProbeReport,
    Reply,
    Request,
    RequestEnded,
    Wake,
)
from protocols.deploy import (
    DEPLOY_PROTOCOL,
    DEPLOYING,
    DOWN,
    ENDED,
    GONE,
    LEASE_TOPIC,
    UP,
    DeployOrder,
    DeployReply,
    LeaseEvent,
    committee_of,
    is_about,
    ticket_of,
)
from protocols.interpreter.events import OrderPlaced, SlotStarted
from protocols.interpreter.state import ACTIVE, ORDER_OPEN, OrderState, State
from protocols.lease_votes import Ballot, LeaseCore, aggregators, parse_core_vote
from protocols.lease_watch import Look, Watch, WatchRecord
from protocols.popw import REFUSED, VOTE_PROTOCOL
from protocols.popw_votes import CERTIFICATE_TOPIC, is_core_vote
from protocols.quorum import QuorumCertificate, ReadyCore, TicketCore, VerdictCore, WitnessCore
from protocols.settlement import is_watched

MAX_WATCHES = 4_096
READY_ATTEMPTS = 3
READY_RETRY_S = 0.5
WITNESS_ATTEMPTS = 2
PROBE_S_MAX = 10.0
DELIVER_ATTEMPTS = 5
DELIVER_S = 5.0
DELIVER_RETRY_S = 0.5
EARLIEST_PERMILLE, LATEST_PERMILLE, PROBE_PERMILLE = 100, 300, 400
"""A window's probe begins between 0.1 and 0.3 of the slot and takes at most 0.4 of it."""


class LeaseSeatMachine:
    """Authorises and witnesses the leases in whose deploy committees this node has a seat.

    `entropy(n)` gives n fresh random bytes; `watches` are the stored items of kind "watch", (key, value) each.
    """

    def __init__(
        self, keys: KeyPair, entropy: Callable[[int], bytes], watches: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        self._keys = keys
        self._entropy = entropy
        self._stored = {order_id: decode(WatchRecord, value) for order_id, value in watches}
        self._watches: dict[bytes, Watch] = {}
        self._state: State | None = None
        self._live = False
        self._deadline: float | None = None

    @property
    def deadline(self) -> float | None:
        """The earliest of all watches' deadlines."""
        return self._deadline

    @property
    def watches(self) -> tuple[Watch, ...]:
        """Those that are remembered, for the API and tests."""
        return tuple(self._watches.values())

    def step(self, event: Event, now: float) -> list[Action]:
        """React to one event."""
        match event:
            case BlockApplied():
                actions = self._block(event, now)
            case Incoming(protocol=protocol) if protocol == VOTE_PROTOCOL and is_core_vote(event.payload):
                actions = self._vote(event, now)
            case Gossip(message=QuorumCertificate() as certificate) if event.topic in (LEASE_TOPIC, CERTIFICATE_TOPIC):
                actions = self._certified(certificate, now)
            case Gossip(message=Verified(message=LeaseEvent() as told)) if event.topic == LEASE_TOPIC:
                actions = self._told(told, now)
            case Answer() | RequestEnded():
                actions = self._answered(event, now)
            case ProbeReport():
                actions = self._probed(event, now)
            case Wake():
                actions = self._wake(now)
            case _:
                return []
        times = [watch.deadline for watch in self._watches.values()] if self._live else []
        self._deadline = min((at for at in times if at is not None), default=None)
        return actions

    # ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, event: BlockApplied, now: float) -> list[Action]:
        first, self._state = self._state is None, event.state
        state = event.state
        placed = [each.order_id for each in event.events if isinstance(each, OrderPlaced)]
        if first:
            placed = [order_id for order_ids in state.open_orders.values() for order_id in order_ids]
        for order_id in placed:
            self._begin(order_id, state)
        for watch in list(self._watches.values()):
            if not self._may_run(state.orders[watch.order_id], state):
                del self._watches[watch.order_id]
        if not event.live:
            return []
        fresh = [*self._watches] if not self._live else placed
        self._live = True
        actions = [action for order_id in fresh for action in self._authorise(order_id, state, now)]
        for started in event.events:
            if isinstance(started, SlotStarted):
                actions += self._start_slot(started.slot, state, now)
        return actions

    def _begin(self, order_id: bytes, state: State) -> None:
        order = state.orders[order_id]
        known = order_id in self._watches or len(self._watches) >= MAX_WATCHES
        if known or not self._may_run(order, state) or self._keys.public_key not in order.seats:
            return
        committee, ranked = committee_of(order), aggregators(order.seats, order_id, state.network)
        ticket, ready = (
            Ballot(f"{kind}/{order_id.hex()}", committee, ranked, LEASE_TOPIC) for kind in ("ticket", "ready")
        )
        watch = self._watches[order_id] = Watch(order_id, order, committee, ranked, ticket, ready)
        stored = self._stored.pop(order_id, None)
        if stored is not None:
            watch.port, watch.healthy, watch.ready_slot = stored.port, bool(stored.healthy), stored.ready_slot
            watch.ready.closed = bool(stored.ready_slot)
            watch.ticket.closed = watch.healthy

    def _may_run(self, order: OrderState, state: State) -> bool:
        """Open, and not longer ago than any of its windows can count: settling it may be nobody's business."""
        return order.status == ORDER_OPEN and is_watched(order, state.slot, state.params)

    def _authorise(self, order_id: bytes, state: State, now: float) -> list[Action]:
        """Vote for the ticket: the order is final and open, its worker active, and there is still time to deploy."""
        watch = self._watches.get(order_id)
        if watch is None or watch.ticket.closed:
            return []
        order, worker = watch.order, state.workers.get(watch.order.worker)
        in_time = now < (order.placed_ms + state.params.deploy_timeout_ms) / 1000
        if worker is None or worker.status != ACTIVE or not in_time:
            return []
        return self._cast(watch, watch.ticket, ticket_of(order_id, order), now)

    def _cast(self, watch: Watch, ballot: Ballot, core: LeaseCore, now: float) -> list[Action]:
        assert self._state is not None
        actions = ballot.vote(core, self._keys, self._state.network, now)
        return [*actions, *self._deliver(watch)]

    # ── votes and certificates ───────────────────────────────────────────────────────────────────────────────────────

    def _vote(self, call: Incoming, now: float) -> list[Action]:
        vote = parse_core_vote(call.payload)
        watch = self._watches.get(vote.core.order_id) if vote is not None else None
        if vote is None or watch is None or self._state is None or not is_about(vote.core, watch.order):
            return [Reply(call.call_id, REFUSED)]
        ballot = self._ballot(watch, vote.core, self._state)
        if ballot is None:
            return [Reply(call.call_id, REFUSED)]
        answer, actions = ballot.receive(vote, call.peer, self._state.network)
        return [Reply(call.call_id, answer), *actions, *self._deliver(watch)]

    def _ballot(self, watch: Watch, core: LeaseCore, state: State) -> Ballot | None:
        match core:
            case TicketCore():
                return watch.ticket
            case ReadyCore():
                return watch.ready
            case WitnessCore():
                recent = state.slot - state.params.certificate_grace_slots <= core.slot <= state.slot + 1
                return watch.window(core.slot) if recent else None

    def _certified(self, certificate: QuorumCertificate, now: float) -> list[Action]:
        """A certificate, ours or another aggregator's; verified on receipt."""
        core = certificate.core
        if isinstance(core, VerdictCore) or self._state is None or core.order_id not in self._watches:
            return []
        watch = self._watches[core.order_id]
        match core:
            case TicketCore():
                watch.ticket.closed = True
                return []
            case ReadyCore():
                return self._became_ready(watch, self._state.slot)
            case WitnessCore():
                return self._witnessed(watch, core)

    def _became_ready(self, watch: Watch, slot: int) -> list[Action]:
        watch.ready.closed = True
        watch.looks.pop(None, None)
        if watch.ready_slot:
            return []
        watch.ready_slot = slot
        return [watch.record]

    def _witnessed(self, watch: Watch, core: WitnessCore) -> list[Action]:
        if core.slot in watch.windows:
            watch.windows[core.slot].closed = True
        if core.status != UP:
            return []
        watch.first_up = min(watch.first_up or core.slot, core.slot)
        # A seat that missed READY learns it from the others' windows.
        return self._became_ready(watch, core.slot)

    # ── the ticket goes to the worker ────────────────────────────────────────────────────────────────────────────────

    def _deliver(self, watch: Watch) -> list[Action]:
        """The seat that made the certificate hands it over; the worker may also have it from gossip or the client."""
        if watch.ticket.certificate is None or watch.deliveries:
            return []
        return self._send_ticket(watch)

    def _send_ticket(self, watch: Watch) -> list[Action]:
        certificate = watch.ticket.certificate
        assert certificate is not None
        watch.deliveries, watch.deliver_at = watch.deliveries + 1, None
        request_id = f"deliver/{watch.order_id.hex()}/{watch.deliveries}"
        payload = encode(DeployOrder(certificate, ()))
        return [Request(request_id, watch.order.worker, DEPLOY_PROTOCOL, payload, DELIVER_S)]

    def _answered(self, event: Answer | RequestEnded, now: float) -> list[Action]:
        kind, _, rest = event.request_id.partition("/")
        watch = self._watches.get(_order_id(rest))
        if watch is None:
            return []
        if kind == "deliver":
            failed = not _accepted(event.payload) if isinstance(event, Answer) else bool(event.error)
            if failed and watch.deliveries < DELIVER_ATTEMPTS and watch.deliver_at is None:
                watch.deliver_at = now + DELIVER_RETRY_S * 2**watch.deliveries
            return []
        name = event.request_id.rsplit("/", 2)[0]
        for ballot in watch.ballots():
            if ballot.name == name and isinstance(event, Answer):
                ballot.answered(event.request_id, event.payload, now)
            elif ballot.name == name and isinstance(event, RequestEnded):
                ballot.ended(event.request_id, event.error, now)
        return []

    # ── READY and windows ────────────────────────────────────────────────────────────────────────────────────────────

    def _told(self, told: LeaseEvent, now: float) -> list[Action]:
        """The worker's own word, which starts looks and is never believed."""
        watch = self._watches.get(told.order_id)
        if watch is None or told.sequence <= watch.sequence:
            return []
        watch.sequence, watch.port, watch.ended = told.sequence, told.port, told.state == ENDED
        if told.reason != "healthy":
            return []
        watch.healthy = True
        if told.state == DEPLOYING and not watch.ready.closed and watch.ready.core is None and self._impartial(watch):
            watch.looks.setdefault(None, Look(None, now))
        return [watch.record, *self._look(watch, now)]

    def _impartial(self, watch: Watch) -> bool:
        return watch.order.worker != self._keys.public_key

    def _start_slot(self, slot: int, state: State, now: float) -> list[Action]:
        actions: list[Action] = []
        slot_s = state.params.slot_ms / 1000
        for watch in self._watches.values():
            oldest = slot - state.params.certificate_grace_slots - 1
            watch.windows = {number: ballot for number, ballot in watch.windows.items() if number >= oldest}
            watch.looks = {number: look for number, look in watch.looks.items() if number is None or number >= slot - 1}
            if not watch.witnesses(slot, state.params) or not self._impartial(watch):
                continue
            if watch.ended:  # the worker says itself that there is nothing to see
                core = WitnessCore(watch.order_id, watch.order.worker, slot, DOWN)
                actions += self._cast(watch, watch.window(slot), core, now)
                continue
            share = EARLIEST_PERMILLE + int.from_bytes(self._entropy(4), "little") % (
                LATEST_PERMILLE - EARLIEST_PERMILLE
            )
            watch.looks[slot] = Look(slot, now + slot_s * share / 1000)
        return actions

    def _look(self, watch: Watch, now: float) -> list[Action]:
        """Start the probes that are due."""
        assert self._state is not None
        slot_s = self._state.params.slot_ms / 1000
        actions: list[Action] = []
        for look in watch.looks.values():
            if look.at is None or look.at > now:
                continue
            look.at, look.attempt = None, look.attempt + 1
            deadline_s = min(PROBE_S_MAX, slot_s * PROBE_PERMILLE / 1000)
            name = f"probe/{watch.order_id.hex()}/{_name(look.slot)}/{look.attempt}"
            actions.append(Probe(name, watch.order_id, watch.order.worker, watch.port, deadline_s))
        return actions

    def _probed(self, report: ProbeReport, now: float) -> list[Action]:
        kind, _, rest = report.probe_id.partition("/")
        watch = self._watches.get(_order_id(rest)) if kind == "probe" else None
        if watch is None or self._state is None:
            return []
        look = next((each for each in watch.looks.values() if rest.split("/")[1:] == _tail(each)), None)
        if look is None:
            return []
        look.answered |= report.answered and not report.local
        most = READY_ATTEMPTS if look.slot is None else WITNESS_ATTEMPTS
        if not report.up and look.attempt < most:
            slot_s = self._state.params.slot_ms / 1000
            look.at = now + (READY_RETRY_S * look.attempt if look.slot is None else slot_s / 20)
            return []
        del watch.looks[look.slot]
        if report.up:
            return self._seen(watch, look.slot, UP, now)
        if report.local and not look.answered:
            return []  # our own isolation or backlog is not the worker's absence
        return self._seen(watch, look.slot, DOWN if look.answered else GONE, now)

    def _seen(self, watch: Watch, slot: int | None, status: int, now: float) -> list[Action]:
        order_id, worker = watch.order_id, watch.order.worker
        if slot is not None:
            return self._cast(watch, watch.window(slot), WitnessCore(order_id, worker, slot, status), now)
        # Not reached: no vote for READY; the worker's next event starts another look.
        return self._cast(watch, watch.ready, ReadyCore(order_id, worker), now) if status == UP else []

    def _wake(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for watch in self._watches.values():
            due = watch.deadline
            if due is None or due > now:
                continue
            actions += self._look(watch, now)
            for ballot in watch.ballots():
                actions += ballot.wake(self._keys.public_key, now)
            if watch.deliver_at is not None and watch.deliver_at <= now:
                actions += self._send_ticket(watch)
        return actions


def _name(slot: int | None) -> str:
    return "ready" if slot is None else str(slot)


def _tail(look: Look) -> list[str]:
    return [_name(look.slot), str(look.attempt)]


def _order_id(rest: str) -> bytes:
    try:
        return bytes.fromhex(rest.partition("/")[0])
    except ValueError:
        return b""


def _accepted(payload: bytes) -> bool:
    try:
        return bool(decode(DeployReply, payload).accepted)
    except DecodeError:
        return False
