"""Doing the work of a compute proof, as `kaisar_p2p.wire.matproof` defines it, on whatever the machine has.

Every backend gives the same bytes; `select_backend` picks the fastest one that works here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Literal, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from kaisar_p2p.errors import HardwareError
from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.matproof import MATRIX_A, MATRIX_B, Job, Tags

log = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]
"""Asked before every block of the product; True abandons the proof with `ProofCancelled`."""

# Wide blocks of few rows keep BLAS as fast as one large product; tall ones of the same size do not.
_LEFT_BYTES = 1 << 26
_RIGHT_BYTES = 1 << 28

Operand = NDArray[np.float32]


class ProofCancelled(HardwareError):
    """The caller no longer wants the proof."""


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """One root and one array of tags per round."""

    roots: tuple[bytes, ...]
    tags: tuple[Tags, ...]


class Backend(Protocol):
    """Something that computes proofs. Blocking and CPU- or GPU-bound: call it from a worker thread."""

    @property
    def name(self) -> str:
        """Short name for logs and adverts."""

    def prove(self, job: Job, seed: bytes, should_stop: ShouldStop = ...) -> Proof:
        """All rounds of a job under a 32-byte seed.

        Raises:
            HardwareError: the job does not fit into memory, or the device failed.
            ProofCancelled: `should_stop` said so.
        """


def never() -> bool:
    """The `should_stop` of a proof that always runs to its end."""
    return False


def chain_rounds(job: Job, seed: bytes, run_round: Callable[[bytes], Tags]) -> Proof:
    """Run the rounds one after the other, each under the seed that the one before it gives."""
    roots, tags = [], []
    for _ in range(job.rounds):
        tags.append(run_round(seed))
        roots.append(matproof.tags_root(tags[-1]))
        seed = matproof.next_seed(seed, roots[-1])
    return Proof(tuple(roots), tuple(tags))


class NumpyBackend:
    """Float32 matrix products on the CPU: exact, because no partial sum exceeds 2²⁴.

    The product is made block by block, and rows of A are made again for every panel of B. That costs 1 % of the
    time and keeps memory at about 400 MiB whatever n is. The backend keeps its buffers from one proof to the next,
    since fresh pages would cost more than the rows; drop the backend to free them.
    """

    name = "numpy"

    def __init__(self, memory_limit_bytes: int | None = None) -> None:
        """`memory_limit_bytes` caps one proof; by default it is what the machine has available at the time."""
        self._memory_limit_bytes = memory_limit_bytes
        self._lock = Lock()
        self._buffers: _Buffers | None = None

    def prove(self, job: Job, seed: bytes, should_stop: ShouldStop = never) -> Proof:
        """See `Backend.prove`. Proofs asked for at the same time are made one after the other."""
        with self._lock:
            if self._buffers is None or self._buffers.shape != (job.n, job.k, job.t):
                self._buffers = None  # before the next are allocated
                self._buffers = _Buffers.allocate(job, self._memory_limit_bytes)
            buffers = self._buffers
            return chain_rounds(job, seed, lambda round_seed: _run_round(job, round_seed, buffers, should_stop))


@dataclass(frozen=True, slots=True)
class _Buffers:
    """A few rows of A, a panel of B, and the block of C that they give; reused throughout."""

    shape: tuple[int, int, int]
    left: NDArray[np.float32]
    right: NDArray[np.float32]
    product: NDArray[np.float32]

    @classmethod
    def allocate(cls, job: Job, limit_bytes: int | None) -> _Buffers:
        # A quarter of a small job at a time costs nothing and saves memory; large jobs are cut smaller anyway.
        quarter = max(1, job.n // job.t // 4) * job.t
        left_rows, right_rows = min(quarter, _rows(job, _LEFT_BYTES)), _rows(job, _RIGHT_BYTES)
        needed = 4 * ((left_rows + right_rows) * job.k + 3 * left_rows * right_rows)
        available = psutil.virtual_memory().available if limit_bytes is None else limit_bytes
        if needed > available:
            raise HardwareError(
                f"the job needs {needed >> 20} MiB of memory and {available >> 20} MiB are available",
                hint="claim a smaller tier for this machine, or stop other programs",
            )
        shapes = ((left_rows, job.k), (right_rows, job.k), (left_rows, right_rows))
        return cls((job.n, job.k, job.t), *(np.empty(shape, np.float32) for shape in shapes))


def _rows(job: Job, size_bytes: int) -> int:
    """Whole tile rows that fit into a buffer; at least one."""
    return min(job.n, max(1, size_bytes // (4 * job.k * job.t)) * job.t)


def _run_round(job: Job, seed: bytes, buffers: _Buffers, should_stop: ShouldStop) -> Tags:
    """Tags of one round, a block of whole tiles at a time."""
    tags = np.empty((job.n // job.t, job.n // job.t), np.uint32)
    for first in range(0, job.n, len(buffers.right)):
        right = buffers.right[: job.n - first]
        matproof.fill_rows(right, seed, MATRIX_B, first)
        for top in range(0, job.n, len(buffers.left)):
            if should_stop():
                raise ProofCancelled("the proof was cancelled")
            left = buffers.left[: job.n - top]
            matproof.fill_rows(left, seed, MATRIX_A, top)
            block = _multiply(left, right, buffers.product[: len(left), : len(right)])
            rows, columns = len(left) // job.t, len(right) // job.t
            i, j = top // job.t, first // job.t
            tags[i : i + rows, j : j + columns] = matproof.panel_tags(block, job.t).reshape(rows, columns)
    return tags.ravel()


def _multiply(left: Operand, right: Operand, out: Operand) -> Operand | NDArray[np.int32]:
    """left · rightᵀ: in `out` when float32 holds it exactly, else as int32 modulo 2³²."""
    if left.shape[1] <= matproof.EXACT_COLUMNS:
        return np.matmul(left, right.T, out=out)
    total = np.zeros(out.shape, np.int32)
    for start, stop in matproof.column_pieces(left.shape[1]):
        total += np.matmul(left[:, start:stop], right[:, start:stop].T, out=out).astype(np.int32)
    return total


def select_backend(preferred: Literal["auto", "numpy", "cupy"] = "auto") -> Backend:
    """The fastest backend that works on this machine, or the one asked for.

    Raises:
        HardwareError: CuPy was asked for and does not work here.
    """
    if preferred == "numpy":
        return NumpyBackend()
    from kaisar_p2p.hardware.prove_cupy import CupyBackend

    try:
        return CupyBackend()
    except HardwareError as unavailable:
        if preferred == "cupy":
            raise
        log.info("proofs run on the CPU: %s", unavailable)
        return NumpyBackend()
