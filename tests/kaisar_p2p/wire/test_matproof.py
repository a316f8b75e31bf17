"""The compute proof against its definition, against vectors, and against liars."""

import json
import struct
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.hardware.prove import NumpyBackend, Proof
from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.matproof import Job

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "popw.json").read_text())
SEED = bytes(range(32))
JOB = Job(256, 192, 32, 3)


def entries_by_definition(seed: bytes, matrix: int, row: int, k: int) -> np.ndarray[Any, Any]:
    keystream = Cipher(ChaCha20(seed, struct.pack("<IIII", 0, matrix, row, 0)), None).encryptor().update(bytes(k))
    return np.array([(byte & 31) - 16 for byte in keystream], np.int64)


def tag_by_definition(block: np.ndarray[Any, Any]) -> int:
    total, t = 0, len(block)
    for u in range(t):
        for v in range(t):
            x = (int(block[u, v]) + (u * t + v) * 0x9E3779B1) % 2**32
            x ^= x >> 16
            x = x * 0x85EBCA6B % 2**32
            x ^= x >> 13
            x = x * 0xC2B2AE35 % 2**32
            total += x ^ x >> 16
    return total % 2**32


@pytest.mark.parametrize("vector", VECTORS["rows"], ids=lambda vector: str(vector["k"]))
def test_rows_agree_with_the_independent_implementation(vector: dict[str, Any]) -> None:
    row = np.empty((1, vector["k"]), np.float32)
    matproof.fill_rows(row, bytes.fromhex(vector["seed"]), vector["matrix"], vector["row"])
    assert row[0, :16].tolist() == vector["first"]
    assert sha256(row.astype(np.int8).tobytes()).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("vector", VECTORS["proofs"], ids=lambda vector: "x".join(map(str, vector["job"])))
def test_proofs_agree_with_the_independent_implementation(vector: dict[str, Any]) -> None:
    job, seed, randomness = Job(*vector["job"]), bytes.fromhex(vector["seed"]), bytes.fromhex(vector["randomness"])
    assert job.pack().hex() == vector["packed"]
    proof = NumpyBackend().prove(job, seed)
    assert [root.hex() for root in proof.roots] == vector["roots"]
    assert [tags[:8].tolist() for tags in proof.tags] == vector["first_tags"]
    assert [sha256(tags.astype("<u4").tobytes()).hexdigest() for tags in proof.tags] == vector["tags_sha256"]
    assert [list(pick) for pick in matproof.samples(job, randomness, 5)] == vector["samples"]
    result = matproof.check(job, seed, proof.roots, proof.tags, randomness, 5)
    assert result == matproof.CheckResult(True, None, bytes.fromhex(vector["digest"]))


