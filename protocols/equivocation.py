"""Evidence of misbehaviour: self-contained, and verified offline by anybody without a clock, a network or a GPU.

A penalty follows only from what is here. Messages, then their verification, then the rules of the topic `evidence`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire import matproof, vrf
from kaisar_p2p.wire.codec import U16, U32, AtMost, Bytes32, Bytes64, Count, decode_any, encode, message
from kaisar_p2p.wire.crypto import domain_hash, verify
from kaisar_p2p.wire.envelope import Signed, open_signed
from kaisar_p2p.wire.verdict import Verdict
from protocols.committees import check_committee
from protocols.epochs import HeaderVote
from protocols.interpreter.state import State
from protocols.params import Params
from protocols.popw import LATE, PASS, Challenge, Commit, Vote, commit_hash, core_hash, sample_input, seats_of, seed_of
from protocols.quorum import ReadyCore, TicketCore, VerdictCore, WitnessCore, subject_of

EVIDENCE_TOPIC = "evidence"
EVIDENCE_BYTES_MAX = 32_768
M = TypeVar("M")


@message(100)
@dataclass(frozen=True)
class DoubleVote:
    """`signer` signed two different cores on one subject."""

    signer: Bytes32
    first: VerdictCore | TicketCore | ReadyCore | WitnessCore
    first_signature: Bytes64
    second: VerdictCore | TicketCore | ReadyCore | WitnessCore
    second_signature: Bytes64


@message(101)
@dataclass(frozen=True)
class DoubleChallenge:
    """A seat sent a worker two different challenges in one slot."""

    first: Signed
    second: Signed


@message(102)
@dataclass(frozen=True)
class DoubleCommit:
    """A worker committed to two different runs in one slot."""

    first: Signed
    second: Signed


@message(103)
@dataclass(frozen=True)
class DoubleHeader:
    """A member voted for two headers in one round of one epoch."""

    signer: Bytes32
    first: HeaderVote
    first_signature: Bytes64
    second: HeaderVote
    second_signature: Bytes64


@message(104)
@dataclass(frozen=True)
class WrongResult:
    """A worker's commitment holds a wrong tag for `tile` of `round`: the chunk with it, and its path to the root."""

    commit: Signed
    round: U16
    tile: U32
    chunk: Annotated[bytes, AtMost(4 * matproof.CHUNK_TAGS)]
    path: Annotated[tuple[Bytes32, ...], Count(21)]


@message(105)
@dataclass(frozen=True)
class LazyCheck:
    """A seat voted PASS or LATE without having recomputed its samples: its proof or its digest is wrong."""

    vote: Vote
    commit: Signed


@message(106)
@dataclass(frozen=True)
class FalsePass:
    """A seat voted PASS or LATE although its own sample holds the tile that is provably wrong."""

    vote: Vote
    wrong: WrongResult


Evidence = DoubleVote | DoubleChallenge | DoubleCommit | DoubleHeader | WrongResult | LazyCheck | FalsePass
EVIDENCE: tuple[type[Evidence], ...] = Evidence.__args__


@dataclass(frozen=True)
class EvidenceContext:
    """What the ledger says about a slot: its beacon, and the seats that check a worker in it; None when not known."""

    network: bytes
    params: Params
    beacon: Callable[[int], bytes | None]
    seats: Callable[[int, bytes], tuple[bytes, ...] | None]


def context_of(state: State) -> EvidenceContext:
    """The context of the slots that the state remembers."""

    def seats(slot: int, worker: bytes) -> tuple[bytes, ...] | None:
        committee = check_committee(state, slot, worker)
        return committee.seats if committee else None

    return EvidenceContext(state.network, state.params, state.beacons.get, seats)


def evidence_id(evidence: Evidence, network: bytes) -> bytes:
    """The 32-byte name of a piece of evidence."""
    return domain_hash("kaisar/evidence", network, encode(evidence))


def verify_evidence(evidence: Evidence, context: EvidenceContext) -> bytes | None:
    """The offender's machine key, or None when the evidence shows nothing (or its slot is not known); never raises.

    Costs two signatures; one tile for `WrongResult` and `FalsePass`; all samples of a check for `LazyCheck`.
    """
    match evidence:
        case DoubleVote():
            return _double_vote(evidence, context.network)
        case DoubleChallenge():
            return _double_challenge(evidence, context.network)
        case DoubleCommit():
            return _double_commit(evidence, context.network)
        case DoubleHeader():
            return _double_header(evidence, context.network)
        case WrongResult():
            return _wrong_result(evidence, context)
        case LazyCheck():
            return _lazy_check(evidence, context)
        case FalsePass():
            return _false_pass(evidence, context)


