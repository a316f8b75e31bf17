"""Proof of Physical Work: challenge → commitment → private samples → vote (`protocols/README.md`, "Checks")."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import U16, U32, U64, AtMost, Bytes12, Bytes32, Bytes64, Count, decode, encode, message
from kaisar_p2p.wire.crypto import domain_hash, verify
from kaisar_p2p.wire.envelope import Verified
from kaisar_p2p.wire.judge import judge_signature, peek, peek_signed
from kaisar_p2p.wire.matproof import Job
from kaisar_p2p.wire.verdict import Verdict
from protocols.committees import check_committee, verify_certificate
from protocols.interpreter.state import State
from protocols.params import Params
from protocols.quorum import (
    MAX_SEATS,
    Committee,
    QuorumCertificate,
    SignedCore,
    VerdictCore,
    WitnessCore,
    check_signature,
)

CHALLENGE_PROTOCOL = "/kaisar/challenge/1"
VOTE_PROTOCOL = "/kaisar/vote/1"
COUNTED, REFUSED = b"\x01", b"\x00"
"""The one frame that answers a vote."""
VOTE_DEADLINE_S = 3.0
AGGREGATORS = 2
"""Members that get a vote at first; without a certificate as many more get it, until `MAX_AGGREGATORS` have."""
MAX_AGGREGATORS = 6
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


@message(27)
@dataclass(frozen=True)
class CommitRequest:
    """Seat → seat on `/kaisar/vote/1`: the envelope of the commitment that you voted on, for it is not the one I have.

    Answered by the worker's envelope, or 00. Not signed: it discloses nothing but what the asked seat was sent.
    """

    slot: U32
    worker: Bytes32


# ── what follows from the messages ───────────────────────────────────────────────────────────────────────────────────

ENVELOPE_BYTES_MAX = 16_384
"""Largest envelope of a challenge, commit or assignment: 64 seats at 100 bytes, 16 roots and the frame around them."""
CERTIFICATE_BYTES_MAX = 8_192
NO_COMMIT = bytes(32)
NO_DIGEST = bytes(32)
VOTES_MS = 7_000
"""From the end of a check until its certificate must be out: a round of votes, patience, and another round."""
CHECKED = frozenset({PASS, LATE, WRONG})
"""Verdicts of a seat that recomputed its samples."""


def commit_hash(commit: Commit, network: bytes) -> bytes:
    """The identity of a commitment, 32 bytes; what verdicts name and VRF proofs are made on."""
    return domain_hash(Commit.DOMAIN, network, encode(commit))


def core_hash(core: VerdictCore, network: bytes) -> bytes:
    """The 32 bytes that tie a private part to its core."""
    return domain_hash(VerdictCore.DOMAIN, network, encode(core))


def seed_of(commit: Commit, beacon: bytes, network: bytes) -> bytes:
    """The seed of a run: no seat alone knows it, and nobody before the slot's beacon and all values are out.

    SHA-256 of domain "popw/seed" ‖ network ‖ beacon ‖ LE32 epoch ‖ LE32 slot ‖ worker ‖ job (12) ‖ LE64 mask ‖ values.
    """
    head = struct.pack("<II32s12sQ", commit.epoch, commit.slot, commit.worker, commit.job, commit.mask)
    return domain_hash("popw/seed", network, beacon, head, *commit.values)


def sample_input(commitment: bytes) -> bytes:
    """The VRF input of a seat's samples: they are private until it votes, unique, and bound to the commitment."""
    return b"popw/sample" + commitment


def seats_of(mask: int) -> tuple[int, ...]:
    """The seat numbers of a mask, ascending."""
    return tuple(seat for seat in range(MAX_SEATS) if mask >> seat & 1)


def aggregators(committee: Committee, beacon: bytes, worker: bytes, network: bytes) -> tuple[bytes, ...]:
    """The committee in the order in which its members aggregate: votes go to the first two, then to the next."""
    return tuple(sorted(committee.seats, key=lambda key: domain_hash("popw/agg", network, beacon, worker, key)))


