"""Proof of Physical Work: challenge → commitment → private samples → vote (`protocols/README.md`, "The check")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U16, U32, U64, AtMost, Bytes12, Bytes32, Bytes64, Count, message
from protocols.quorum import MAX_SEATS, VerdictCore

CHALLENGE_PROTOCOL = "/kaisar/challenge/1"
VOTE_PROTOCOL = "/kaisar/vote/1"
PASS, LATE, WRONG, SILENT, BADJOB = range(1, 6)
VERDICT_NAMES = {PASS: "PASS", LATE: "LATE", WRONG: "WRONG", SILENT: "SILENT", BADJOB: "BADJOB"}
TAG_BYTES_MAX = 4 << 20


@message(20)
@dataclass(frozen=True)
class Challenge:
    """Checker → worker, in an envelope signed by the seat; `value` is fresh randomness."""

    DOMAIN: ClassVar[str] = "popw/chal"
    epoch: U32
    slot: U32
    worker: Bytes32
    seat: U16
    value: Bytes32


@message(21)
@dataclass(frozen=True)
class Commit:
    """Worker → every seat, in an envelope signed by the worker: what it was asked, and the roots of what it computed.

    `values` and `signatures` (of the challenges) are in seat order, one for each bit of `mask`.
    """

    DOMAIN: ClassVar[str] = "popw/commit"
    epoch: U32
    slot: U32
    worker: Bytes32
    job: Bytes12
    mask: U64
    values: Annotated[tuple[Bytes32, ...], Count(MAX_SEATS)]
    signatures: Annotated[tuple[Bytes64, ...], Count(MAX_SEATS)]
    roots: Annotated[tuple[Bytes32, ...], Count(16)]


@message(22)
@dataclass(frozen=True)
class Tags:
    """Worker → every seat, after the commit and not time-critical: little-endian u32 tags of each round."""

    rounds: Annotated[tuple[Annotated[bytes, AtMost(TAG_BYTES_MAX)], ...], Count(16)]


@message(24)
@dataclass(frozen=True)
class PrivatePart:
    """What a seat alone can know: its time, its VRF proof on the commitment, the digest of the tiles it recomputed."""

    DOMAIN: ClassVar[str] = "popw/vote"
    core_hash: Bytes32
    seat: U16
    elapsed_ms: U32
    vrf_proof: Annotated[bytes, AtMost(80)]
    digest: Bytes32


@message(25)
@dataclass(frozen=True)
class Vote:
    """Seat → aggregators: the signature on the core, and the private part with a signature of its own."""

    core: VerdictCore
    core_signature: Bytes64
    private: PrivatePart
    private_signature: Bytes64


@message(26)
@dataclass(frozen=True)
class Assignment:
    """Gossip for observers: the committee of a slot as the sender computed it."""

    DOMAIN: ClassVar[str] = "popw/assignment"
    epoch: U32
    slot: U32
    worker: Bytes32
    seats: Annotated[tuple[Bytes32, ...], Count(MAX_SEATS)]