def _opened(cls: type[M], signed: Signed, network: bytes) -> tuple[M, bytes] | None:
    """The message and its signer if the signature is right."""
    try:
        verified = open_signed(cls, encode(signed), network)
    except (DecodeError, SignatureError):
        return None
    return verified.message, verified.signer


def _double_vote(evidence: DoubleVote, network: bytes) -> bytes | None:
    first, second = evidence.first, evidence.second
    if first == second or subject_of(first) != subject_of(second):
        return None
    pairs = ((first, evidence.first_signature), (second, evidence.second_signature))
    signed = all(verify(evidence.signer, core.DOMAIN, network, encode(core), signature) for core, signature in pairs)
    return evidence.signer if signed else None


def _double_header(evidence: DoubleHeader, network: bytes) -> bytes | None:
    first, second = evidence.first, evidence.second
    if first == second or (first.epoch, first.round) != (second.epoch, second.round):
        return None
    pairs = ((first, evidence.first_signature), (second, evidence.second_signature))
    signed = all(verify(evidence.signer, vote.DOMAIN, network, encode(vote), signature) for vote, signature in pairs)
    return evidence.signer if signed else None


def _double_challenge(evidence: DoubleChallenge, network: bytes) -> bytes | None:
    first = _opened(Challenge, evidence.first, network)
    second = _opened(Challenge, evidence.second, network)
    if first is None or second is None or first[1] != second[1] or first[0] == second[0]:
        return None
    same = (first[0].slot, first[0].worker) == (second[0].slot, second[0].worker)
    return first[1] if same else None


def _double_commit(evidence: DoubleCommit, network: bytes) -> bytes | None:
    first = _own_commit(evidence.first, network)
    second = _own_commit(evidence.second, network)
    if first is None or second is None or first == second:
        return None
    return first.worker if (first.slot, first.worker) == (second.slot, second.worker) else None


def _own_commit(signed: Signed, network: bytes) -> Commit | None:
    """The commit if the worker that it names signed it."""
    opened = _opened(Commit, signed, network)
    return opened[0] if opened and opened[1] == opened[0].worker else None


def _run_of(signed: Signed, context: EvidenceContext) -> tuple[Commit, list[bytes]] | None:
    """A signed commit to the job that was due, and the seed of each of its rounds."""
    commit = _own_commit(signed, context.network)
    if commit is None or commit.job != context.params.job.pack() or len(commit.roots) != context.params.job.rounds:
        return None
    beacon = context.beacon(commit.slot)
    if beacon is None or len(seats_of(commit.mask)) != len(commit.values):
        return None
    return commit, matproof.round_seeds(seed_of(commit, beacon, context.network), commit.roots)


def _wrong_result(evidence: WrongResult, context: EvidenceContext) -> bytes | None:
    run, job = _run_of(evidence.commit, context), context.params.job
    if run is None or evidence.round >= job.rounds:
        return None
    commit, seeds = run
    tag = matproof.committed_tag(job, commit.roots[evidence.round], evidence.tile, evidence.chunk, evidence.path)
    if tag is None or tag == matproof.tile_tag(job, seeds[evidence.round], evidence.tile):
        return None
    return commit.worker


def _passing_voter(vote: Vote, commit: Commit, context: EvidenceContext) -> bytes | None:
    """The key of the seat that voted PASS or LATE on this commitment, if both of its signatures are right."""
    core, private, network = vote.core, vote.private, context.network
    if core.verdict not in (PASS, LATE) or core.commit != commit_hash(commit, network):
        return None
    seats = context.seats(core.slot, core.worker) or ()
    if (core.slot, core.worker) != (commit.slot, commit.worker) or private.seat >= len(seats):
        return None
    key = seats[private.seat]
    signed = verify(key, core.DOMAIN, network, encode(core), vote.core_signature)
    if not signed or not verify(key, private.DOMAIN, network, encode(private), vote.private_signature):
        return None
    return key if private.core_hash == core_hash(core, network) else None


