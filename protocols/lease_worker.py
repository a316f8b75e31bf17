"""The worker's side of leases: no container without a ticket, signed events, nothing lost by a restart.

Every change of a lease is stored with the event that tells of it, so that a node that restarts goes on where it was,
with the containers that it finds again.
"""

from __future__ import annotations

from collections.abc import Iterable

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from protocols.actions import (
    Action,
    BlockApplied,
    ContainerReport,
    Deploy,
    Event,
    Gossip,
    Incoming,
    Reply,
    Stop,
    Store,
    Wake,
)
from protocols.committees import verify_certificate
from protocols.deploy import (
    AUTHORISED,
    CANCELLED,
    COMPLETED,
    DEGRADED,
    DEPLOY_PROTOCOL,
    DEPLOYING,
    ENDED,
    EXPIRED,
    FAILED,
    LEASE_TOPIC,
    MAX_EVENTS,
    PLACED,
    REASONS,
    RUNNING,
    DeployOrder,
    DeployReply,
    LeaseEvent,
    committee_of,
    is_about,
)
from protocols.digests import spec_hash, workload_hash
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_OPEN, OrderState, State
from protocols.lease import TRANSITIONS, Lease, LeaseRecord, Signal, clipped
from protocols.offers import Holds
from protocols.orders import WORKLOAD_BYTES_MAX, OrderSpec, Workload, workload_fault
from protocols.quorum import QuorumCertificate, ReadyCore, TicketCore
from protocols.settlement import lease_windows

DEPLOY_BYTES_MAX = WORKLOAD_BYTES_MAX + 8_192
ADOPT_S = 5.0
"""After a restart, containers that were not found by then do not exist."""
KEEP_LOGS_S = 600.0
"""A program that ended by itself leaves its logs for this long, or until its order is over."""


