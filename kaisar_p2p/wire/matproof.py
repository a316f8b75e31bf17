"""The compute proof: a seed becomes integer matrices, their exact product becomes tags, rounds are chained.

The definition does not depend on hardware, number format, blocking or the order of summation::

    row i of X ∈ {A, B}  bytes of ChaCha20(key = seed_r, counter 0, nonce LE32(X) ‖ LE32(i) ‖ 0)
    entry                = (byte & 31) − 16
    C[i][j]              = Σ_k A[i][k] · B[j][k] mod 2³²        (B is kept transposed: its rows are columns)
    tag of tile (i, j)   = Σ_{u,v < t} fmix32(C[it+u][jt+v] + (u·t + v) · 0x9E3779B1) mod 2³²
    D_r                  = RFC 9162 root over chunks of 1024 tags (LE32, tiles in row-major order)
    seed_{r+1}           = SHA-256("popw/round" ‖ seed_r ‖ D_r)

|entry| ≤ 16, so over at most 65536 terms every partial sum is at most 2²⁴: int8→int32, fp16→fp32, fp32 and
fp64 agree to the bit. Longer rows are multiplied in pieces of 65536 columns; their int32 results are added
mod 2³².

The tag is not linear in C on purpose: a linear check (Freivalds: C·r = A·(B·r)) can be met without computing
C. This module decides and checks; `kaisar_p2p.hardware.prove` does the work of a whole proof.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire import merkle

MATRIX_A = 0x41
MATRIX_B = 0x42
EXACT_COLUMNS = 65536
"""Columns over which a float32 sum stays exact."""
CHUNK_TAGS = 1024
"""Tags under one leaf of the tree: what evidence has to carry to show one tag."""
JOB_BYTES = 12
MAX_SAMPLES = 4096

# A job comes from a peer. These bound what it can make anybody allocate: 4 MiB of tags per round, 16 MiB in
# all, 16 GiB of int8 operands on the worker's card, two operands of 64 MiB for a checker's tile.
MAX_N = 1 << 17
MAX_K = 1 << 20
MAX_T = 256
MAX_OPERAND_ENTRIES = 1 << 34
MAX_TILES = 1 << 20
MAX_TAGS = 1 << 22

_GOLDEN = 0x9E3779B1
_KEYSTREAM_BLOCK = 64
_ROWS_BYTES = 1 << 17  # keystream made at a time: stays in a core's second-level cache
_TILES_BYTES = 1 << 19  # tiles tagged at a time: stay in the last-level cache, and few calls are made

Tags = NDArray[np.uint32]
"""The tags of one round, (n / t)² of them, tiles in row-major order."""


@dataclass(frozen=True, slots=True)
class Job:
    """How much work a proof is: `rounds` products of n×k and k×n matrices, tagged in t×t tiles.

    Raises:
        ValueError: the shape is not a multiple of what every backend needs, or beyond the bounds above.
    """

    n: int
    k: int
    t: int
    rounds: int

    def __post_init__(self) -> None:
        if not (4 <= self.t <= MAX_T and self.t % 4 == 0):
            raise ValueError(f"tile side {self.t} is not a multiple of 4 up to {MAX_T}")
        if not (self.t <= self.n <= MAX_N and self.n % self.t == 0):
            raise ValueError(f"n = {self.n} is not a multiple of the tile side {self.t} up to {MAX_N}")
        if not (_KEYSTREAM_BLOCK <= self.k <= MAX_K and self.k % _KEYSTREAM_BLOCK == 0):
            raise ValueError(f"k = {self.k} is not a multiple of {_KEYSTREAM_BLOCK} up to {MAX_K}")
        if self.n * self.k > MAX_OPERAND_ENTRIES or self.tiles > MAX_TILES:
            raise ValueError(f"a round of n = {self.n}, k = {self.k}, t = {self.t} is too large")
        if not 1 <= self.rounds <= 0xFFFF or self.rounds * self.tiles > MAX_TAGS:
            raise ValueError(f"{self.rounds} rounds of {self.tiles} tags are none or too many")

    @property
    def tiles(self) -> int:
        """Tiles, and so tags, per round."""
        return (self.n // self.t) ** 2

    def pack(self) -> bytes:
        """The 12 bytes that are signed and hashed: LE32 n, LE32 k, LE16 t, LE16 rounds."""
        return struct.pack("<IIHH", self.n, self.k, self.t, self.rounds)

    @classmethod
    def unpack(cls, data: bytes) -> Job:
        """Read `pack()`.

        Raises:
            DecodeError: the length is wrong or the job is out of bounds.
        """
        if len(data) != JOB_BYTES:
            raise DecodeError(f"a job has {JOB_BYTES} bytes, not {len(data)}")
        try:
            return cls(*struct.unpack("<IIHH", data))
        except ValueError as error:
            raise DecodeError(f"impossible job: {error}") from error


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a checker found.

    `first_bad` is the first sampled (round, tile) whose tag is wrong; `digest` shows that the sampled tiles
    were computed. Both are empty when the tags do not even match the roots.
    """

    ok: bool
    first_bad: tuple[int, int] | None
    digest: bytes


