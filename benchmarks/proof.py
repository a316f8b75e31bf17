"""Compute proof and VRF: ``python -m benchmarks proof``.

A worker's time should go into the matrix product and nothing else, so the whole proof (rows, product, tags, tree)
is compared with the bare NumPy product of the same size in the same run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from benchmarks import Figure
from kaisar_p2p.hardware.prove import NumpyBackend
from kaisar_p2p.wire import matproof, vrf

SEED = bytes(range(32))


def figures(size: int = 8192, repeats: int = 5) -> list[Figure]:
    """Measure everything now, on this machine; about a minute at the default size on two cores."""
    return [_proof_over_product(size, repeats), _check_on_one_core(size), *_vrf()]


def _proof_over_product(size: int, repeats: int) -> Figure:
    job, backend = matproof.Job(size, size, 128, 1), NumpyBackend()
    left, right = np.empty((2, size, size), np.float32)
    matproof.fill_rows(left, SEED, matproof.MATRIX_A, 0)
    matproof.fill_rows(right, SEED, matproof.MATRIX_B, 0)
    product = np.empty((size, size), np.float32)
    plain: list[float] = []
    proofs: list[float] = []
    for index in range(repeats + 1):
        plain.append(_seconds(lambda: np.matmul(left, right.T, out=product)))
        proofs.append(_seconds(partial(backend.prove, job, index.to_bytes(32, "big"))))
    ratio = median(proofs[1:]) / median(plain[1:])  # the first pair warms up
    return {
        "figure": f"compute proof, n = K = {size}, one round",
        "value": round(median(proofs[1:]), 3),
        "unit": "s",
        "peer": f"NumPy float32 GEMM {size}, same run ({median(plain[1:]):.3f} s)",
        "ratio": round(ratio, 3),
        "target": "ratio ≤ 1.05",
        "ok": ratio <= 1.05,
    }


def _check_on_one_core(size: int) -> Figure:
    """In a process of its own: BLAS reads its number of threads when it is loaded."""
    code = f"from benchmarks.proof import seconds_to_check; print(seconds_to_check({size}))"
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    return _limit(f"check of 16 tiles, n = K = {size}, one core", float(output), "s", 0.10)


def seconds_to_check(size: int) -> float:
    """Median time to check a proof by 16 samples; the tags are zeros, which costs the same as right ones."""
    job = matproof.Job(size, size, 128, 1)
    tags = [np.zeros(job.tiles, np.uint32)]
    roots = [matproof.tags_root(tags[0])]
    return _median_seconds(lambda: matproof.check(job, SEED, roots, tags, bytes(64), 16), 9)


def _vrf() -> list[Figure]:
    public, proof = vrf.public_key(SEED), vrf.prove(SEED, b"alpha")
    verify_ms = 1000 * _median_seconds(lambda: vrf.verify(public, b"alpha", proof), 300)
    prove_ms = 1000 * _median_seconds(lambda: vrf.prove(SEED, b"alpha"), 300)
    return [_limit("VRF verify", verify_ms, "ms", 0.5), _limit("VRF prove", prove_ms, "ms", 0.5)]


def _limit(figure: str, value: float, unit: str, limit: float) -> Figure:
    return {
        "figure": figure,
        "value": round(value, 4),
        "unit": unit,
        "peer": "limit",
        "ratio": round(value / limit, 3),
        "target": f"≤ {limit} {unit}",
        "ok": value <= limit,
    }


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    return median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
