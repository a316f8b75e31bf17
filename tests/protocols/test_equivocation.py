"""Evidence: each kind shows its offender, and nothing that an honest node signs shows anything."""

from __future__ import annotations

import struct
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.hardware.prove import NumpyBackend
from kaisar_p2p.wire import matproof, vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Signed, seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.adverts import GPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.epochs import HeaderVote
from protocols.equivocation import (
    DoubleChallenge,
    DoubleCommit,
    DoubleHeader,
    DoubleVote,
    Evidence,
    FalsePass,
    LazyCheck,
    WrongResult,
    context_of,
    evidence_id,
    validate_evidence,
    verify_evidence,
)
from protocols.interpreter.state import ACTIVE, State, WorkerState
from protocols.params import MAINNET
from protocols.popw import (
    PASS,
    SILENT,
    Challenge,
    Commit,
    PrivatePart,
    Vote,
    commit_hash,
    core_hash,
    sample_input,
    seed_of,
)
from protocols.quorum import Core, ReadyCore, VerdictCore, WitnessCore

NETWORK = sha256(b"evidence").digest()
PARAMS = replace(MAINNET, job_n=64, job_k=64, job_tile=4, job_rounds=2)  # 256 tiles: a sample misses most of them
JOB = PARAMS.job
SLOT, EPOCH, BEACON = 5, 0, bytes(range(32))
SPEC = Spec(GPU_CLASS, 1, 1, 1, 1, 1, "")
WORKER = KeyPair.from_seed(sha256(b"w").digest())
KEYS = {k.public_key: k for k in (KeyPair.from_seed(sha256(b"s%d" % i).digest()) for i in range(7))}
STATE = State(
    NETWORK,
    PARAMS,
    number=SLOT * PARAMS.slot_blocks,
    registries=Map({EPOCH: tuple(sorted((key, 10**20) for key in KEYS))}),
    beacons=Map({SLOT: BEACON}),
    workers=Map({WORKER.public_key: WorkerState(bytes(32), SPEC, 1, 0, ACTIVE, 0)}),
)
CONTEXT = context_of(STATE)
_committee = check_committee(STATE, SLOT, WORKER.public_key)
assert _committee is not None
HOLDERS = [KEYS[key] for key in _committee.seats]


def signed(message: object, keys: KeyPair) -> Signed:
    return decode(Signed, seal(message, keys, NETWORK))


def challenge(seat: int, value: bytes = bytes(32)) -> Challenge:
    return Challenge(EPOCH, SLOT, WORKER.public_key, seat, value)


def run(wrong: slice | None = None) -> tuple[Commit, list[matproof.Tags]]:
    """A commitment of five seats; a cheat goes on consistently from its own wrong first round."""
    values = tuple(challenge(seat).value for seat in range(5))
    signatures = tuple(signed(challenge(seat), HOLDERS[seat]).signature for seat in range(5))
    empty = Commit(EPOCH, SLOT, WORKER.public_key, JOB.pack(), 0b11111, values, signatures, ())
    seed = seed_of(empty, BEACON, NETWORK)
    proof = NumpyBackend().prove(JOB, seed)
    tags, roots = list(proof.tags), list(proof.roots)
    if wrong is not None:
        tags[0] = tags[0].copy()
        tags[0][wrong] ^= 1
        roots[0] = matproof.tags_root(tags[0])
        second = NumpyBackend().prove(replace_rounds(1), matproof.next_seed(seed, roots[0]))
        tags[1], roots[1] = second.tags[0], second.roots[0]
    return replace(empty, roots=tuple(roots)), tags


def replace_rounds(rounds: int) -> matproof.Job:
    return matproof.Job(JOB.n, JOB.k, JOB.t, rounds)


HONEST, HONEST_TAGS = run()
CHEAT, CHEAT_TAGS = run(slice(0, 128))