def check_horizon_slots(params: Params) -> int:
    """How many slots back a check can still be under way: its own length, and one slot for the votes."""
    length_ms = params.challenge_wait_ms + params.deadline_ms + params.tags_wait_ms
    return -(-length_ms // max(1, params.slot_ms)) + 1


def recheck_slots(params: Params) -> int:
    """After how many slots a check without a certificate is repeated: when it and its votes are certainly over."""
    length_ms = params.challenge_wait_ms + params.deadline_ms + params.tags_wait_ms + VOTES_MS
    return -(-length_ms // max(1, params.slot_ms))


# ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def validate_challenge(
    data: bytes, peer: bytes, worker: bytes, committee: Committee, state: State
) -> tuple[Verdict, str, Verified[Challenge] | None]:
    """A seat's challenge as its worker sees it; the caller has looked up the committee of the challenge's slot."""
    seen = peek_signed(Challenge, data, ENVELOPE_BYTES_MAX)
    # [REJECT] It is a canonical envelope of a challenge.
    if seen is None:
        return Verdict.REJECT, "not a challenge", None
    signer, challenge = seen
    # [IGNORE] It is for this worker.
    if challenge.worker != worker:
        return Verdict.IGNORE, "for another worker", None
    # [REJECT] The slot lies in the epoch that it names.
    if challenge.epoch != state.params.epoch_of_slot(challenge.slot):
        return Verdict.REJECT, "slot and epoch do not match", None
    # [REJECT] Whoever calls holds that seat and signed it.
    if challenge.seat >= len(committee.seats) or committee.seats[challenge.seat] != signer or signer != peer:
        return Verdict.REJECT, "not that seat's challenge", None
    # [REJECT] The signature is right.
    return judge_signature(Challenge, data, state.network)


def validate_commit(
    data: bytes, own: Challenge, committee: Committee, network: bytes
) -> tuple[Verdict, str, Verified[Commit] | None]:
    """A worker's answer to `own` as that seat sees it; every challenge signature is checked, about 2 ms for 24 seats.

    Otherwise a worker could invent the values of absent seats and compute before it was asked. A commit without the
    seat's own value is fine: its challenge came after the run had started, and T others prove that the run is fresh.
    """
    seen = peek_signed(Commit, data, ENVELOPE_BYTES_MAX)
    # [REJECT] It is a canonical envelope of a commit.
    if seen is None:
        return Verdict.REJECT, "not a commit", None
    signer, commit = seen
    # [REJECT] It is the worker's, on this check.
    if (commit.epoch, commit.slot, commit.worker) != (own.epoch, own.slot, own.worker) or signer != own.worker:
        return Verdict.REJECT, "commit on another check", None
    seats = seats_of(commit.mask)
    # [REJECT] At least T seats of the committee asked, with one value and one signature each.
    if len(seats) < max(1, committee.threshold) or seats[-1] >= len(committee.seats):
        return Verdict.REJECT, "not T seats of the committee", None
    if not len(seats) == len(commit.values) == len(commit.signatures):
        return Verdict.REJECT, "values do not match the mask", None
    # [REJECT] The seat's own value is the one it sent.
    if own.seat in seats and commit.values[seats.index(own.seat)] != own.value:
        return Verdict.REJECT, "not the value that this seat sent", None
    # [REJECT] All signatures are right: the worker's, then those of the challenges.
    verdict, reason, verified = judge_signature(Commit, data, network)
    if verified is not None and not _challenges_signed(commit, seats, committee, network):
        return Verdict.REJECT, "bad signature on a challenge", None
    return verdict, reason, verified


def _challenges_signed(commit: Commit, seats: tuple[int, ...], committee: Committee, network: bytes) -> bool:
    for seat, value, signature in zip(seats, commit.values, commit.signatures, strict=True):
        body = encode(Challenge(commit.epoch, commit.slot, commit.worker, seat, value))
        if not verify(committee.seats[seat], Challenge.DOMAIN, network, body, signature):
            return False
    return True


def tags_bytes_max(job: Job) -> int:
    """Largest frame with the tags of a run."""
    return job.rounds * (4 * job.tiles + 8) + 16


def validate_tags(data: bytes, job: Job) -> Tags | None:
    """The tags of a run if there is one for each tile; whether they match the roots is found when tiles are checked."""
    tags = peek(Tags, data, tags_bytes_max(job))
    if tags is None:
        return None
    fits = len(tags.rounds) == job.rounds and all(len(sent) == 4 * job.tiles for sent in tags.rounds)
    return tags if fits else None


def validate_vote(
    vote: Vote, peer: bytes, committee: Committee, state: State
) -> tuple[Verdict, str, SignedCore[VerdictCore] | None]:
    """A seat's vote as an aggregator sees it, who has looked up the committee of (slot, worker); under 1 ms."""
    core, private, network = vote.core, vote.private, state.network
    # [REJECT] The sender holds that seat.
    if private.seat >= len(committee.seats) or committee.seats[private.seat] != peer:
        return Verdict.REJECT, "not that seat's vote", None
    # [REJECT] Slot and epoch match, the verdict exists and has what belongs to it.
    if core.epoch != state.params.epoch_of_slot(core.slot) or not _well_formed(core, private):
        return Verdict.REJECT, "impossible verdict", None
    # [REJECT] The private part belongs to this core.
    if private.core_hash != core_hash(core, network):
        return Verdict.REJECT, "private part of another core", None
    # [REJECT] Both signatures, and the proof of the samples, are right.
    if not verify(peer, PrivatePart.DOMAIN, network, encode(private), vote.private_signature):
        return Verdict.REJECT, "bad signature on the private part", None
    if core.verdict in CHECKED and vrf.verify(peer, sample_input(core.commit), private.vrf_proof) is None:
        return Verdict.REJECT, "bad proof of the samples", None
    signed = check_signature(core, private.seat, vote.core_signature, committee, network)
    if signed is None:
        return Verdict.REJECT, "bad signature on the core", None
    return Verdict.ACCEPT, "", signed


def _possible(core: VerdictCore) -> bool:
    return core.verdict in VERDICT_NAMES and (core.verdict == SILENT) == (core.commit == NO_COMMIT)


def _well_formed(core: VerdictCore, private: PrivatePart) -> bool:
    if not _possible(core):
        return False
    if core.verdict in CHECKED:
        return len(private.vrf_proof) == vrf.PROOF_BYTES
    return private.vrf_proof == b"" and private.digest == NO_DIGEST


def validate_certificate(
    data: bytes, received_at: float, state: State
) -> tuple[Verdict, str, QuorumCertificate | None]:
    """Gossip on `certificate`: of checks, and of the orders' tickets, READY and witness windows. About 1 ms.

    Two certificates on one check, by two aggregators, are both valid; the caller drops repeated bytes.
    """
    # [REJECT] It is a canonical certificate.
    if len(data) > CERTIFICATE_BYTES_MAX:
        return Verdict.REJECT, "too large", None
    try:
        certificate = decode(QuorumCertificate, data)
    except DecodeError as error:
        return Verdict.REJECT, error.message, None
    core = certificate.core
    if isinstance(core, VerdictCore):
        # [IGNORE] The slot has started here and is remembered; the worker is known.
        if core.slot not in state.beacons or core.worker not in state.workers:
            return Verdict.IGNORE, "unknown slot or worker", None
        # [REJECT] Slot and epoch match, and the verdict is one.
        if core.epoch != state.params.epoch_of_slot(core.slot) or not _possible(core):
            return Verdict.REJECT, "impossible verdict", None
        committee = check_committee(state, core.slot, core.worker)
    else:
        order = state.orders.get(core.order_id)
        # [REJECT] The order is that worker's.
        if order is not None and order.worker != core.worker:
            return Verdict.REJECT, "another worker's order", None
        # [IGNORE] A window that has not begun here.
        if isinstance(core, WitnessCore) and core.slot > state.slot:
            return Verdict.IGNORE, "unknown slot", None
        committee = Committee(order.seats, order.threshold) if order is not None else None
    # [IGNORE] The committee, or the order, is known.
    if committee is None:
        return Verdict.IGNORE, "no committee, or unknown order", None
    # [REJECT] A quorum of the committee signed it.
    if not verify_certificate(certificate, committee, state.network):
        return Verdict.REJECT, "no quorum signed it", None
    return Verdict.ACCEPT, "", certificate


def validate_assignment(
    data: bytes, received_at: float, state: State
) -> tuple[Verdict, str, Verified[Assignment] | None]:
    """Gossip on `assignment`."""
    seen = peek_signed(Assignment, data, ENVELOPE_BYTES_MAX)
    # [REJECT] It is a canonical envelope of an assignment.
    if seen is None:
        return Verdict.REJECT, "not an assignment", None
    signer, assignment = seen
    # [IGNORE] The slot has started here and is remembered.
    if assignment.slot not in state.beacons:
        return Verdict.IGNORE, "unknown slot", None
    # [REJECT] Slot and epoch match.
    if assignment.epoch != state.params.epoch_of_slot(assignment.slot):
        return Verdict.REJECT, "slot and epoch do not match", None
    # [IGNORE] The worker is known.
    if assignment.worker not in state.workers:
        return Verdict.IGNORE, "unknown worker", None
    committee = check_committee(state, assignment.slot, assignment.worker)
    # [IGNORE] So is the registry.
    if committee is None:
        return Verdict.IGNORE, "no committee", None
    # [REJECT] The sender holds a seat, and drew the same committee.
    if signer not in committee.seats or assignment.seats != committee.seats:
        return Verdict.REJECT, "wrong committee", None
    # [REJECT] The signature is right.
    return judge_signature(Assignment, data, state.network)