# Chaining and tags


def next_seed(seed: bytes, round_root: bytes) -> bytes:
    """The seed of the round after the one that ended with `round_root`."""
    return sha256(b"popw/round" + seed + round_root).digest()


def round_seeds(seed: bytes, roots: Sequence[bytes]) -> list[bytes]:
    """The seed of every round, the first being `seed`."""
    seeds = [seed]
    for round_root in roots[:-1]:
        seeds.append(next_seed(seeds[-1], round_root))
    return seeds


def tags_root(tags: Tags) -> bytes:
    """D_r, the root over one round's tags."""
    return merkle.root(_chunks(tags))


def tags_from_bytes(job: Job, data: bytes) -> Tags:
    """One round's tags as they travel: LE32 each.

    Raises:
        DecodeError: not one tag per tile.
    """
    if len(data) != 4 * job.tiles:
        raise DecodeError(f"{job.tiles} tags take {4 * job.tiles} bytes, not {len(data)}")
    return np.frombuffer(data, "<u4").astype(np.uint32, copy=False)


def chunk_path(tags: Tags, tile: int) -> tuple[bytes, tuple[bytes, ...]]:
    """The chunk that holds the tag of `tile`, and its inclusion path under `tags_root(tags)`.

    Raises:
        IndexError: there is no such tile.
    """
    if not 0 <= tile < len(tags):
        raise IndexError(f"tile {tile} of {len(tags)}")
    chunks, index = _chunks(tags), tile // CHUNK_TAGS
    return chunks[index], merkle.Tree(chunks).path(index)


def committed_tag(job: Job, root: bytes, tile: int, chunk: bytes, path: Sequence[bytes]) -> int | None:
    """The tag that `root` commits to for `tile`, shown by `chunk_path`; None if it shows nothing."""
    if not 0 <= tile < job.tiles:
        return None
    index, count = tile // CHUNK_TAGS, -(-job.tiles // CHUNK_TAGS)
    if len(chunk) != 4 * min(CHUNK_TAGS, job.tiles - index * CHUNK_TAGS):
        return None
    if not merkle.verify_inclusion(root, count, index, chunk, path):
        return None
    return int.from_bytes(chunk[4 * (tile % CHUNK_TAGS) :][:4], "little")


def _chunks(tags: Tags) -> list[bytes]:
    data = tags.astype("<u4", copy=False).tobytes()
    return [data[start : start + 4 * CHUNK_TAGS] for start in range(0, len(data), 4 * CHUNK_TAGS)]


# Arithmetic


