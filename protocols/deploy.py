"""Deployment and life of a lease: tickets, events, READY, witness windows (`protocols/README.md`, "Leases").

The messages, the documented reasons, and what is valid on the topic `lease`. The parts are played by `lease_worker`,
`lease_witness` (the seats of the deploy committee) and `lease_client`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import U8, U16, U32, U64, AtMost, Bytes32, Count, Text64, Text256, decode, message
from kaisar_p2p.wire.envelope import Verified
from kaisar_p2p.wire.judge import judge_signature, peek_signed
from kaisar_p2p.wire.verdict import Verdict
from protocols.committees import verify_certificate
from protocols.interpreter.state import ORDER_CLOSED, OrderState, State
from protocols.orders import Workload
from protocols.quorum import Committee, QuorumCertificate, ReadyCore, TicketCore, WitnessCore

DEPLOY_PROTOCOL = "/kaisar/deploy/1"
TUNNEL_PROTOCOL = "/kaisar/tunnel/1"
UP, DOWN, GONE = 1, 2, 3
"""What a witness sees of a window: the program answers; only its worker does; not even the worker does."""
WITNESSED = frozenset({UP, DOWN, GONE})

PLACED, AUTHORISED, DEPLOYING, RUNNING, DEGRADED, ENDED = range(1, 7)
STATE_NAMES = {1: "PLACED", 2: "AUTHORISED", 3: "DEPLOYING", 4: "RUNNING", 5: "DEGRADED", 6: "ENDED"}
OPEN, COMPLETED, CANCELLED, FAILED, EXPIRED = range(5)
OUTCOME_NAMES = {0: "open", 1: "completed", 2: "cancelled", 3: "failed", 4: "expired"}

LEASE_TOPIC = "lease"
REASONS = {
    "deploying": "the worker has the ticket and starts the container",
    "healthy": "the container's first port accepts connections; the committee looks for itself",
    "ready": "the committee reached the container through the tunnel",
    "unhealthy": "the first port does not accept connections",
    "image-not-found": "no such image, here or in its registry",
    "start-failed": "the container could not be created or started",
    "exited": "the program ended with an error",
    "completed": "the program ended by itself, without an error",
    "expired": "the time that was paid for is over",
    "cancelled": "the client cancelled the order",
    "settled": "the ledger closed the order",
    "no-ticket": "no quorum authorised the order in time",
    "deploy-timeout": "the committee could not reach the container in time",
    "worker-lost": "the committee did not reach the lease for several windows in a row",
}
"""Every reason in a lease event or a client's note. A runtime's error may begin with one of them and a colon."""
LEASE_BYTES_MAX = 8_192
MAX_EVENTS = 4_096
"""Lease events of one order; an honest worker sends a handful."""
MAX_SKEW_MS = 60_000


@message(74)
@dataclass(frozen=True)
class DeployOrder:
    """Seat or client → worker on `/kaisar/deploy/1`.

    Seats leave `workload` an empty tuple: the worker got it with the offer request, and clients send it again.
    """

    ticket: QuorumCertificate
    workload: Annotated[tuple[Workload, ...], Count(1)]


@message(75)
@dataclass(frozen=True)
class DeployReply:
    """`accepted` 1 or 0 with a reason."""

    accepted: U8
    text: Text256


@message(76)
@dataclass(frozen=True)
class LeaseEvent:
    """Worker → everybody, signed, topic `lease`.

    `sequence` grows by one; `state` as in STATE_NAMES; `outcome` when ENDED; `reason` one of REASONS. `port` is what
    witnesses connect to: the workload's first one, or 0 when it has none.
    """

    DOMAIN: ClassVar[str] = "kaisar/lease"
    order_id: Bytes32
    worker: Bytes32
    sequence: U32
    state: U8
    outcome: U8
    reason: Text64
    text: Text256
    at_ms: U64
    port: U16


@message(77)
@dataclass(frozen=True)
class TunnelOpen:
    """First frame on `/kaisar/tunnel/1`, from the lease's client or, for "tcp", from a witness.

    `service` is "tcp", "logs" or "exec". "tcp" to port 0 only asks whether the container runs: for programs without a
    port. After a TunnelReply with `accepted` 1: "tcp" carries raw bytes both ways; "logs" a stream of raw log bytes;
    "exec" frames of one channel byte (0 stdin, 1 stdout, 2 stderr, 3 exit code as text) and data.
    """

    order_id: Bytes32
    service: Text64
    port: U16
    arguments: Annotated[tuple[Annotated[str, AtMost(4096)], ...], Count(64)]


@message(78)
@dataclass(frozen=True)
class TunnelReply:
    """`accepted` 1, or 0 with a reason for people."""

    accepted: U8
    text: Text256


# ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────────

LeaseMessage = Verified[LeaseEvent] | QuorumCertificate


def committee_of(order: OrderState) -> Committee:
    """The order's deploy committee, which also witnesses the lease."""
    return Committee(order.seats, order.threshold)


