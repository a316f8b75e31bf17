"""Quorum certificates: T signatures of a drawn committee on identical bytes.

A *core* is the message that every agreeing seat signs, bit for bit the same. Four kinds of core exist; each has its own
domain and its own committee. `protocols/README.md` describes parameters, state, messages and rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, Bytes32, Bytes64, Count, encode, message
from kaisar_p2p.wire.crypto import verify

MAX_SEATS = 64


@message(23)
@dataclass(frozen=True)
class VerdictCore:
    """A check's outcome: `verdict` is popw.PASS, LATE, WRONG, SILENT or BADJOB; `commit` is zero if there was none."""

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
    """What the seat saw of a lease in one window (= slot): `status` is deploy.UP, DOWN or GONE."""

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


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────

C = TypeVar("C", VerdictCore, TicketCore, ReadyCore, WitnessCore)
_TOKEN = object()


class SignedCore(Generic[C]):
    """A seat's signature on a core that was checked; only `check_signature` makes one, and only these are counted."""

    __slots__ = ("core", "seat", "signature")
    core: C

    def __init__(self, core: C, seat: int, signature: bytes, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("only check_signature() makes a SignedCore")
        self.core = core
        self.seat = seat
        self.signature = signature

    def __repr__(self) -> str:
        return f"SignedCore({self.core!r}, seat={self.seat})"


def check_signature(core: C, seat: int, signature: bytes, committee: Committee, network: bytes) -> SignedCore[C] | None:
    """The vote if `seat` of the committee signed `core` (64 bytes under the core's domain), else None; never raises."""
    if not 0 <= seat < len(committee.seats):
        return None
    if not verify(committee.seats[seat], core.DOMAIN, network, encode(core), signature):
        return None
    return SignedCore(core, seat, signature, _TOKEN)


def subject_of(core: Core) -> tuple[Any, ...]:
    """What a seat may sign only one core on: two different cores with one subject are a double vote."""
    match core:
        case VerdictCore():
            return (VerdictCore.TAG, core.slot, core.worker)  # type: ignore[attr-defined]
        case TicketCore():
            return (TicketCore.TAG, core.order_id)  # type: ignore[attr-defined]
        case ReadyCore():
            return (ReadyCore.TAG, core.order_id)  # type: ignore[attr-defined]
        case WitnessCore():
            return (WitnessCore.TAG, core.order_id, core.slot)  # type: ignore[attr-defined]


class VoteCounter(Generic[C]):
    """Counts the votes of one committee on one subject; holds at most one vote of each seat.

    A seat's first vote stands. The certificate comes once, as soon as one core has `threshold` votes.
    """

    def __init__(self, committee: Committee) -> None:
        self._committee = committee
        self._votes: dict[int, SignedCore[C]] = {}
        self.certificate: QuorumCertificate | None = None

    def __len__(self) -> int:
        return len(self._votes)

    def vote_of(self, seat: int) -> SignedCore[C] | None:
        """The seat's vote, if it was counted: compare it before `add` to find a double vote."""
        return self._votes.get(seat)

    def add(self, vote: SignedCore[C]) -> QuorumCertificate | None:
        """Count a vote; returns the certificate when this vote completes it, and None otherwise."""
        if vote.seat in self._votes or vote.seat >= len(self._committee.seats):
            return None
        self._votes[vote.seat] = vote
        if self.certificate is not None:
            return None
        self.certificate = self._complete(vote.core)
        return self.certificate

    def _complete(self, core: C) -> QuorumCertificate | None:
        agreeing = [self._votes[seat] for seat in sorted(self._votes) if self._votes[seat].core == core]
        if len(agreeing) < max(1, self._committee.threshold):
            return None
        mask = sum(1 << vote.seat for vote in agreeing)
        return QuorumCertificate(core, mask, tuple(vote.signature for vote in agreeing))
