"""Rewards: claimed once from the newest anchor, and every reason why not is told."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from immutables import Map

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from node import earnings
from node.chain import AnchorProof
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
    HeaderVote,
    RewardLeaf,
)
from protocols.genesis import Genesis, genesis_state, write_genesis
from protocols.interpreter.calls import RewardClaim
from protocols.interpreter.state import AccountState, Anchor
from protocols.proofs import verify_export, verify_leaf

OWNER, OTHER = b"\x01" * 32, b"\x02" * 32
EMPTY = genesis_state(write_genesis(Genesis("test", "demo", 0)))
KEYS = KeyPair.from_seed(b"\x03" * 32)
REGISTRY = ((KEYS.public_key, 100),)


def body(*rewards: RewardLeaf) -> EpochBody:
    return EpochBody(4, (), (), rewards, (), ())


def header_of(made: EpochBody) -> EpochHeader:
    trees = [leaves_of(made, tree, EMPTY.network) for tree in (VERDICTS, REWARDS, LEASES, EVIDENCE)]
    roots = [merkle.root(tree) for tree in trees]
    return EpochHeader(
        4, 0, 16, 19, bytes(32), bytes(32), registry_root(REGISTRY), bytes(32), *roots, merkle.EMPTY_ROOT,
        *[len(tree) for tree in trees], 0,
    )  # fmt: skip


class Owner:
    """A node with one anchored epoch, as far as rewards are concerned."""

    def __init__(self, made: EpochBody | None, claimed_planck: int = 0) -> None:
        self.items: dict[bytes, bytes] = {}
        self.calls: list[Any] = []
        self.reason = ""
        state = replace(EMPTY, accounts=Map({OWNER: AccountState(claimed_planck=claimed_planck)}))
        self.proofs: dict[int, AnchorProof] = {}
        if made is not None:
            header = header_of(made)
            digest = header_hash(header, EMPTY.network)
            state = replace(state, anchors=Map({4: Anchor(header, digest, 20, 1, 1, 1)}), last_anchor=4)
            self.items[digest] = encode(made)
            vote = encode(HeaderVote(4, 0, digest))
            certificate = EpochCertificate(b"\x01", (KEYS.sign(HeaderVote.DOMAIN, EMPTY.network, vote),))
            self.proofs[4] = AnchorProof(header, certificate, REGISTRY)
            self.header = header
        ledger = SimpleNamespace(network=EMPTY.network)
        self.chain = SimpleNamespace(state=state, anchor_proofs=self.proofs, ledger=ledger)
        self.wallet = SimpleNamespace(public_key=OWNER)
        self.store = SimpleNamespace(item=lambda kind, key: self.items.get(key) if kind == "body" else None)

    async def call(self, made: Any) -> Any:
        self.calls.append(made)
        return SimpleNamespace(call_hash=b"\x0c" * 32, reason=self.reason)


REWARDED = body(RewardLeaf(OWNER, 700), RewardLeaf(OTHER, 50))


async def test_what_was_earned_and_not_claimed_is_drawn() -> None:
    node: Any = Owner(REWARDED, claimed_planck=200)
    assert await earnings.claim(node) == earnings.Claimed(b"\x0c" * 32, 500)
    (call,) = node.calls
    assert isinstance(call, RewardClaim)
    assert verify_leaf(call.proof, node.header)
    assert call.proof.leaf == encode(RewardLeaf(OWNER, 700))


@pytest.mark.parametrize("claimed_planck", [700, 701])
async def test_nothing_is_drawn_twice(claimed_planck: int) -> None:
    node: Any = Owner(REWARDED, claimed_planck)
    with pytest.raises(KaisarError, match="is claimed"):
        await earnings.claim(node)
    assert node.calls == []


async def test_why_there_is_nothing_to_draw() -> None:
    with pytest.raises(KaisarError, match="no epoch is anchored yet"):
        await earnings.claim(Owner(None))  # type: ignore[arg-type]
    with pytest.raises(KaisarError, match="has earned nothing up to epoch 4"):
        await earnings.claim(Owner(body(RewardLeaf(OTHER, 5))))  # type: ignore[arg-type]
    node: Any = Owner(REWARDED)
    held = dict(node.items)
    node.items.clear()
    with pytest.raises(KaisarError, match="the leaves of epoch 4 are not here yet"):
        await earnings.claim(node)
    node.items.update({key: value[:-1] for key, value in held.items()})
    with pytest.raises(KaisarError, match="damaged"):
        await earnings.claim(node)
    assert node.calls == []


async def test_what_the_ledger_says_against_it_is_told() -> None:
    node: Any = Owner(REWARDED)
    node.reason = "the pool is empty"
    with pytest.raises(KaisarError, match="the ledger did not pay: the pool is empty"):
        await earnings.claim(node)


def test_an_exported_proof_convinces_anybody() -> None:
    node: Any = Owner(REWARDED)
    report = verify_export(earnings.export_proof(node).encode())
    assert (report.account, report.cumulative_planck, report.epoch) == (OWNER, 700, 4)
    assert (report.signed_stake_planck, report.total_stake_planck) == (100, 100)


def test_without_the_certificate_there_is_no_file() -> None:
    node: Any = Owner(REWARDED)
    node.proofs.clear()
    with pytest.raises(KaisarError, match="the certificate of epoch 4 is not here"):
        earnings.export_proof(node)
