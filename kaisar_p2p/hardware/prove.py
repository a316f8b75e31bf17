"""Doing the work of a compute proof, as `kaisar_p2p.wire.matproof` defines it, on whatever the machine has.

Every backend gives the same bytes; `select_backend` picks the fastest one that works here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from kaisar_p2p.errors import HardwareError
from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.matproof import MATRIX_A, MATRIX_B, Job, Tags

log = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]
"""Asked before every panel; True abandons the proof with `ProofCancelled`."""

_PANEL_BYTES = 1 << 25


class ProofCancelled(HardwareError):
    """The caller no longer wants the proof."""


@dataclass(frozen=True, slots=True)
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

    Memory: B (4·n·k bytes), one panel of A and one of C (about 32 MiB each), whatever the number of rounds.
    """

    name = "numpy"

    def __init__(self, memory_limit_bytes: int | None = None) -> None:
        """`memory_limit_bytes` caps one proof; by default it is what the machine has available at the time."""
        self._memory_limit_bytes = memory_limit_bytes

    def prove(self, job: Job, seed: bytes, should_stop: ShouldStop = never) -> Proof:
        """See `Backend.prove`."""
        buffers = _Buffers.allocate(job, self._memory_limit_bytes)
        return chain_rounds(job, seed, lambda round_seed: _run_round(job, round_seed, buffers, should_stop))


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Operands that all rounds of one proof share."""

    right: NDArray[np.float32]  # B, n × k
    left: NDArray[np.float32]  # rows of A, panel × k
    product: NDArray[np.float32]  # rows of C, panel × n

    @classmethod
    def allocate(cls, job: Job, limit_bytes: int | None) -> _Buffers:
        rows = min(job.n, max(1, _PANEL_BYTES // (4 * max(job.n, job.k) * job.t)) * job.t)
        needed = 4 * (job.n * job.k + rows * (job.k + 2 * job.n))
        available = psutil.virtual_memory().available if limit_bytes is None else limit_bytes
        if needed > available:
            raise HardwareError(
                f"the job needs {needed >> 20} MiB of memory and {available >> 20} MiB are available",
                hint="claim a smaller tier for this machine, or stop other programs",
            )
        shapes = ((job.n, job.k), (rows, job.k), (rows, job.n))
        return cls(*(np.empty(shape, np.float32) for shape in shapes))


def _run_round(job: Job, seed: bytes, buffers: _Buffers, should_stop: ShouldStop) -> Tags:
    """Tags of one round, a panel of whole tile rows at a time."""
    tags = []
    panel_rows = len(buffers.left)
    for start in range(0, job.n, panel_rows):
        if should_stop():
            raise ProofCancelled("the proof was cancelled")
        rows = min(panel_rows, job.n - start)
        if start == 0:
            matproof.fill_rows(buffers.right, seed, MATRIX_B, 0)
        matproof.fill_rows(buffers.left[:rows], seed, MATRIX_A, start)
        product = _multiply(buffers.left[:rows], buffers.right, buffers.product[:rows])
        tags.append(matproof.panel_tags(product, job.t))
    return np.concatenate(tags)


def _multiply(
    left: NDArray[np.float32], right: NDArray[np.float32], out: NDArray[np.float32]
) -> NDArray[np.float32] | NDArray[np.int32]:
    """left · rightᵀ: in `out` when float32 holds it exactly, else as int32 modulo 2³²."""
    pieces = list(matproof.column_pieces(left.shape[1]))
    if len(pieces) == 1:
        return np.matmul(left, right.T, out=out)
    total = np.zeros(out.shape, np.int32)
    for start, stop in pieces:
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
