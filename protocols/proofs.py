"""Proofs that anybody can check: one leaf of an anchored epoch, and a reward's whole chain of evidence in one file.

A `LeafProof` is for the ledger, which knows the header. The exported file holds the header, its certificate and the
registry too, so it can be checked without any node. Compare its header hash with an anchor on the ledger: nobody
can tell from a file alone which registry the network had.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kaisar_p2p.errors import DecodeError, KaisarError
from kaisar_p2p.wire.codec import Message, decode, encode
from kaisar_p2p.wire.merkle import Tree, verify_inclusion
from protocols.committees import header_stake, is_supermajority, verify_header
from protocols.digests import header_hash, registry_root
from protocols.epoch_body import leaves_of
from protocols.epochs import (
    EVIDENCE,
    LEASES,
    REWARDS,
    VERDICTS,
    EpochBody,
    EpochCertificate,
    EpochHeader,
    LeafProof,
    RewardLeaf,
)
from protocols.interpreter.state import Registry

FORMAT = "kaisar-reward-proof/1"
FILE_BYTES_MAX = 1 << 18
_KEYS = {"format", "network", "header", "certificate", "registry", "proof"}
_HINT = "export it again with a node that holds the epoch"


class ProofInvalid(KaisarError):
    """A proof that does not show what it claims; the message says at which step."""


class NothingToProve(KaisarError):
    """The epoch has no such leaf."""


# ── leaves ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def prove_leaf(body: EpochBody, tree: int, index: int, network: bytes) -> LeafProof:
    """Proof of leaf `index` in one of the trees VERDICTS, REWARDS, LEASES, EVIDENCE; at most 600 bytes encoded.

    NothingToProve when there is no such leaf, or more leaves than a proof can reach (MAX_LEAVES).
    """
    leaves = leaves_of(body, tree, network)
    if not 0 <= index < len(leaves):
        raise NothingToProve(f"epoch {body.epoch} has no leaf {index} in tree {tree}", hint=f"it has {len(leaves)}")
    path = Tree(leaves).path(index)
    try:
        proof = LeafProof(body.epoch, tree, index, leaves[index], path)
        encode(proof)
    except ValueError as error:
        raise NothingToProve(f"tree {tree} of epoch {body.epoch} is too large for a proof") from error
    return proof


def prove_reward(body: EpochBody, account: bytes, network: bytes) -> LeafProof:
    """Proof of what an account has earned up to the body's epoch; NothingToProve if that is nothing."""
    for index, leaf in enumerate(body.rewards):
        if leaf.account == account:
            return prove_leaf(body, REWARDS, index, network)
    raise NothingToProve(f"account {account.hex()} has no rewards in epoch {body.epoch}", hint="try a later epoch")


def prove_lease(body: EpochBody, order_id: bytes, network: bytes) -> LeafProof:
    """Proof of a lease's seconds and outcome; NothingToProve if the order is not in the body."""
    for index, leaf in enumerate(body.leases):
        if leaf.order_id == order_id:
            return prove_leaf(body, LEASES, index, network)
    raise NothingToProve(f"order {order_id.hex()} is not in epoch {body.epoch}", hint="try a later epoch")


def verify_leaf(proof: LeafProof, header: EpochHeader) -> bool:
    """Whether the leaf is where the proof says, under this header; never raises on decoded messages."""
    trees = {
        VERDICTS: (header.verdict_root, header.verdicts),
        REWARDS: (header.reward_root, header.rewards),
        LEASES: (header.lease_root, header.leases),
        EVIDENCE: (header.evidence_root, header.evidence),
    }
    if proof.epoch != header.epoch or proof.tree not in trees:
        return False
    root, count = trees[proof.tree]
    return verify_inclusion(root, count, proof.index, proof.leaf, proof.path)


# ── the exported file ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ProofReport:
    """What a reward file shows: `signed_stake_planck` of `total_stake_planck` signed that the account earned this."""

    network: bytes
    account: bytes
    cumulative_planck: int
    epoch: int
    header_hash: bytes
    signed_stake_planck: int
    total_stake_planck: int


