"""A reward proof in a file: what an account has earned, checked without a node, a ledger or a network.

The file is JSON with a readable part and the canonical messages in hexadecimal. Only the messages are believed:

1. the leaf is in the reward tree of the header (RFC 9162),
2. the registry is the one that the header names,
3. members with at least two thirds of that registry's stake signed the header.

Whether this header is the one that the network anchored is not in the file: compare `header_hash` with `kaisar epochs`
on any node that you trust, or pass it to `kaisar proof verify --header`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from kaisar_p2p.errors import DecodeError, KaisarError
from kaisar_p2p.identity import ss58_encode
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.merkle import verify_inclusion
from kaisar_p2p.wire.money import planck_to_kai
from protocols.committees import header_stake, verify_header
from protocols.digests import header_hash, registry_root
from protocols.epochs import REWARDS, EpochCertificate, EpochHeader, LeafProof, RewardLeaf
from protocols.interpreter.state import Registry

FORMAT = "kaisar-reward-proof"
VERSION = 1
MAX_FILE_BYTES = 1 << 20
MAX_MEMBERS = 256
M = TypeVar("M")
_HINT = "export it again with `kaisar proof export`"


class ProofInvalid(KaisarError):
    """A proof file that does not prove what it says."""


@dataclass(frozen=True)
class ProvenReward:
    """What a proof file has proven; amounts in planck, keys and hashes of 32 bytes."""

    network: bytes
    account: bytes
    cumulative_planck: int
    epoch: int
    header_hash: bytes
    registry_root: bytes
    signers: int
    members: int
    signed_stake: int
    total_stake: int


def export_reward_proof(
    network: bytes, proof: LeafProof, header: EpochHeader, certificate: EpochCertificate, registry: Registry
) -> str:
    """The file's text; ProofInvalid when the parts do not fit together, so that no bad proof leaves this node."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "network": network.hex(),
        "header": encode(header).hex(),
        "certificate": encode(certificate).hex(),
        "registry": [[key.hex(), str(stake)] for key, stake in registry],
        "proof": encode(proof).hex(),
    }
    proven = _verify(document)
    readable = {
        "account": ss58_encode(proven.account),
        "earned_kai": planck_to_kai(proven.cumulative_planck),
        "epoch": proven.epoch,
        "header_hash": proven.header_hash.hex(),
    }
    return json.dumps({**document, "says": readable}, indent=2) + "\n"


def verify_reward_proof(text: str | bytes) -> ProvenReward:
    """What the file proves; ProofInvalid with the reason when it proves nothing."""
    if len(text) > MAX_FILE_BYTES:
        raise ProofInvalid(f"a proof has at most {MAX_FILE_BYTES} bytes", hint=_HINT)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProofInvalid(f"not a proof file: {str(error)[:100]}", hint=_HINT) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProofInvalid("not a reward proof", hint=_HINT)
    if document.get("version") != VERSION:
        raise ProofInvalid(
            f"a proof of version {str(document.get('version'))[:20]}", hint=f"this program reads version {VERSION}"
        )
    return _verify(document)


def _verify(document: dict[str, Any]) -> ProvenReward:
    network = _bytes(document, "network")
    if len(network) != 32:
        raise ProofInvalid("the network id has not 32 bytes", hint=_HINT)
    header = _message(document, "header", EpochHeader)
    certificate = _message(document, "certificate", EpochCertificate)
    proof = _message(document, "proof", LeafProof)
    registry = _registry(document.get("registry"))
    leaf = _leaf(header, proof)
    if registry_root(registry) != header.registry_root:
        raise ProofInvalid("the registry is not the one that the header names")
    signed, total = header_stake(certificate, registry)
    if not verify_header(certificate, header, registry, network):
        raise ProofInvalid("the header is not signed by two thirds of the registry's stake")
    return ProvenReward(
        network=network,
        account=leaf.account,
        cumulative_planck=leaf.cumulative_planck,
        epoch=header.epoch,
        header_hash=header_hash(header, network),
        registry_root=header.registry_root,
        signers=len(certificate.signatures),
        members=len(registry),
        signed_stake=signed,
        total_stake=total,
    )


def _leaf(header: EpochHeader, proof: LeafProof) -> RewardLeaf:
    if proof.tree != REWARDS or proof.epoch != header.epoch:
        raise ProofInvalid("the leaf is of another tree or epoch than the header")
    if not verify_inclusion(header.reward_root, header.rewards, proof.index, proof.leaf, proof.path):
        raise ProofInvalid("the leaf is not in the header's reward tree")
    try:
        return decode(RewardLeaf, proof.leaf)
    except DecodeError as error:
        raise ProofInvalid(f"the leaf is malformed: {error.message}") from None


def _message(document: dict[str, Any], name: str, cls: type[M]) -> M:
    try:
        return decode(cls, _bytes(document, name))
    except DecodeError as error:
        raise ProofInvalid(f"{name} is malformed: {error.message}", hint=_HINT) from None


def _bytes(document: dict[str, Any], name: str) -> bytes:
    value = document.get(name)
    try:
        if isinstance(value, str):
            return bytes.fromhex(value)
    except ValueError:
        pass
    raise ProofInvalid(f"{name} is not hexadecimal", hint=_HINT)


def _registry(value: Any) -> Registry:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MEMBERS:
        raise ProofInvalid(f"the registry is not a list of 1 to {MAX_MEMBERS} members", hint=_HINT)
    return tuple(_member(item) for item in value)


def _member(item: Any) -> tuple[bytes, int]:
    match item:
        case [str() as key, str() as stake] if (
            len(key) == 64 and stake.isascii() and stake.isdigit() and (len(stake) <= 39)
        ):
            try:
                member = bytes.fromhex(key), int(stake)
            except ValueError:
                raise ProofInvalid("a member's key is not hexadecimal", hint=_HINT) from None
            if member[1] < 1 << 128 and len(member[0]) == 32:
                return member
    raise ProofInvalid("a member of the registry is not a key and a stake", hint=_HINT)
