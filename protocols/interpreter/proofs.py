"""Leaves of anchored trees, proven to the ledger."""

from __future__ import annotations

from typing import TypeVar

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import decode
from kaisar_p2p.wire.merkle import verify_inclusion
from protocols.epochs import LEASES, REWARDS, EpochHeader, LeafProof, LeaseLeaf, RewardLeaf
from protocols.interpreter.draft import Draft, Refused

Leaf = TypeVar("Leaf", LeaseLeaf, RewardLeaf)


def proven_leaf(draft: Draft, proof: LeafProof, tree: int, cls: type[Leaf]) -> Leaf:
    """The leaf, if it is in that tree of the anchored header of its epoch."""
    anchor = draft.anchors.get(proof.epoch)
    if anchor is None:
        raise Refused("that epoch is not anchored")
    if proof.tree != tree:
        raise Refused("a leaf of another tree")
    root, count = _tree(anchor.header, tree)
    if not verify_inclusion(root, count, proof.index, proof.leaf, proof.path):
        raise Refused("the leaf is not in the anchored tree")
    try:
        return decode(cls, proof.leaf)
    except DecodeError as error:
        raise Refused("the leaf is malformed") from error


def _tree(header: EpochHeader, tree: int) -> tuple[bytes, int]:
    roots = {LEASES: (header.lease_root, header.leases), REWARDS: (header.reward_root, header.rewards)}
    return roots[tree]
