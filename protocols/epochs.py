"""Messages of the epoch aggregate: trees of verdicts, rewards and leases, a header, a ≥ 2/3 certificate, one anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, AtMost, Bytes32, Bytes64, Bytes80, Count, Planck, message
from protocols.quorum import QuorumCertificate

FETCH_PROTOCOL = "/kaisar/fetch/1"
VERDICTS, REWARDS, LEASES, EVIDENCE = range(4)
MAX_LEAVES = 1 << 15
"""Rewards, and leases, of an epoch: what a `LeafProof` reaches within 600 bytes."""


@message(40)
@dataclass(frozen=True)
class MixReveal:
    """A checker's share of the next mix: VRF proof on (domain "kaisar/mix" ‖ epoch, 4 bytes big-endian ‖ its mix)."""

    DOMAIN: ClassVar[str] = "kaisar/reveal"
    epoch: U32
    proof: Bytes80


@message(41)
@dataclass(frozen=True)
class EpochHeader:
    """What the epoch committee signs and the ledger anchors. Slots `first_slot`…`last_slot` inclusive."""

    epoch: U32
    round: U16
    first_slot: U32
    last_slot: U32
    previous: Bytes32
    mix: Bytes32
    registry_root: Bytes32
    state_root: Bytes32
    verdict_root: Bytes32
    reward_root: Bytes32
    lease_root: Bytes32
    evidence_root: Bytes32
    log_root: Bytes32
    verdicts: U32
    rewards: U32
    leases: U32
    evidence: U32
    minted_planck: Planck


@message(42)
@dataclass(frozen=True)
class HeaderProposal:
    """Gossip from the round's proposer, signed; members fetch the body from it with FetchRequest."""

    DOMAIN: ClassVar[str] = "kaisar/propose"
    header: EpochHeader


@message(43)
@dataclass(frozen=True)
class HeaderVote:
    """Exactly what a member's signature in the certificate covers; at most one for each (epoch, round)."""

    DOMAIN: ClassVar[str] = "kaisar/epoch"
    epoch: U32
    round: U16
    header_hash: Bytes32


@message(44)
@dataclass(frozen=True)
class EpochCertificate:
    """`mask` is a little-endian bit set over the registry's order; signatures over HeaderVote in that order."""

    mask: Annotated[bytes, AtMost(32)]
    signatures: Annotated[tuple[Bytes64, ...], Count(256)]


@message(45)
@dataclass(frozen=True)
class VerdictLeaf:
    """One check: the certificate's core and hash."""

    epoch: U32
    slot: U32
    worker: Bytes32
    verdict: U8
    votes: U8
    commit: Bytes32
    certificate: Bytes32


@message(46)
@dataclass(frozen=True)
class RewardLeaf:
    """What an account has earned since genesis: cumulative, so that one claim covers all past epochs."""

    account: Bytes32
    cumulative_planck: Planck


@message(47)
@dataclass(frozen=True)
class LeaseLeaf:
    """Witnessed seconds of a lease since its start; `outcome` is deploy.OPEN … EXPIRED.

    `first_window` and `last_window` are the first and the newest slot in which it was certified as UP; 0 for none.
    `fault` is 1 when it failed because its worker was certified as GONE. While it is open, bit i of `gone` and `down`
    says that the window `last_window` + 1 + i was certified as GONE or DOWN; at most 32 windows are remembered.
    """

    order_id: Bytes32
    seconds: U32
    last_window: U32
    outcome: U8
    first_window: U32 = 0
    fault: U8 = 0
    gone: U32 = 0
    down: U32 = 0


@message(48)
@dataclass(frozen=True)
class SignedReveal:
    """A reveal as the body carries it: whose, and its envelope's bytes are not needed because the proof is unique."""

    key: Bytes32
    proof: Bytes80


@message(49)
@dataclass(frozen=True)
class EpochBody:
    """Everything a member needs to rebuild the roots of a header."""

    epoch: U32
    reveals: Annotated[tuple[SignedReveal, ...], Count(256)]
    certificates: Annotated[tuple[QuorumCertificate, ...], Count(65536)]
    rewards: Annotated[tuple[RewardLeaf, ...], Count(65536)]
    leases: Annotated[tuple[LeaseLeaf, ...], Count(65536)]
    evidence: Annotated[tuple[Bytes32, ...], Count(4096)]


@message(50)
@dataclass(frozen=True)
class LeafProof:
    """Inclusion of one leaf (RFC 9162) in one tree of an anchored header; at most 600 bytes, 650 for verdicts."""

    epoch: U32
    tree: U8
    index: U32
    leaf: Annotated[bytes, AtMost(160)]
    path: Annotated[tuple[Bytes32, ...], Count(15)]


@message(51)
@dataclass(frozen=True)
class FetchRequest:
    """On `/kaisar/fetch/1`: the bytes of an object from `offset` on.

    `kind` is "body" (of a proposal; key = header hash), "anchored" (body of an anchored header) or "certificate"
    (key = its hash).
    """

    kind: Annotated[str, AtMost(32)]
    key: Bytes32
    offset: U64


@message(52)
@dataclass(frozen=True)
class FetchReply:
    """A slice of the object and its whole length; length 0 means "not here"."""

    length: U64
    data: Annotated[bytes, AtMost(1 << 18)]
