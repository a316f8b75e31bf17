"""The client's side of leases: hand over the workload, follow the lease, give up when the worker is lost.

What was ordered is stored before the order is placed, and how far its lease has come with every change, so that a
client that dies after paying goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import U8, U32, AtMost, Count, Text64, decode, encode, message
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Verified
from protocols.actions import (
    Action,
    Answer,
    BlockApplied,
    Event,
    Gossip,
    Note,
    Request,
    RequestEnded,
    Store,
    Submit,
    Wake,
)
from protocols.deploy import (
    CANCELLED,
    COMPLETED,
    DEPLOY_PROTOCOL,
    DEPLOYING,
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
)
from protocols.digests import offer_hash
from protocols.interpreter.calls import OrderCancel, payload_of
from protocols.interpreter.events import LeaseSettled, OrderPlaced
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_CLOSED, ORDER_OPEN, OrderState, State
from protocols.lease import clipped
from protocols.orders import Offer, OrderSpec, Workload
from protocols.popw_votes import CERTIFICATE_TOPIC
from protocols.quorum import QuorumCertificate, ReadyCore, TicketCore, WitnessCore

DEPLOYING_TEXT = "Container is deploying..."
RUNNING_TEXT = "Your Container has been deployed successfully."
MAX_PENDING = 256
DELIVER_ATTEMPTS = 5
DELIVER_S = 10.0
DELIVER_RETRY_S = 0.5
GRACE_WINDOWS = 2
"""How much longer than the worker a client waits for READY."""


@message(67)
@dataclass(frozen=True)
class OrderRecord:
    """What a client's node keeps of an order, under its offer's hash; never sent. States as in deploy.STATE_NAMES."""

    spec: OrderSpec
    workload: Annotated[tuple[Workload, ...], Count(1)]
    state: U8
    outcome: U8
    reason: Text64
    downs: U32
    detail: Annotated[str, AtMost(256)]


@dataclass
class ClientLease:
    """One order of this client as its node sees it; `outcome` and `reason` once it has ended."""

    order_id: bytes
    order: OrderState
    spec: OrderSpec | None = None
    workload: Workload | None = None
    state: int = PLACED
    outcome: int = OPEN
    reason: str = ""
    detail: str = ""
    downs: int = 0
    last_window: int = -1
    to_cancel: bool = False
    ticket: QuorumCertificate | None = None
    attempts: int = 0
    delivered: bool = False
    deliver_at: float | None = None
    give_up_at: float = 0.0

    @property
    def deadline(self) -> float | None:
        """Its next delivery, or when to give up."""
        times = [self.deliver_at if self.state < DEPLOYING else None, self.give_up_at if self.state < RUNNING else None]
        return min((at for at in times if at is not None), default=None)


class LeaseClientMachine:
    """All orders of one client key; `orders` are the stored items of kind "order", (key, value) each."""

    def __init__(self, keys: KeyPair, network: bytes, orders: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._keys = keys
        self._network = network
        self._records = {key: decode(OrderRecord, value) for key, value in orders}
        self._leases: dict[bytes, ClientLease] = {}
        self._state: State | None = None
        self._live = False

    @property
    def deadline(self) -> float | None:
        """The earliest of all leases' deadlines."""
        times = [lease.deadline for lease in self._leases.values()] if self._live else []
        return min((at for at in times if at is not None), default=None)

    @property
    def leases(self) -> tuple[ClientLease, ...]:
        """Orders that are not settled yet, for the API and tests."""
        return tuple(self._leases.values())

    def lease(self, order_id: bytes) -> ClientLease | None:
        """One of them."""
        return self._leases.get(order_id)

    def prepare(self, offer: Verified[Offer], spec: OrderSpec, workload: Workload) -> list[Action]:
        """To be carried out **before** the order is submitted: without the workload, what is paid for cannot run."""
        record = OrderRecord(spec, (workload,), PLACED, OPEN, "", 0, "")
        key = offer_hash(offer.message, self._network)
        self._records[key] = record
        if len(self._records) > MAX_PENDING:  # offers that were never placed
            self._records.pop(next(iter(self._records)))
        return [Store("order", key, encode(record))]

    def step(self, event: Event, now: float) -> list[Action]:
        """React to one event."""
        match event:
            case BlockApplied():
                return self._block(event, now)
            case Gossip(message=QuorumCertificate() as certificate) if event.topic in (LEASE_TOPIC, CERTIFICATE_TOPIC):
                return self._certified(certificate, now)
            case Gossip(message=Verified(message=LeaseEvent() as told)) if event.topic == LEASE_TOPIC:
                return self._told(told)
            case Answer() | RequestEnded():
                return self._answered(event, now)
            case Wake():
                return self._wake(now)
            case _:
                return []

    # ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, event: BlockApplied, now: float) -> list[Action]:
        first, self._state = self._state is None, event.state
        state = event.state
        self._live = self._live or event.live
        placed = [each.order_id for each in event.events if isinstance(each, OrderPlaced)]
        if first:
            placed = [order_id for order_ids in state.open_orders.values() for order_id in order_ids]
        actions: list[Action] = []
        for order_id in placed:
            if state.orders[order_id].client_key == self._keys.public_key and order_id not in self._leases:
                actions += self._begin(order_id, state)
        for each in event.events if event.live else ():
            if isinstance(each, LeaseSettled) and each.order_id in self._leases:
                actions.append(_settlement_note(each))
        for lease in list(self._leases.values()):
            actions += self._compare(lease, state)
        return actions

    def _begin(self, order_id: bytes, state: State) -> list[Action]:
        order = state.orders[order_id]
        lease = self._leases[order_id] = ClientLease(order_id, order)
        waits_ms = state.params.deploy_timeout_ms + GRACE_WINDOWS * state.params.slot_ms
        lease.give_up_at = (order.placed_ms + waits_ms) / 1000
        record = self._records.pop(order.offer_hash, None)
        if record is None:
            return []
        lease.spec, lease.workload = record.spec, record.workload[0] if record.workload else None
        lease.state, lease.outcome, lease.downs = record.state, record.outcome, record.downs
        lease.reason, lease.detail = record.reason, record.detail
        lease.to_cancel = lease.state == ENDED and lease.outcome != EXPIRED
        return [_note(lease, "the order is on the ledger")] if lease.state == PLACED else []

    def _compare(self, lease: ClientLease, state: State) -> list[Action]:
        lease.order = order = state.orders[lease.order_id]
        if order.status == ORDER_OPEN:
            if lease.to_cancel and self._live:
                call = payload_of(OrderCancel(lease.order_id))
                return [Submit(f"order.cancel/{lease.order_id.hex()}", call)]
            return []
        lease.to_cancel = False
        outcome = CANCELLED if order.status == ORDER_CANCELLED else order.outcome
        reason = {CANCELLED: "cancelled", COMPLETED: "expired", EXPIRED: "expired"}.get(outcome, "worker-lost")
        actions = self._end(lease, outcome, reason, "")
        if order.status == ORDER_CLOSED:
            del self._leases[lease.order_id]
        return actions

    # ── what others say ──────────────────────────────────────────────────────────────────────────────────────────────

    def _certified(self, certificate: QuorumCertificate, now: float) -> list[Action]:
        """Verified on receipt against the order's seats."""
        core = certificate.core
        if not isinstance(core, TicketCore | ReadyCore | WitnessCore) or core.order_id not in self._leases:
            return []
        lease = self._leases[core.order_id]
        match core:
            case TicketCore():
                return self._permitted(lease, certificate)
            case ReadyCore():
                return self._running(lease)
            case WitnessCore():
                return self._witnessed(lease, core)

    def _permitted(self, lease: ClientLease, ticket: QuorumCertificate) -> list[Action]:
        if lease.ticket is not None or lease.state >= DEPLOYING or lease.workload is None:
            return []
        lease.ticket = ticket
        return self._deliver(lease)

    def _deliver(self, lease: ClientLease) -> list[Action]:
        if lease.ticket is None or lease.workload is None or lease.state >= DEPLOYING:
            return []
        lease.attempts, lease.deliver_at = lease.attempts + 1, None
        payload = encode(DeployOrder(lease.ticket, (lease.workload,)))
        request_id = f"handover/{lease.order_id.hex()}/{lease.attempts}"
        return [Request(request_id, lease.order.worker, DEPLOY_PROTOCOL, payload, DELIVER_S)]

    def _answered(self, event: Answer | RequestEnded, now: float) -> list[Action]:
        kind, _, rest = event.request_id.partition("/")
        lease = self._leases.get(_order_id(rest)) if kind == "handover" else None
        if lease is None:
            return []
        failed, why = _failure(event)
        if failed and not lease.delivered and lease.deliver_at is None and lease.state < DEPLOYING:
            if lease.attempts < DELIVER_ATTEMPTS:
                lease.deliver_at = now + DELIVER_RETRY_S * 2**lease.attempts
            return [_note(lease, f"the worker has not taken the workload: {why}")]
        lease.delivered = lease.delivered or not failed
        return []

    def _told(self, told: LeaseEvent) -> list[Action]:
        """The worker's word: good enough to tell the user, and to stop paying when it says that nothing runs."""
        lease = self._leases.get(told.order_id)
        if lease is None:
            return []
        if told.state == ENDED:
            actions = self._end(lease, told.outcome, told.reason, told.text)
            # Only the time that is over was used up; for all else the rest of the money comes back.
            lease.to_cancel = lease.to_cancel or (bool(actions) and told.outcome != EXPIRED)
            return [*actions, *(self._compare(lease, self._state) if self._state is not None else [])]
        return self._deploying(lease) if told.state >= DEPLOYING else []

    def _deploying(self, lease: ClientLease) -> list[Action]:
        if lease.state >= DEPLOYING:
            return []
        lease.state, lease.deliver_at = DEPLOYING, None
        return [*self._kept(lease), _note(lease, DEPLOYING_TEXT)]

    def _running(self, lease: ClientLease) -> list[Action]:
        """READY, or a window witnessed as UP when READY was missed."""
        if lease.state >= RUNNING:
            return []
        actions = self._deploying(lease)
        lease.state = RUNNING
        return [*actions, *self._kept(lease), _note(lease, RUNNING_TEXT)]

    def _witnessed(self, lease: ClientLease, core: WitnessCore) -> list[Action]:
        if core.slot <= lease.last_window or self._state is None:
            return []
        lease.last_window = core.slot
        if core.status == UP:
            lease.downs = 0
            return self._running(lease)
        lease.downs += 1
        if lease.downs < self._state.params.unwitnessed_windows or lease.state == ENDED:
            return self._kept(lease)
        return self._give_up(lease, "worker-lost")

    # ── giving up ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _give_up(self, lease: ClientLease, reason: str) -> list[Action]:
        actions = self._end(lease, FAILED, reason, "")
        lease.to_cancel = True
        return [*actions, *(self._compare(lease, self._state) if self._state is not None else [])]

    def _end(self, lease: ClientLease, outcome: int, reason: str, detail: str) -> list[Action]:
        if lease.state == ENDED:
            return []
        lease.state, lease.outcome, lease.reason, lease.detail = ENDED, outcome, reason, clipped(detail)
        lease.deliver_at = None
        text = REASONS.get(reason, reason) + (f": {lease.detail}" if lease.detail else "")
        return [*self._kept(lease), _note(lease, text)]

    def _wake(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for lease in list(self._leases.values()) if self._live else ():
            if lease.deliver_at is not None and lease.deliver_at <= now:
                actions += self._deliver(lease)
            if lease.state < RUNNING and lease.give_up_at <= now:
                actions += self._give_up(lease, "deploy-timeout" if lease.state == DEPLOYING else "no-ticket")
        return actions

    def _kept(self, lease: ClientLease) -> list[Action]:
        if lease.spec is None:  # placed by another node with this key: nothing of ours to keep
            return []
        workload = (lease.workload,) if lease.workload is not None else ()
        record = OrderRecord(lease.spec, workload, lease.state, lease.outcome, lease.reason, lease.downs, lease.detail)
        return [Store("order", lease.order.offer_hash, encode(record))]


def _note(lease: ClientLease, text: str) -> Note:
    data: list[tuple[str, str | int]] = [("role", "client"), ("order", lease.order_id.hex())]
    data += [("state", STATE_NAMES[lease.state]), ("text", text)]
    if lease.state == ENDED:
        data += [("outcome", OUTCOME_NAMES[lease.outcome]), ("reason", lease.reason)]
    return Note("lease", tuple(data))


def _settlement_note(settled: LeaseSettled) -> Note:
    data: list[tuple[str, str | int]] = [("order", settled.order_id.hex()), ("closed", int(settled.closed))]
    for name in ("paid_planck", "refunded_planck", "refunded_points", "penalty_planck"):
        data.append((name, str(getattr(settled, name))))
    return Note("settlement", tuple(data))


def _failure(event: Answer | RequestEnded) -> tuple[bool, str]:
    if isinstance(event, RequestEnded):
        return bool(event.error), event.error
    try:
        reply = decode(DeployReply, event.payload)
    except DecodeError:
        return True, "it answered with garbage"
    return not reply.accepted, clipped(reply.text)


def _order_id(rest: str) -> bytes:
    try:
        return bytes.fromhex(rest.partition("/")[0])
    except ValueError:
        return b""