def ticket_of(order_id: bytes, order: OrderState) -> TicketCore:
    """The one ticket that the ledger allows for this order."""
    return TicketCore(order_id, order.worker, order.client_key, order.offer_hash)


def is_about(core: TicketCore | ReadyCore | WitnessCore, order: OrderState) -> bool:
    """Whether a core says about this order what the ledger says."""
    if isinstance(core, TicketCore):
        return core == ticket_of(core.order_id, order)
    return core.worker == order.worker and (not isinstance(core, WitnessCore) or core.status in WITNESSED)


def validate_lease(data: bytes, received_at: float, state: State) -> tuple[Verdict, str, LeaseMessage | None]:
    """Gossip on `lease`: a worker's signed event, or the certificate of a ticket or of READY. Under 1 ms.

    `received_at` in seconds since the Unix epoch; never raises.
    """
    if data[1:2] == bytes([QuorumCertificate.TAG]):  # type: ignore[attr-defined]
        return _validate_lease_certificate(data, state)
    return _validate_lease_event(data, received_at, state)


def _validate_lease_certificate(data: bytes, state: State) -> tuple[Verdict, str, QuorumCertificate | None]:
    # [REJECT] It is a canonical certificate of a ticket or of READY; others belong to the topic `certificate`.
    if len(data) > LEASE_BYTES_MAX:
        return Verdict.REJECT, "too large", None
    try:
        certificate = decode(QuorumCertificate, data)
    except DecodeError as error:
        return Verdict.REJECT, error.message, None
    core = certificate.core
    if not isinstance(core, TicketCore | ReadyCore):
        return Verdict.REJECT, "not a certificate of a lease", None
    order = state.orders.get(core.order_id)
    # [IGNORE] The order is known; it may be in a block that is not here yet.
    if order is None:
        return Verdict.IGNORE, "unknown order", None
    # [REJECT] It says about the order what the ledger says.
    if not is_about(core, order):
        return Verdict.REJECT, "not what the ledger says about the order", None
    # [IGNORE] The order is not settled: nobody needs an old certificate.
    if order.status == ORDER_CLOSED:
        return Verdict.IGNORE, "the order is settled", None
    # [REJECT] A quorum of the order's seats signed it.
    if not verify_certificate(certificate, committee_of(order), state.network):
        return Verdict.REJECT, "no quorum signed it", None
    return Verdict.ACCEPT, "", certificate


def _validate_lease_event(
    data: bytes, received_at: float, state: State
) -> tuple[Verdict, str, Verified[LeaseEvent] | None]:
    seen = peek_signed(LeaseEvent, data, LEASE_BYTES_MAX)
    # [REJECT] It is a canonical envelope of a lease event.
    if seen is None:
        return Verdict.REJECT, "not a lease event", None
    signer, event = seen
    # [REJECT] The worker that it names signed it, and it makes sense in itself.
    if signer != event.worker or not _plausible(event):
        return Verdict.REJECT, "impossible lease event", None
    # [IGNORE] It is not from the future.
    if event.at_ms > received_at * 1000 + MAX_SKEW_MS:
        return Verdict.IGNORE, "from the future", None
    order = state.orders.get(event.order_id)
    # [IGNORE] The order is known; it may be in a block that is not here yet.
    if order is None:
        return Verdict.IGNORE, "unknown order", None
    # [REJECT] The lease is on that worker.
    if order.worker != event.worker:
        return Verdict.REJECT, "another worker's order", None
    # [IGNORE] The order is not settled, or this is its end.
    if order.status == ORDER_CLOSED and event.state != ENDED:
        return Verdict.IGNORE, "the order is settled", None
    # [REJECT] The signature is right.
    return judge_signature(LeaseEvent, data, state.network)


def _plausible(event: LeaseEvent) -> bool:
    if not DEPLOYING <= event.state <= ENDED or event.reason not in REASONS or event.sequence >= MAX_EVENTS:
        return False
    return COMPLETED <= event.outcome <= EXPIRED if event.state == ENDED else event.outcome == OPEN