@given(st.sampled_from([(64, 64, 4, 1), (48, 128, 16, 1), (32, 65536 + 128, 8, 1)]), st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_tile_and_tag_follow_the_definition(shape: tuple[int, int, int, int], pick: int) -> None:
    job = Job(*shape)
    index = pick % job.tiles
    i, j = divmod(index, job.n // job.t)
    left, right = (
        np.array([entries_by_definition(SEED, matrix, first * job.t + row, job.k) for row in range(job.t)])
        for matrix, first in ((matproof.MATRIX_A, i), (matproof.MATRIX_B, j))
    )
    product = left @ right.T  # exact in int64
    assert (matproof.tile(job, SEED, index) == product).all()
    assert matproof.tile_tag(job, SEED, index) == tag_by_definition(product)


@given(st.integers(1, 9), st.sampled_from([64, 128, 4096]), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_rows_do_not_depend_on_how_they_are_cut(count: int, width: int, piece: int, first: int) -> None:
    whole = np.empty((count, 5 * 64 + width), np.float32)
    matproof.fill_rows(whole, SEED, matproof.MATRIX_A, first)
    part = np.empty((1, width), np.float32)
    matproof.fill_rows(part, SEED, matproof.MATRIX_A, first + count - 1, 64 * piece)
    assert (part[0] == whole[-1, 64 * piece : 64 * piece + width]).all()
    assert whole.min() >= -16 and whole.max() <= 15


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([4, 16, 64]))
@settings(max_examples=20, deadline=None)
def test_panel_tags_are_those_of_its_tiles(rows: int, columns: int, t: int) -> None:
    panel = np.random.default_rng(rows * columns).integers(-(2**24), 2**24, (rows * t, columns * t), np.int32)
    tags = matproof.panel_tags(panel, t).reshape(rows, columns)
    assert (tags == matproof.panel_tags(panel.astype(np.float32), t).reshape(rows, columns)).all()
    assert tags[-1, -1] == tag_by_definition(panel[-t:, -t:])


@pytest.fixture(scope="module")
def proof() -> Proof:
    return NumpyBackend().prove(JOB, SEED)


def test_an_honest_proof_passes(proof: Proof) -> None:
    result = matproof.check(JOB, SEED, proof.roots, proof.tags, b"r" * 32, 16)
    assert result.ok and result.first_bad is None and len(result.digest) == 32


def test_the_digest_depends_on_the_checker(proof: Proof) -> None:
    one, other = (matproof.check(JOB, SEED, proof.roots, proof.tags, who * 32, 4).digest for who in (b"1", b"2"))
    assert one != other


def test_a_wrong_tag_is_found_when_sampled(proof: Proof) -> None:
    picks = matproof.samples(JOB, b"r" * 32, 6)
    round_index, index = picks[2]
    tags = [sent.copy() for sent in proof.tags]
    tags[round_index][index] ^= 1
    roots = [matproof.tags_root(sent) for sent in tags]
    # The liar goes on honestly from his own root, so that only one tag is wrong.
    seeds = matproof.round_seeds(SEED, roots)
    for later in range(round_index + 1, JOB.rounds):
        again = NumpyBackend().prove(replace(JOB, rounds=1), matproof.next_seed(seeds[later - 1], roots[later - 1]))
        tags[later], roots[later] = again.tags[0], again.roots[0]
        seeds = matproof.round_seeds(SEED, roots)
    honest = matproof.check(JOB, SEED, proof.roots, proof.tags, b"r" * 32, 6)
    result = matproof.check(JOB, SEED, roots, tags, b"r" * 32, 6)
    assert not result.ok and result.first_bad == picks[2]
    assert honest.ok


def test_another_seed_fails(proof: Proof) -> None:
    result = matproof.check(JOB, bytes(32), proof.roots, proof.tags, b"r" * 32, 4)
    assert not result.ok and result.first_bad == matproof.samples(JOB, b"r" * 32, 4)[0]


def test_tags_that_do_not_match_their_roots_fail_without_work(proof: Proof) -> None:
    nothing = matproof.CheckResult(False, None, b"")
    changed = (proof.tags[0] ^ np.uint32(1), *proof.tags[1:])
    assert matproof.check(JOB, SEED, proof.roots, changed, b"r" * 32, 4) == nothing
    assert matproof.check(JOB, SEED, proof.roots[:-1], proof.tags, b"r" * 32, 4) == nothing
    assert matproof.check(JOB, SEED, proof.roots, proof.tags[:-1], b"r" * 32, 4) == nothing
    short = (proof.tags[0][:-1], *proof.tags[1:])
    assert matproof.check(JOB, SEED, proof.roots, short, b"r" * 32, 4) == nothing


def test_every_tag_can_be_shown_and_none_forged() -> None:
    job = Job(160, 64, 4, 1)  # 1600 tags: two chunks, the second shorter
    tags = NumpyBackend().prove(job, SEED).tags[0]
    root = matproof.tags_root(tags)
    for index in (0, 1023, 1024, 1599):
        chunk, path = matproof.chunk_path(tags, index)
        assert matproof.committed_tag(job, root, index, chunk, path) == tags[index]
        assert matproof.committed_tag(job, root, index, chunk[:-4] + bytes(4), path) is None
        assert matproof.committed_tag(job, root, index, chunk[:-4], path) is None
        assert matproof.committed_tag(job, root, 1024 if index < 1024 else 0, chunk, path) is None
    for index in (-1, 1600):
        assert matproof.committed_tag(job, root, index, *matproof.chunk_path(tags, 0)) is None
        with pytest.raises(IndexError):
            matproof.chunk_path(tags, index)
        with pytest.raises(IndexError):
            matproof.tile(job, SEED, index)


def test_tags_travel_as_bytes(proof: Proof) -> None:
    data = proof.tags[0].astype("<u4").tobytes()
    assert (matproof.tags_from_bytes(JOB, data) == proof.tags[0]).all()
    for wrong in (data[:-4], data + bytes(4), b""):
        with pytest.raises(DecodeError):
            matproof.tags_from_bytes(JOB, wrong)


@given(st.binary(min_size=32, max_size=64), st.integers(0, 200))
def test_samples_lie_in_the_job(randomness: bytes, q: int) -> None:
    picks = matproof.samples(JOB, randomness, q)
    assert len(picks) == q and picks == matproof.samples(JOB, randomness, 200)[:q]
    assert all(0 <= round_index < JOB.rounds and 0 <= index < JOB.tiles for round_index, index in picks)


@pytest.mark.parametrize("q", [-1, matproof.MAX_SAMPLES + 1])
def test_samples_are_bounded(q: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        matproof.samples(JOB, b"", q)


def test_job_packs_to_twelve_bytes() -> None:
    job = Job(8192, 65536, 128, 7)
    assert job.pack().hex() == "002000000000010080000700"
    assert Job.unpack(job.pack()) == job
    assert job.tiles == 4096


@given(st.binary(max_size=16))
def test_unpack_gives_a_job_in_bounds_or_a_decode_error(data: bytes) -> None:
    try:
        job = Job.unpack(data)
    except DecodeError:
        return
    assert job.pack() == data and job.tiles * job.rounds <= matproof.MAX_TAGS


IMPOSSIBLE = [
    (0, 64, 4, 1), (64, 0, 4, 1), (64, 64, 0, 1), (64, 64, 4, 0),
    (66, 64, 4, 1), (64, 65, 4, 1), (64, 64, 6, 1), (64, 64, 128, 1),
    (2**31, 64, 128, 1), (128, 2**31, 128, 1), (131072, 2**20, 128, 1),
    (131072, 64, 64, 1), (131072, 64, 128, 5), (512, 64, 512, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", IMPOSSIBLE)
def test_impossible_and_oversized_jobs_are_refused(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"tile|n =|k =|round"):
        Job(*shape)
    with pytest.raises(DecodeError):
        Job.unpack(struct.pack("<IIHH", *shape))
