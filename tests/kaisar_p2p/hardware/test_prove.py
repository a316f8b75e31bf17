"""The CPU backend makes proofs that check, in any blocking, and can be stopped."""

import sys
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisar_p2p.errors import HardwareError
from kaisar_p2p.hardware import prove
from kaisar_p2p.hardware.prove import NumpyBackend, ProofCancelled, select_backend
from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.matproof import Job

SEED = bytes(range(32))
shapes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.sampled_from([4, 8, 32]), st.integers(1, 3))


@given(shapes, st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
@settings(max_examples=30, deadline=None)
def test_what_is_proven_checks(shape: tuple[int, int, int, int], seed: bytes, randomness: bytes) -> None:
    across, blocks, t, rounds = shape
    job = Job(across * t, 64 * blocks, t, rounds)
    proof = NumpyBackend().prove(job, seed)
    assert len(proof.roots) == len(proof.tags) == rounds
    assert matproof.check(job, seed, proof.roots, proof.tags, randomness, 8).ok


@pytest.mark.parametrize("buffer_bytes", [1, 4 * 64 * 8 * 3, 1 << 20])
def test_blocking_does_not_change_the_proof(monkeypatch: pytest.MonkeyPatch, buffer_bytes: int) -> None:
    job = Job(72, 64, 8, 2)  # nine tile rows: blocks of three, of one, of all
    whole = NumpyBackend().prove(job, SEED)
    monkeypatch.setattr(prove, "_LEFT_BYTES", buffer_bytes)
    monkeypatch.setattr(prove, "_RIGHT_BYTES", 2 * buffer_bytes)
    blocked = NumpyBackend().prove(job, SEED)
    assert blocked.roots == whole.roots
    assert all((one == other).all() for one, other in zip(blocked.tags, whole.tags, strict=True))


def test_every_tag_is_that_of_its_tile() -> None:
    job = Job(32, 65536 + 64, 8, 1)
    tags = NumpyBackend().prove(job, SEED).tags[0]
    assert tags.dtype == np.uint32
    assert tags.tolist() == [matproof.tile_tag(job, SEED, index) for index in range(job.tiles)]


def test_buffers_are_reused_and_replaced_with_the_shape() -> None:
    backend, small, other = NumpyBackend(), Job(64, 64, 8, 1), Job(64, 128, 16, 1)
    first = backend.prove(small, SEED)
    assert backend.prove(other, SEED).roots == NumpyBackend().prove(other, SEED).roots
    assert backend.prove(small, SEED).roots == first.roots


def test_a_proof_stops_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_LEFT_BYTES", 1)  # one tile row per block
    calls = count()
    backend = NumpyBackend()
    with pytest.raises(ProofCancelled):
        backend.prove(Job(64, 64, 8, 100), SEED, lambda: next(calls) == 5)
    assert next(calls) == 6
    backend.prove(Job(64, 64, 8, 1), SEED)  # and the backend still works


def test_a_job_beyond_the_memory_is_refused_before_it_starts() -> None:
    with pytest.raises(HardwareError, match="MiB") as refusal:
        NumpyBackend(memory_limit_bytes=1 << 20).prove(Job(8192, 8192, 128, 1), SEED)
    assert refusal.value.hint


def test_without_cupy_the_cpu_proves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert select_backend().name == "numpy"
    assert select_backend("numpy").name == "numpy"
    with pytest.raises(HardwareError, match="CuPy") as refusal:
        select_backend("cupy")
    assert "pip install" in refusal.value.hint