def vote(
    seat: int,
    commit: Commit,
    tags: list[matproof.Tags],
    *,
    q: int = PARAMS.samples,
    digest: bytes = b"",
    proof: bytes = b"",
) -> tuple[Vote, matproof.CheckResult]:
    """A PASS vote, honest unless `digest` or `proof` say otherwise."""
    keys, commitment = HOLDERS[seat], commit_hash(commit, NETWORK)
    proof = proof or vrf.prove(keys.seed, sample_input(commitment))
    randomness = vrf.proof_to_hash(proof)
    result = matproof.check(JOB, seed_of(commit, BEACON, NETWORK), commit.roots, tags, randomness, q)
    core = VerdictCore(EPOCH, SLOT, WORKER.public_key, commitment, PASS)
    private = PrivatePart(core_hash(core, NETWORK), seat, 1, proof, digest or result.digest)
    signatures = [keys.sign(each.DOMAIN, NETWORK, encode(each)) for each in (core, private)]
    return Vote(core, signatures[0], private, signatures[1]), result


def wrong_result(commit: Commit, tags: list[matproof.Tags], round_index: int, tile: int) -> WrongResult:
    chunk, path = matproof.chunk_path(tags[round_index], tile)
    return WrongResult(signed(commit, WORKER), round_index, tile, chunk, path)


def double_vote(first: Core, second: Core) -> DoubleVote:
    keys = HOLDERS[0]
    signatures = [keys.sign(core.DOMAIN, NETWORK, encode(core)) for core in (first, second)]
    return DoubleVote(keys.public_key, first, signatures[0], second, signatures[1])


def double_header(first: HeaderVote, second: HeaderVote) -> DoubleHeader:
    keys = HOLDERS[0]
    signatures = [keys.sign(each.DOMAIN, NETWORK, encode(each)) for each in (first, second)]
    return DoubleHeader(keys.public_key, first, signatures[0], second, signatures[1])


def guilty_sample() -> tuple[Vote, tuple[int, int]]:
    """A seat whose own sample holds a wrong tile, and that votes PASS all the same."""
    for seat in range(7):
        false, result = vote(seat, CHEAT, CHEAT_TAGS)
        if result.first_bad:
            return false, result.first_bad
    raise AssertionError("half of a round is wrong")


CORE = VerdictCore(EPOCH, SLOT, WORKER.public_key, commit_hash(HONEST, NETWORK), PASS)
SILENT_CORE = replace(CORE, commit=bytes(32), verdict=SILENT)
HEADER = HeaderVote(3, 0, bytes(32))
FALSE, BAD = guilty_sample()
WRONG = wrong_result(CHEAT, CHEAT_TAGS, 0, 100)
COPIED = vote(4, HONEST, HONEST_TAGS)[0].private.digest
OTHER_PROOF = vrf.prove(HOLDERS[2].seed, b"another input")

