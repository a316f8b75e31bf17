"""Quorum certificates: T signatures of a drawn committee on identical bytes.

A *core* is the message that every agreeing seat signs, bit for bit the same. Four kinds of core exist; each has its own
domain and its own committee. `protocols/README.md` describes parameters, state, messages and rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, Bytes32, Bytes64, Count, message

MAX_SEATS = 64


@message(23)
@dataclass(frozen=True)
class VerdictCore:
    """A check's outcome: `verdict` is one of popw.PASS, LATE, WRONG, SILENT, BADJOB; `commit` is zero when there was none."""

    DOMAIN: ClassVar[str] = "popw/verdict"
    epoch: U32
    slot: U32
    worker: Bytes32
    commit: Bytes32
    verdict: U8


@message(70)
@dataclass(frozen=True)
class TicketCore:
    """Permission for one worker to run one order."""

    DOMAIN: ClassVar[str] = "kaisar/ticket"
    order_id: Bytes32
    worker: Bytes32
    client_key: Bytes32
    offer_hash: Bytes32


@message(71)
@dataclass(frozen=True)
class ReadyCore:
    """The seat connected to the container through a tunnel, as a user would."""

    DOMAIN: ClassVar[str] = "kaisar/ready"
    order_id: Bytes32
    worker: Bytes32


@message(72)
@dataclass(frozen=True)
class WitnessCore:
    """What the seat saw of a lease in one window (= slot): `status` is deploy.UP or deploy.DOWN."""

    DOMAIN: ClassVar[str] = "kaisar/witness"
    order_id: Bytes32
    worker: Bytes32
    slot: U32
    status: U8


Core = VerdictCore | TicketCore | ReadyCore | WitnessCore


@message(30)
@dataclass(frozen=True)
class QuorumCertificate:
    """`mask` has a bit for each seat that signed; `signatures` are in seat order, over the core under its domain."""

    core: VerdictCore | TicketCore | ReadyCore | WitnessCore
    mask: U64
    signatures: Annotated[tuple[Bytes64, ...], Count(MAX_SEATS)]


@message(31)
@dataclass(frozen=True)
class CoreVote:
    """One seat's signature on a core, sent to the aggregators on `/kaisar/vote/1`."""

    core: TicketCore | ReadyCore | WitnessCore
    seat: U16
    signature: Bytes64


@dataclass(frozen=True)
class Committee:
    """The seats (machine keys, seat order) and how many of them make a quorum."""

    seats: tuple[bytes, ...]
    threshold: int