def fill_rows(out: NDArray[np.float32], seed: bytes, matrix: int, first_row: int, first_column: int = 0) -> None:
    """Write rows of a matrix into `out` (rows × columns), starting at the given row and column.

    `matrix` is MATRIX_A or MATRIX_B, `first_column` a multiple of 64. Safe to call from several threads.
    """
    count, width = out.shape
    zeros, counter = bytes(width), first_column // _KEYSTREAM_BLOCK
    raw = np.empty((max(1, min(count, _ROWS_BYTES // width)), width), np.uint8)
    lines = [memoryview(line) for line in raw]
    stream = Cipher(ChaCha20(seed, bytes(16)), None).encryptor()
    for start in range(0, count, len(raw)):
        filled = min(len(raw), count - start)
        for line in range(filled):
            # A new nonce on the same context: a cipher per row would take longer than its keystream.
            stream.reset_nonce(struct.pack("<IIII", counter, matrix, first_row + start + line, 0))
            stream.update_into(zeros, lines[line])
        entries = raw[:filled]
        np.bitwise_and(entries, 31, out=entries)
        np.subtract(entries, 16, out=entries)
        out[start : start + filled] = entries.view(np.int8)


def tile(job: Job, seed_r: bytes, index: int) -> NDArray[np.int32]:
    """One t×t tile of the product of the round that runs under `seed_r`.

    Raises:
        IndexError: there is no such tile.
    """
    if not 0 <= index < job.tiles:
        raise IndexError(f"tile {index} of {job.tiles}")
    i, j = divmod(index, job.n // job.t)
    total = np.zeros((job.t, job.t), np.int32)
    for start, stop in column_pieces(job.k):
        left, right = np.empty((2, job.t, stop - start), np.float32)
        fill_rows(left, seed_r, MATRIX_A, i * job.t, start)
        fill_rows(right, seed_r, MATRIX_B, j * job.t, start)
        total += (left @ right.T).astype(np.int32)
    return total


def tile_tag(job: Job, seed_r: bytes, index: int) -> int:
    """The tag of one tile, recomputed from its seed."""
    return int(panel_tags(tile(job, seed_r, index), job.t)[0])


def column_pieces(k: int) -> Iterator[tuple[int, int]]:
    """Column ranges over which a float32 product is exact."""
    return ((start, min(start + EXACT_COLUMNS, k)) for start in range(0, k, EXACT_COLUMNS))


def panel_tags(panel: NDArray[Any], t: int) -> Tags:
    """Tags of all tiles of a panel of C: shape (i·t, j·t), int32 or float32 (exact integers)."""
    rows, columns = panel.shape
    tags = np.empty((rows // t, columns // t), np.uint32)
    step = max(1, _TILES_BYTES // (4 * t * t))
    mixed, shifted = np.empty((2, t, min(columns, step * t)), np.uint32)
    for i, j in np.ndindex(rows // t, -(-columns // (step * t))):
        block = panel[i * t : (i + 1) * t, j * step * t : (j + 1) * step * t]
        width = block.shape[1]
        _mix(block, _offsets(t, width), mixed[:, :width], shifted[:, :width])
        sums = mixed[:, :width].sum(axis=0, dtype=np.uint32).reshape(-1, t)
        tags[i, j * step : (j + 1) * step] = sums.sum(axis=1, dtype=np.uint32)
    return tags.ravel()


@lru_cache(maxsize=8)
def _offsets(t: int, width: int) -> NDArray[np.uint32]:
    """(u·t + v) · golden ratio for tiles side by side over `width` columns."""
    offsets = (np.arange(t * t, dtype=np.uint32) * np.uint32(_GOLDEN)).reshape(t, t)
    return np.tile(offsets, (1, width // t))


def _mix(block: NDArray[Any], offsets: Tags, x: Tags, y: Tags) -> None:
    """x = fmix32(block + offsets), the finaliser of MurmurHash3; y is scratch space."""
    np.copyto(x.view(np.int32), block, casting="unsafe")
    np.add(x, offsets, out=x)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(x, shift, out=y)
        np.bitwise_xor(x, y, out=x)
        np.multiply(x, np.uint32(factor), out=x)
    np.right_shift(x, 16, out=y)
    np.bitwise_xor(x, y, out=x)


# Checking


def samples(job: Job, randomness: bytes, q: int) -> list[tuple[int, int]]:
    """The q (round, tile) pairs, repeats possible, that a checker's randomness (32 bytes or more) picks.

    Raises:
        ValueError: q is negative or above MAX_SAMPLES.
    """
    if not 0 <= q <= MAX_SAMPLES:
        raise ValueError(f"{q} samples")
    picks: list[tuple[int, int]] = []
    for block in range(-(-q // 4)):
        words = struct.unpack("<4Q", sha256(b"popw/sample" + randomness + struct.pack("<I", block)).digest())
        picks += [divmod(word % (job.rounds * job.tiles), job.tiles) for word in words]
    return picks[:q]


def check(
    job: Job, seed: bytes, roots: Sequence[bytes], tags: Sequence[Tags], randomness: bytes, q: int
) -> CheckResult:
    """Recompute q sampled tiles of a proof and compare their tags.

    All samples are computed even after a wrong one, because the digest covers all of them.
    """
    if len(roots) != job.rounds or len(tags) != job.rounds or any(len(sent) != job.tiles for sent in tags):
        return CheckResult(False, None, b"")
    if any(tags_root(sent) != root for sent, root in zip(tags, roots, strict=True)):
        return CheckResult(False, None, b"")
    seeds, first_bad = round_seeds(seed, roots), None
    transcript = sha256(b"popw/chk" + randomness)
    for round_index, index in samples(job, randomness, q):
        product = tile(job, seeds[round_index], index)
        transcript.update(product.astype("<i4", copy=False).tobytes())
        if first_bad is None and panel_tags(product, job.t)[0] != tags[round_index][index]:
            first_bad = (round_index, index)
    return CheckResult(first_bad is None, first_bad, transcript.digest())
