"""Deployment and life of a lease: tickets, events, READY, witness windows (`protocols/README.md`, "Leases")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, AtMost, Bytes32, Count, Text64, Text256, message
from protocols.orders import Workload
from protocols.quorum import QuorumCertificate

DEPLOY_PROTOCOL = "/kaisar/deploy/1"
TUNNEL_PROTOCOL = "/kaisar/tunnel/1"
UP, DOWN = 1, 2

PLACED, AUTHORISED, DEPLOYING, RUNNING, DEGRADED, ENDED = range(1, 7)
STATE_NAMES = {1: "PLACED", 2: "AUTHORISED", 3: "DEPLOYING", 4: "RUNNING", 5: "DEGRADED", 6: "ENDED"}
OPEN, COMPLETED, CANCELLED, FAILED, EXPIRED = range(5)
OUTCOME_NAMES = {0: "open", 1: "completed", 2: "cancelled", 3: "failed", 4: "expired"}


@message(74)
@dataclass(frozen=True)
class DeployOrder:
    """Seat or client → worker on `/kaisar/deploy/1`. Seats leave `workload` an empty tuple: the worker got it with the offer request."""

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
    """Worker → everybody, signed, topic `lease`. `sequence` grows by one; `state` as in STATE_NAMES; `outcome` when ENDED."""

    DOMAIN: ClassVar[str] = "kaisar/lease"
    order_id: Bytes32
    worker: Bytes32
    sequence: U32
    state: U8
    outcome: U8
    reason: Text64
    text: Text256
    at_ms: U64


@message(77)
@dataclass(frozen=True)
class TunnelOpen:
    """First frame on `/kaisar/tunnel/1`. `service` is "tcp", "logs" or "exec"; the peer must be the lease's client or a witness.

    After a TunnelReply with `accepted` 1: "tcp" carries raw bytes both ways; "logs" a stream of raw log bytes; "exec" frames
    of one channel byte (0 stdin, 1 stdout, 2 stderr, 3 exit code as text) and data.
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
