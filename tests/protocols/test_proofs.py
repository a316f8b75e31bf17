"""Proofs: every leaf can be proven within 600 bytes, and a changed file proves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from protocols.deploy import OPEN
from protocols.digests import header_hash, registry_root
from protocols.epoch_body import leaves_of
from protocols.epochs import (
    EVIDENCE,
    LEASES,
    MAX_LEAVES,
    REWARDS,
    VERDICTS,
    EpochBody,
    EpochCertificate,
    EpochHeader,
    HeaderVote,
    LeaseLeaf,
    RewardLeaf,
)
from protocols.popw import PASS
from protocols.proofs import (
    NothingToProve,
    ProofInvalid,
    export_reward,
    prove_leaf,
    prove_lease,
    prove_reward,
    verify_export,
    verify_leaf,
)
from protocols.quorum import QuorumCertificate, VerdictCore

NETWORK = sha256(b"network").digest()
KEYS = sorted((KeyPair.from_seed(sha256(b"%d" % index).digest()) for index in range(4)), key=lambda k: k.public_key)
REGISTRY = tuple((keys.public_key, 10**20 + index) for index, keys in enumerate(KEYS))


def name(index: int) -> bytes:
    return sha256(b"name %d" % index).digest()


def body_of(rewards: int = 5, leases: int = 3, verdicts: int = 2) -> EpochBody:
    return EpochBody(
        epoch=7,
        reveals=(),
        certificates=tuple(
            QuorumCertificate(VerdictCore(7, 28, name(index), bytes(32), PASS), 7, ()) for index in range(verdicts)
        ),
        rewards=tuple(sorted((RewardLeaf(name(i), 2**120 + i) for i in range(rewards)), key=lambda leaf: leaf.account)),
        leases=tuple(LeaseLeaf(name(index), 60, 2**31, OPEN, 2**31) for index in range(leases)),
        evidence=(name(1),),
    )


def header_of(body: EpochBody) -> EpochHeader:
    trees = [leaves_of(body, tree, NETWORK) for tree in (VERDICTS, REWARDS, LEASES, EVIDENCE)]
    roots = [merkle.root(tree) for tree in trees]
    return EpochHeader(
        7, 0, 28, 31, bytes(32), bytes(32), registry_root(REGISTRY), bytes(32), *roots, merkle.EMPTY_ROOT,
        *[len(tree) for tree in trees], 0,
    )  # fmt: skip


def certificate_of(header: EpochHeader, signers: tuple[int, ...] = (0, 1, 3)) -> EpochCertificate:
    vote = encode(HeaderVote(header.epoch, header.round, header_hash(header, NETWORK)))
    mask = sum(1 << index for index in signers).to_bytes(1, "little")
    return EpochCertificate(mask, tuple(KEYS[index].sign(HeaderVote.DOMAIN, NETWORK, vote) for index in signers))


def export() -> bytes:
    body = body_of()
    header = header_of(body)
    return export_reward(NETWORK, header, certificate_of(header), REGISTRY, prove_reward(body, name(2), NETWORK))


@given(st.integers(1, 40), st.integers(0, 39))
def test_each_leaf_is_proven_and_no_other(count: int, index: int) -> None:
    body = body_of(rewards=count)
    header = header_of(body)
    if index >= count:
        with pytest.raises(NothingToProve):
            prove_leaf(body, REWARDS, index, NETWORK)
        return
    proof = prove_leaf(body, REWARDS, index, NETWORK)
    assert verify_leaf(proof, header)
    assert not verify_leaf(replace(proof, index=index + 1), header)
    assert not verify_leaf(replace(proof, leaf=proof.leaf[:-1] + b"\xff"), header)
    assert not verify_leaf(replace(proof, epoch=8), header)
    assert not verify_leaf(replace(proof, tree=LEASES), header)
    assert not verify_leaf(replace(proof, tree=9), header)


@pytest.mark.parametrize("tree", [VERDICTS, REWARDS, LEASES])
def test_a_proof_among_4096_leaves_has_at_most_600_bytes(tree: int) -> None:
    body = body_of(4096, 4096, 4096)
    for index in (0, 1, 2047, 4095):
        proof = prove_leaf(body, tree, index, NETWORK)
        assert verify_leaf(proof, header_of(body))
        assert len(encode(proof)) <= 600


def test_every_tree_has_proofs() -> None:
    body = body_of()
    header = header_of(body)
    assert verify_leaf(prove_lease(body, name(1), NETWORK), header)
    assert verify_leaf(prove_leaf(body, VERDICTS, 1, NETWORK), header)
    assert verify_leaf(prove_leaf(body, EVIDENCE, 0, NETWORK), header)


def test_what_is_not_in_the_epoch_cannot_be_proven() -> None:
    with pytest.raises(NothingToProve, match="no rewards"):
        prove_reward(body_of(), name(99), NETWORK)
    with pytest.raises(NothingToProve, match="not in epoch"):
        prove_lease(body_of(), name(99), NETWORK)
    with pytest.raises(NothingToProve, match="too large"):
        prove_leaf(body_of(rewards=MAX_LEAVES + 1), REWARDS, 0, NETWORK)


def test_all_accounts_and_leases_of_a_full_epoch_can_be_proven() -> None:
    body = body_of(MAX_LEAVES, MAX_LEAVES, 0)
    for tree in (REWARDS, LEASES):
        assert len(encode(prove_leaf(body, tree, MAX_LEAVES - 1, NETWORK))) <= 600


def test_the_file_says_what_it_proves() -> None:
    report = verify_export(export())
    header = header_of(body_of())
    assert report.account == name(2)
    assert report.cumulative_planck == 2**120 + 2
    assert (report.epoch, report.header_hash, report.network) == (7, header_hash(header, NETWORK), NETWORK)
    assert report.signed_stake_planck == sum(stake for _, stake in REGISTRY) - REGISTRY[2][1]
    assert report.total_stake_planck == sum(stake for _, stake in REGISTRY)


def changed(**changes: object) -> bytes:
    return json.dumps({**json.loads(export()), **changes}).encode()


def other_parts() -> dict[str, tuple[bytes, str]]:
    header = header_of(body_of())
    few, more = certificate_of(header, (0, 1)), replace(header, minted_planck=1)
    registry = json.loads(export())["registry"]
    lease = prove_lease(body_of(), name(1), NETWORK)
    foreign = prove_reward(body_of(rewards=9), name(8), NETWORK)
    return {
        "few signatures": (changed(certificate=encode(few).hex()), "less than two thirds"),
        "another header": (changed(header=encode(more).hex()), "signature"),
        "another network": (changed(network=bytes(32).hex()), "signature"),
        "a short network": (changed(network="00"), "32 bytes"),
        "a smaller registry": (changed(registry=registry[:3]), "registry"),
        "another stake": (changed(registry=[*registry[:3], [registry[3][0], "1"]]), "registry"),
        "a lease's proof": (changed(proof=encode(lease).hex()), "not in the header's tree"),
        "another body's proof": (changed(proof=encode(foreign).hex()), "not in the header's tree"),
        "not hexadecimal": (changed(proof="xyz"), "hexadecimal"),
        "not text": (changed(proof=1), "not text"),
        "not a message": (changed(proof="00"), "malformed"),
        "another format": (changed(format="x"), "format"),
        "an extra key": (changed(extra=1), "format"),
        "a malformed registry": (changed(registry=[["00", "1"]]), "malformed"),
        "a registry of other types": (changed(registry=[[1, 2]]), "not \\[key, stake\\]"),
        "no registry": (changed(registry=1), "not a list"),
        "a list": (b"[]", "format"),
        "not JSON": (b"{", "not JSON"),
        "not text at all": (b"\xff\xfe\xfd", "not JSON"),
        "too long": (b" " * (1 << 19), "at most"),
    }


@pytest.mark.parametrize("case", other_parts())
def test_a_changed_file_is_refused_with_the_reason(case: str) -> None:
    data, reason = other_parts()[case]
    with pytest.raises(ProofInvalid, match=reason):
        verify_export(data)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_never_proves_more(position: int, value: int) -> None:
    data = bytearray(export())
    data[position % len(data)] = value
    try:
        report = verify_export(bytes(data))
    except ProofInvalid:
        return
    assert report == verify_export(export())  # white space, or the case of a hexadecimal digit


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_without_another_error(data: bytes) -> None:
    with pytest.raises(ProofInvalid):
        verify_export(data)