class LeaseWorkerMachine:
    """All leases of one worker.

    `leases` and `workloads` are the stored items of kinds "lease" and "workload", (key, value) each; `holds` is shared
    with OfferMachine. DecodeError if a stored item is damaged: better not to start than to run a lease twice.
    """

    def __init__(
        self,
        keys: KeyPair,
        network: bytes,
        holds: Holds,
        leases: Iterable[tuple[bytes, bytes]] = (),
        workloads: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        self._keys = keys
        self._network = network
        self._holds = holds
        known = dict(workloads)
        self._leases: dict[bytes, Lease] = {}
        for order_id, value in leases:
            record = decode(LeaseRecord, value)
            stored = known.get(record.spec_hash) if record.state != ENDED else None
            workload = decode(Workload, stored) if stored is not None else None
            self._leases[order_id] = Lease.of(order_id, record, workload)
        self._state: State | None = None
        self._live = False
        self._adopt_at: float | None = None

    @property
    def deadline(self) -> float | None:
        """The earliest of all leases' limits; none before the node has caught up with the ledger."""
        if not self._live:
            return None
        times = [lease.deadline for lease in self._leases.values()]
        return min((at for at in (*times, self._adopt_at) if at is not None), default=None)

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Those that are remembered, for the API and tests."""
        return tuple(self._leases.values())

    def step(self, event: Event, now: float) -> list[Action]:
        """React to one event."""
        match event:
            case BlockApplied():
                return self._block(event, now)
            case Incoming(protocol=protocol) if protocol == DEPLOY_PROTOCOL:
                return self._deploy_order(event, now)
            case Gossip(topic=topic, message=QuorumCertificate() as certificate) if topic == LEASE_TOPIC:
                return self._certified(certificate, now)
            case ContainerReport():
                return self._report(event, now)
            case Wake():
                return self._wake(now)
            case _:
                return []

    # ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, event: BlockApplied, now: float) -> list[Action]:
        self._state = state = event.state
        actions: list[Action] = []
        if event.live and not self._live:
            self._live, self._adopt_at = True, now + ADOPT_S
            # The node may have stopped between journal and gossip: the same bytes again do no harm.
            actions += [lease.publication for lease in self._leases.values() if lease.event and lease.state != ENDED]
        for order_id in state.open_orders.get(self._keys.public_key, ()):
            if state.orders[order_id].status == ORDER_OPEN and order_id not in self._leases:
                actions += self._placed(order_id, state.orders[order_id])
        for lease in list(self._leases.values()):
            actions += self._compare(lease, state, now)
        return actions

    def _placed(self, order_id: bytes, order: OrderState) -> list[Action]:
        lease = self._leases[order_id] = Lease(order_id, order.spec_hash)
        actions: list[Action] = [lease.record, lease.note()]
        workload = self._holds.take(order.offer_hash)
        if workload is not None:
            lease.workload = workload
            actions.append(Store("workload", lease.spec_hash, encode(workload)))
        return actions

    def _compare(self, lease: Lease, state: State, now: float) -> list[Action]:
        """Follow what the ledger says about the order; an order that is not there yet is in a later block."""
        order = state.orders.get(lease.order_id)
        if order is None:
            return []
        lease.deploy_by = (order.placed_ms + state.params.deploy_timeout_ms) / 1000
        if order.status != ORDER_OPEN:
            return self._over_on_ledger(lease, order, now)
        windows = lease_windows(order.duration_s, state.params)
        # One window more than was paid for: seats may have seen READY a window later than this node.
        if lease.ready_slot and state.slot > lease.ready_slot + windows + 1:
            return self._end(lease, Signal.OVER, EXPIRED, "expired", "", now)
        return []

    def _over_on_ledger(self, lease: Lease, order: OrderState, now: float) -> list[Action]:
        if order.status == ORDER_CANCELLED:
            actions = self._end(lease, Signal.OVER, CANCELLED, "cancelled", "", now)
        else:
            actions = self._end(lease, Signal.OVER, order.outcome or COMPLETED, "settled", "", now)
        if not actions and lease.stop_at is not None:
            actions = [Stop(lease.order_id)]
        del self._leases[lease.order_id]
        return actions

    # ── permission ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _deploy_order(self, call: Incoming, now: float) -> list[Action]:
        if len(call.payload) > DEPLOY_BYTES_MAX:
            return [_refuse(call, "too large")]
        try:
            order = decode(DeployOrder, call.payload)
        except DecodeError as error:
            return [_refuse(call, error.message)]
        refusal, actions = self._ticket(order.ticket, now)
        if refusal:
            return [_refuse(call, refusal)]
        lease = self._leases[order.ticket.core.order_id]  # type: ignore[union-attr]
        if order.workload and lease.workload is None:
            refusal = self._workload_refusal(lease, order.workload[0])
            if refusal:
                return [*actions, _refuse(call, refusal)]
            actions += self._with_workload(lease, order.workload[0], now)
        if lease.state == AUTHORISED:
            return [*actions, _refuse(call, "the workload is not known here; the client has to send it")]
        return [*actions, Reply(call.call_id, encode(DeployReply(1, "")))]

    def _certified(self, certificate: QuorumCertificate, now: float) -> list[Action]:
        """A certificate on the topic `lease`, already verified on receipt; a ticket is looked at again anyway."""
        core = certificate.core
        if isinstance(core, TicketCore) and core.order_id in self._leases:
            return self._ticket(certificate, now)[1]
        if isinstance(core, ReadyCore) and core.worker == self._keys.public_key:
            return self._ready(core.order_id, now)
        return []

    def _ticket(self, ticket: QuorumCertificate, now: float) -> tuple[str, list[Action]]:
        """Why the ticket does not permit the lease, or "" and what follows from it; a repeat costs nothing."""
        core, state = ticket.core, self._state
        if state is None or not isinstance(core, TicketCore):
            return "not a ticket", []
        order, lease = state.orders.get(core.order_id), self._leases.get(core.order_id)
        if order is None or lease is None or order.status != ORDER_OPEN or lease.state == ENDED:
            return "no such open order on this worker here", []
        if not is_about(core, order):
            return "the ticket is not what the ledger says about the order", []
        if lease.state != PLACED:
            return "", []
        if not verify_certificate(ticket, committee_of(order), self._network):
            return "no quorum of the order's seats signed the ticket", []
        lease.state = TRANSITIONS[lease.state, Signal.TICKET]
        if lease.workload is not None:
            return "", self._start(lease, now)
        return "", [lease.record, lease.note()]

    def _workload_refusal(self, lease: Lease, workload: Workload) -> str:
        assert self._state is not None
        order = self._state.orders[lease.order_id]
        spec = OrderSpec(order.resources, order.duration_s, workload_hash(workload, self._network))
        if spec_hash(spec, self._network) != lease.spec_hash:
            return "not the workload of this order"
        return workload_fault(workload)

    def _with_workload(self, lease: Lease, workload: Workload, now: float) -> list[Action]:
        lease.workload = workload
        kept = Store("workload", lease.spec_hash, encode(workload))
        return [kept, *(self._start(lease, now) if lease.state == AUTHORISED else [])]

    def _start(self, lease: Lease, now: float) -> list[Action]:
        lease.state = TRANSITIONS[lease.state, Signal.WORKLOAD]
        lease.adopted = True
        return [*self._tell(lease, "deploying", "", now), self._deploy(lease)]

    def _deploy(self, lease: Lease) -> Deploy:
        assert self._state is not None and lease.workload is not None
        has = self._state.orders[lease.order_id].resources
        return Deploy(lease.order_id, lease.workload, has.cpu_cores, has.memory_mb, has.disk_mb, has.gpus)

    def _ready(self, order_id: bytes, now: float) -> list[Action]:
        lease = self._leases.get(order_id)
        if lease is None or self._state is None or (lease.state, Signal.READY) not in TRANSITIONS:
            return []
        lease.state = TRANSITIONS[lease.state, Signal.READY]
        lease.ready_slot, lease.repeat_at = self._state.slot, None
        return self._tell(lease, "ready", "", now)

    # ── the container ────────────────────────────────────────────────────────────────────────────────────────────────

    def _report(self, report: ContainerReport, now: float) -> list[Action]:
        lease = self._leases.get(report.order_id)
        if lease is None or (lease.state == ENDED and report.phase in ("created", "started")):
            # Left behind: records are written before containers, so this one is nobody's any more.
            return [Stop(report.order_id)] if report.phase in ("created", "started") else []
        lease.adopted = True
        match report.phase:
            case "healthy":
                return self._healthy(lease, now)
            case "unhealthy":
                return self._unhealthy(lease, report.detail, now)
            case "exited":
                return self._exited(lease, report.detail, now)
            case "failed":
                reason, _, text = report.detail.partition(":")
                known = reason in REASONS
                reason, text = (reason, text.strip()) if known else ("start-failed", report.detail)
                return self._end(lease, Signal.EXITED, FAILED, reason, text, now)
            case _:
                return []

    def _healthy(self, lease: Lease, now: float) -> list[Action]:
        state = TRANSITIONS.get((lease.state, Signal.HEALTHY))
        lease.healthy = True
        if state is None:
            return []
        lease.state = state
        if state == DEPLOYING:
            lease.repeat_at = now + lease.repeat_s
        return self._tell(lease, "healthy", "", now)

    def _unhealthy(self, lease: Lease, detail: str, now: float) -> list[Action]:
        if TRANSITIONS.get((lease.state, Signal.UNHEALTHY)) == DEGRADED:
            lease.state, lease.healthy = DEGRADED, False
            return self._tell(lease, "unhealthy", detail, now)
        return self._end(lease, Signal.UNHEALTHY, FAILED, "unhealthy", detail, now)

    def _exited(self, lease: Lease, code: str, now: float) -> list[Action]:
        if code == "0":
            return self._end(lease, Signal.EXITED, COMPLETED, "completed", "", now, keep_logs=True)
        return self._end(lease, Signal.EXITED, FAILED, "exited", f"exit code {code}", now, keep_logs=True)

    def _end(
        self, lease: Lease, signal: Signal, outcome: int, reason: str, text: str, now: float, *, keep_logs: bool = False
    ) -> list[Action]:
        if (lease.state, signal) not in TRANSITIONS:
            return []
        had_container = lease.has_container
        lease.state, lease.outcome, lease.repeat_at = ENDED, outcome, None
        lease.stop_at = now + KEEP_LOGS_S if keep_logs else None
        stop: list[Action] = [Stop(lease.order_id)] if had_container and not keep_logs else []
        return [*self._tell(lease, reason, text, now), *stop]

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake(self, now: float) -> list[Action]:
        if not self._live:
            return []
        actions: list[Action] = []
        if self._adopt_at is not None and self._adopt_at <= now:
            self._adopt_at = None
            actions += [action for lease in self._leases.values() for action in self._missing(lease, now)]
        for lease in self._leases.values():
            if lease.deadline is not None and lease.deadline <= now:
                actions += self._overdue(lease, now)
        return actions

    def _missing(self, lease: Lease, now: float) -> list[Action]:
        """A lease whose container was not found after a restart."""
        if lease.adopted or not lease.has_container:
            return []
        lease.adopted = True
        if lease.state == DEPLOYING and lease.workload is not None:  # stopped between journal and start
            known = self._state is not None and lease.order_id in self._state.orders
            return [self._deploy(lease)] if known else []
        return self._end(lease, Signal.EXITED, FAILED, "exited", "the container is gone", now)

    def _overdue(self, lease: Lease, now: float) -> list[Action]:
        if lease.state == ENDED:
            lease.stop_at = None
            return [Stop(lease.order_id)]
        if lease.state < RUNNING and lease.deploy_by is not None and lease.deploy_by <= now:
            reason = "no-ticket" if lease.state == PLACED else "deploy-timeout"
            return self._end(lease, Signal.OVER, FAILED, reason, "", now)
        lease.repeat_s *= 2
        lease.repeat_at = now + lease.repeat_s
        return self._tell(lease, "healthy", "", now)

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tell(self, lease: Lease, reason: str, text: str, now: float) -> list[Action]:
        lease.reason = reason
        if lease.sequence >= MAX_EVENTS:
            return [lease.record, lease.note(text)]
        event = LeaseEvent(
            lease.order_id,
            self._keys.public_key,
            lease.sequence,
            lease.state,
            lease.outcome,
            reason,
            clipped(text),
            int(now * 1000),
            lease.port,
        )
        lease.event, lease.sequence = seal(event, self._keys, self._network), lease.sequence + 1
        return [lease.record, lease.publication, lease.note(text)]


def _refuse(call: Incoming, text: str) -> Reply:
    return Reply(call.call_id, encode(DeployReply(0, clipped(text))))