SEAT, PROVIDER = HOLDERS[0].public_key, WORKER.public_key
GUILTY: list[tuple[Evidence, bytes]] = [
    (double_vote(CORE, SILENT_CORE), SEAT),
    (double_vote(WitnessCore(bytes(32), bytes(32), 1, 1), WitnessCore(bytes(32), bytes(32), 1, 2)), SEAT),
    (DoubleChallenge(signed(challenge(0), HOLDERS[0]), signed(challenge(0, b"\x01" * 32), HOLDERS[0])), SEAT),
    (DoubleCommit(signed(HONEST, WORKER), signed(CHEAT, WORKER)), PROVIDER),
    (double_header(HEADER, replace(HEADER, header_hash=b"\x01" * 32)), SEAT),
    (WRONG, PROVIDER),
    (LazyCheck(vote(3, HONEST, HONEST_TAGS, digest=b"\x05" * 32)[0], signed(HONEST, WORKER)), HOLDERS[3].public_key),
    (LazyCheck(vote(3, HONEST, HONEST_TAGS, digest=COPIED)[0], signed(HONEST, WORKER)), HOLDERS[3].public_key),
    (LazyCheck(vote(2, HONEST, HONEST_TAGS, proof=OTHER_PROOF)[0], signed(HONEST, WORKER)), HOLDERS[2].public_key),
    (FalsePass(FALSE, wrong_result(CHEAT, CHEAT_TAGS, *BAD)), HOLDERS[FALSE.private.seat].public_key),
]
INNOCENT: list[Evidence] = [
    double_vote(CORE, CORE),
    double_vote(CORE, replace(SILENT_CORE, slot=SLOT + 1)),
    double_vote(ReadyCore(bytes(32), bytes(32)), WitnessCore(bytes(32), bytes(32), 1, 1)),
    replace(double_vote(CORE, SILENT_CORE), second_signature=bytes(64)),
    replace(double_vote(CORE, SILENT_CORE), signer=HOLDERS[1].public_key),
    DoubleChallenge(signed(challenge(0), HOLDERS[0]), signed(challenge(0), HOLDERS[0])),
    DoubleChallenge(signed(challenge(0), HOLDERS[0]), signed(challenge(1), HOLDERS[1])),
    DoubleChallenge(signed(challenge(0), HOLDERS[0]), signed(replace(challenge(0), slot=6), HOLDERS[0])),
    DoubleChallenge(signed(challenge(0), HOLDERS[0]), replace(signed(challenge(1), HOLDERS[0]), signature=bytes(64))),
    DoubleChallenge(signed(challenge(0), HOLDERS[0]), Signed(b"\xc1", SEAT, bytes(64))),
    DoubleCommit(signed(HONEST, WORKER), signed(HONEST, WORKER)),
    DoubleCommit(signed(HONEST, WORKER), signed(CHEAT, HOLDERS[0])),  # somebody else signed it
    DoubleCommit(signed(HONEST, WORKER), signed(replace(CHEAT, slot=6), WORKER)),
    double_header(HEADER, HEADER),
    double_header(HEADER, replace(HEADER, round=1, header_hash=b"\x01" * 32)),
    wrong_result(HONEST, HONEST_TAGS, 0, 100),
    wrong_result(HONEST, HONEST_TAGS, 1, 255),
    wrong_result(CHEAT, CHEAT_TAGS, 0, 200),  # the right half
    wrong_result(CHEAT, CHEAT_TAGS, 1, 3),  # consistent with the wrong first round
    replace(WRONG, round=2),
    replace(WRONG, tile=256),
    replace(WRONG, chunk=WRONG.chunk[:-1]),
    replace(WRONG, chunk=bytes(len(WRONG.chunk))),
    replace(WRONG, path=(bytes(32),)),
    replace(WRONG, commit=replace(WRONG.commit, signature=bytes(64))),
    replace(WRONG, commit=signed(replace(CHEAT, job=struct.pack("<IIHH", 131072, 131072, 256, 1)), WORKER)),
    replace(WRONG, commit=signed(replace(CHEAT, roots=CHEAT.roots[:1]), WORKER)),
    replace(WRONG, commit=signed(replace(CHEAT, slot=77), WORKER)),
    LazyCheck(vote(3, HONEST, HONEST_TAGS)[0], signed(HONEST, WORKER)),
    LazyCheck(vote(3, HONEST, HONEST_TAGS, q=PARAMS.registration_samples)[0], signed(HONEST, WORKER)),
    LazyCheck(vote(3, HONEST, HONEST_TAGS, digest=b"\x05" * 32)[0], signed(CHEAT, WORKER)),
    LazyCheck(
        replace(vote(3, HONEST, HONEST_TAGS, digest=b"\x05" * 32)[0], private_signature=bytes(64)),
        signed(HONEST, WORKER),
    ),
    FalsePass(vote(3, HONEST, HONEST_TAGS)[0], wrong_result(HONEST, HONEST_TAGS, 0, 1)),
    FalsePass(FALSE, wrong_result(CHEAT, CHEAT_TAGS, 0, 200)),
    FalsePass(replace(FALSE, core_signature=bytes(64)), wrong_result(CHEAT, CHEAT_TAGS, *BAD)),
]


