"""Merkle trees with inclusion proofs: RFC 9162 §2.1 (the tree of RFC 6962), SHA-256.

Leaves are hashed under prefix 0x00 and nodes under 0x01, so a node can never pass for a leaf. A proof for one
of `count` leaves holds at most ⌈log2(count)⌉ hashes of 32 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """Hash of one leaf's data."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node over its two children's hashes."""
    return sha256(b"\x01" + left + right).digest()


class Tree:
    """All levels of the tree over `leaves`: 32 bytes per node, about 64 per leaf."""

    def __init__(self, leaves: Iterable[bytes]) -> None:
        self._levels = [[leaf_hash(data) for data in leaves]]
        while len(self._levels[-1]) > 1:
            self._levels.append(_parents(self._levels[-1]))

    def __len__(self) -> int:
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        """The 32-byte root; that of no leaves is the hash of the empty string."""
        return self._levels[-1][0] if len(self) else EMPTY_ROOT

    def path(self, index: int) -> tuple[bytes, ...]:
        """The inclusion proof of leaf `index`, from the leaf's sibling upwards.

        Raises:
            IndexError: there is no such leaf.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"leaf {index} of a tree of {len(self)}")
        siblings = []
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):
                siblings.append(level[index ^ 1])
            index >>= 1
        return tuple(siblings)


def root(leaves: Iterable[bytes]) -> bytes:
    """The root over `leaves`."""
    return Tree(leaves).root


def verify_inclusion(root: bytes, count: int, index: int, leaf_data: bytes, path: Sequence[bytes]) -> bool:
    """Whether `path` proves that `leaf_data` is leaf `index` of `count` under `root` (RFC 9162 §2.1.3.2).

    Safe on anything a peer sends: wrong lengths are False, and work is bounded by the bits of `count`.
    """
    if not 0 <= index < count or len(path) > count.bit_length():
        return False
    if any(len(node) != HASH_BYTES for node in path):
        return False
    position, last, current = index, count - 1, leaf_hash(leaf_data)
    for sibling in path:
        if last == 0:
            return False
        if position & 1 or position == last:
            current = node_hash(sibling, current)
            while position and not position & 1:  # levels where this node was promoted without a sibling
                position, last = position >> 1, last >> 1
        else:
            current = node_hash(current, sibling)
        position, last = position >> 1, last >> 1
    return last == 0 and current == root


def _parents(level: list[bytes]) -> list[bytes]:
    """The next level up. Promoting an odd last node unchanged equals the RFC's split at a power of two."""
    parents = [node_hash(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
    return parents + level[-1:] if len(level) & 1 else parents