def export_reward(
    network: bytes, header: EpochHeader, certificate: EpochCertificate, registry: Registry, proof: LeafProof
) -> bytes:
    """The file: JSON with hexadecimal canonical messages; amounts are decimal text, because JSON readers round them."""
    plain = {
        "format": FORMAT,
        "network": network.hex(),
        "header": encode(header).hex(),
        "certificate": encode(certificate).hex(),
        "registry": [[key.hex(), str(stake)] for key, stake in registry],
        "proof": encode(proof).hex(),
    }
    return json.dumps(plain, indent=2).encode() + b"\n"


def verify_export(data: bytes) -> ProofReport:
    """Check a file from end to end, without any network.

    Raises:
        ProofInvalid: it is no such file, or one of the steps fails: registry against header, signatures of two thirds
            of the stake, the leaf's path.
    """
    plain = _load(data)
    network = _hex(plain, "network")
    if len(network) != 32:
        raise _wrong("the network id has not 32 bytes")
    header = _message(EpochHeader, plain, "header")
    certificate = _message(EpochCertificate, plain, "certificate")
    proof = _message(LeafProof, plain, "proof")
    registry = _registry(plain["registry"])
    if registry_root(registry) != header.registry_root:
        raise _wrong("the registry is not the one that the header names")
    signed, total = header_stake(certificate, registry)
    if not is_supermajority(signed, total):
        raise _wrong(f"signed by {signed} of {total} planck of stake, which is less than two thirds")
    if not verify_header(certificate, header, registry, network):
        raise _wrong("a signature of the certificate is wrong")
    leaf = _reward(proof, header)
    digest = header_hash(header, network)
    return ProofReport(network, leaf.account, leaf.cumulative_planck, header.epoch, digest, signed, total)


def _reward(proof: LeafProof, header: EpochHeader) -> RewardLeaf:
    if proof.tree != REWARDS or not verify_leaf(proof, header):
        raise _wrong("the reward is not in the header's tree")
    try:
        return decode(RewardLeaf, proof.leaf)
    except DecodeError as error:
        raise _wrong("the leaf is not a reward") from error


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > FILE_BYTES_MAX:
        raise _wrong(f"a reward proof has at most {FILE_BYTES_MAX} bytes")
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _wrong("it is not JSON") from error
    if type(plain) is not dict or plain.keys() != _KEYS or plain["format"] != FORMAT:
        raise _wrong(f"it is not a file of format {FORMAT}")
    return plain


def _hex(plain: dict[str, Any], key: str) -> bytes:
    value = plain[key]
    try:
        return bytes.fromhex(value) if type(value) is str else _not_hex(key)
    except ValueError as error:
        raise _wrong(f"{key} is not hexadecimal") from error


def _not_hex(key: str) -> bytes:
    raise _wrong(f"{key} is not text")


def _message(cls: type[Any], plain: dict[str, Any], key: str) -> Any:
    try:
        message: Message = decode(cls, _hex(plain, key))
    except DecodeError as error:
        raise _wrong(f"{key} is malformed: {error.message}") from error
    return message


def _registry(plain: Any) -> Registry:
    if type(plain) is not list or len(plain) > 256:
        raise _wrong("the registry is not a list of at most 256")
    entries = []
    for item in plain:
        if type(item) is not list or len(item) != 2 or not all(type(part) is str for part in item):
            raise _wrong("an entry of the registry is not [key, stake]")
        key, stake = item
        if len(key) != 64 or not stake.isascii() or not stake.isdigit() or len(stake) > 38:
            raise _wrong("an entry of the registry is malformed")
        entries.append((_key(key), int(stake)))
    return tuple(entries)


def _key(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise _wrong("a key of the registry is not hexadecimal") from error


def _wrong(message: str) -> ProofInvalid:
    return ProofInvalid(f"the proof does not hold: {message}", hint=_HINT)