@pytest.mark.parametrize(("evidence", "offender"), GUILTY, ids=lambda each: type(each).__name__)
def test_evidence_shows_its_offender(evidence: Evidence, offender: bytes) -> None:
    assert verify_evidence(evidence, CONTEXT) == offender
    assert validate_evidence(encode(evidence), 0.0, STATE)[0] is Verdict.ACCEPT


@pytest.mark.parametrize("evidence", INNOCENT, ids=lambda each: type(each).__name__)
def test_what_shows_nothing_names_nobody(evidence: Evidence) -> None:
    assert verify_evidence(evidence, CONTEXT) is None
    assert validate_evidence(encode(evidence), 0.0, STATE)[0] is not Verdict.ACCEPT


def test_a_false_pass_needs_a_tile_that_the_seat_sampled() -> None:
    picks = matproof.samples(JOB, vrf.proof_to_hash(FALSE.private.vrf_proof), PARAMS.samples)
    tile = next(tile for tile in range(128) if (0, tile) not in picks)
    assert verify_evidence(FalsePass(FALSE, wrong_result(CHEAT, CHEAT_TAGS, 0, tile)), CONTEXT) is None


@pytest.mark.parametrize("evidence", [GUILTY[5][0], GUILTY[6][0], GUILTY[9][0]], ids=lambda each: type(each).__name__)
def test_gossip_evidence__ignore_an_unknown_slot(evidence: Evidence) -> None:
    unknown = replace(STATE, beacons=Map())
    assert validate_evidence(encode(evidence), 0.0, unknown)[0] is Verdict.IGNORE
    assert verify_evidence(evidence, context_of(unknown)) is None


@pytest.mark.parametrize(("evidence", "offender"), GUILTY, ids=lambda each: type(each).__name__)
def test_gossip_evidence__ignore_keys_that_nothing_depends_on(evidence: Evidence, offender: bytes) -> None:
    """Otherwise anybody could make as much evidence against keys of its own as it likes."""
    nobody = replace(STATE, registries=Map({EPOCH: ((bytes(32), 1),)}), workers=Map())
    assert validate_evidence(encode(evidence), 0.0, nobody)[0] is Verdict.IGNORE


def test_evidence_is_small() -> None:
    sizes = {type(evidence).__name__: len(encode(evidence)) for evidence, _ in GUILTY}
    assert sizes["DoubleVote"] < 450 and sizes["DoubleChallenge"] < 450
    assert sizes["WrongResult"] < 4096 + 1500


def test_evidence_has_one_name() -> None:
    names = {evidence_id(evidence, NETWORK) for evidence, _ in GUILTY}
    assert len(names) == len(GUILTY)


@given(st.integers(0, len(GUILTY) - 1), st.integers(0, 2**32), st.integers(1, 255), st.binary(max_size=200))
def test_no_bytes_raise(index: int, position: int, value: int, noise: bytes) -> None:
    """A changed byte may leave evidence standing (the elapsed time of a vote is not judged), but never raises."""
    data = bytearray(encode(GUILTY[index][0]))
    data[position % len(data)] ^= value
    for each in (bytes(data), bytes(data[: position % len(data)]), noise):
        assert validate_evidence(each, 0.0, STATE)[0] in Verdict


def test_gossip_evidence__reject_what_is_too_large() -> None:
    assert validate_evidence(bytes(40_000), 0.0, STATE)[:2] == (Verdict.REJECT, "too large")


def test_the_tags_of_the_cheat_differ() -> None:
    assert np.count_nonzero(HONEST_TAGS[0] != CHEAT_TAGS[0]) == 128