def _lazy_check(evidence: LazyCheck, context: EvidenceContext) -> bytes | None:
    run = _run_of(evidence.commit, context)
    if run is None:
        return None
    commit, seeds = run
    key = _passing_voter(evidence.vote, commit, context)
    if key is None:
        return None
    private = evidence.vote.private
    randomness = vrf.verify(key, sample_input(evidence.vote.core.commit), private.vrf_proof)
    if randomness is None:
        return key
    return None if private.digest in _right_digests(context.params, seeds, randomness) else key


def _right_digests(params: Params, seeds: list[bytes], randomness: bytes) -> set[bytes]:
    """Digests of an honest seat: with the samples of a usual check, and with those of a registration.

    Which of the two it was depends on the worker's status then, which evidence does not carry; the longer one begins
    with the shorter, so both cost no more than one.
    """
    transcript, digests = hashlib.sha256(b"popw/chk" + randomness), set()
    most = max(params.samples, params.registration_samples)
    for count, (round_index, tile) in enumerate(matproof.samples(params.job, randomness, most), 1):
        product = matproof.tile(params.job, seeds[round_index], tile)
        transcript.update(product.astype("<i4", copy=False).tobytes())
        if count in (params.samples, params.registration_samples):
            digests.add(transcript.digest())
    return digests


def _false_pass(evidence: FalsePass, context: EvidenceContext) -> bytes | None:
    commit, wrong = _own_commit(evidence.wrong.commit, context.network), evidence.wrong
    key = _passing_voter(evidence.vote, commit, context) if commit else None
    if commit is None or key is None:
        return None
    randomness = vrf.verify(key, sample_input(evidence.vote.core.commit), evidence.vote.private.vrf_proof)
    if randomness is None or commit.job != context.params.job.pack():
        return None
    picks = matproof.samples(context.params.job, randomness, context.params.samples)
    if (wrong.round, wrong.tile) not in picks or _wrong_result(wrong, context) is None:
        return None
    return key


# ── gossip ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def validate_evidence(data: bytes, received_at: float, state: State) -> tuple[Verdict, str, Evidence | None]:
    """Gossip on `evidence`. The caller drops repeats by `evidence_id`, before or after: the result is the same."""
    # [REJECT] It is a canonical piece of evidence.
    if len(data) > EVIDENCE_BYTES_MAX:
        return Verdict.REJECT, "too large", None
    try:
        evidence = decode_any(EVIDENCE, data)
    except DecodeError as error:
        return Verdict.REJECT, error.message, None
    # [IGNORE] It concerns somebody who has something at stake: anybody can make keys that sign nonsense.
    if not _at_stake(evidence, state):
        return Verdict.IGNORE, "about a key that nothing depends on", None
    slot = _slot_needed(evidence)
    # [IGNORE] The slot that it needs has started here and is remembered.
    if slot is not None and slot not in state.beacons:
        return Verdict.IGNORE, "unknown slot", None
    # [REJECT] It proves something.
    if verify_evidence(evidence, context_of(state)) is None:
        return Verdict.REJECT, "proves nothing", None
    return Verdict.ACCEPT, "", evidence


def accused(evidence: Evidence) -> bytes:
    """The key whose stake, bond or work the evidence is about, as it says itself: looked at before anything costs."""
    match evidence:
        case DoubleVote() | DoubleHeader():
            return evidence.signer
        case DoubleChallenge() | DoubleCommit():
            return evidence.first.signer
        case WrongResult() | LazyCheck():
            return evidence.commit.signer
        case FalsePass():
            return evidence.wrong.commit.signer


def _at_stake(evidence: Evidence, state: State) -> bool:
    key = accused(evidence)
    return key in state.workers or any(key == member for each in state.registries.values() for member, _ in each)


def _slot_needed(evidence: Evidence) -> int | None:
    """The slot whose beacon or committee the verification needs; None for what needs only signatures."""
    match evidence:
        case LazyCheck() | FalsePass():
            return evidence.vote.core.slot
        case WrongResult():
            try:
                commit = decode_any((Commit,), evidence.commit.body)
            except DecodeError:
                return None
            return commit.slot
        case DoubleVote() | DoubleChallenge() | DoubleCommit() | DoubleHeader():
            return None
