"""Rewards of the node's owner: what anchored epochs say, claimed by proof, and proven to anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kaisar_p2p.errors import DecodeError, KaisarError
from kaisar_p2p.wire.codec import decode
from protocols.epochs import EpochBody, LeafProof
from protocols.interpreter.calls import RewardClaim
from protocols.interpreter.state import AccountState
from protocols.proofs import export_reward, prove_reward

if TYPE_CHECKING:
    from node.node import Node

HINT = "wait for the next anchored epoch: `kaisar epochs` shows them"


@dataclass(frozen=True)
class Claimed:
    """A reward that was drawn: the call, and how much came to the balance."""

    call_hash: bytes
    amount_planck: int


def newest_proof(node: Node) -> tuple[LeafProof, int]:
    """Proof of the owner's reward leaf in the newest anchored epoch, and its cumulative amount in planck.

    Raises KaisarError when no epoch is anchored, its leaves are not here yet, or the owner has earned nothing.
    """
    state = node.chain.state
    anchor = state.anchors.get(state.last_anchor)
    if anchor is None:
        raise KaisarError("no epoch is anchored yet", hint=HINT)
    data = node.store.item("body", anchor.header_hash)
    if data is None:
        raise KaisarError(f"the leaves of epoch {state.last_anchor} are not here yet", hint="try again in some seconds")
    try:
        body = decode(EpochBody, data)
    except DecodeError as error:
        raise KaisarError(f"the stored leaves of epoch {state.last_anchor} are damaged: {error.message}") from error
    owner = node.wallet.public_key
    earned = {leaf.account: leaf.cumulative_planck for leaf in body.rewards}
    if owner not in earned:
        raise KaisarError(f"this owner has earned nothing up to epoch {state.last_anchor}", hint=HINT)
    return prove_reward(body, owner, state.network), earned[owner]


async def claim(node: Node) -> Claimed:
    """Draw all rewards up to the newest anchored epoch."""
    proof, cumulative = newest_proof(node)
    claimed = node.chain.state.accounts.get(node.wallet.public_key, AccountState()).claimed_planck
    if cumulative <= claimed:
        raise KaisarError("everything that was earned so far is claimed", hint=HINT)
    result = await node.call(RewardClaim(proof))
    if result.reason:
        raise KaisarError(f"the ledger did not pay: {result.reason}", hint="try again after the next epoch")
    return Claimed(result.call_hash, cumulative - claimed)


def export_proof(node: Node) -> str:
    """The file for `kaisar proof verify`."""
    proof, _ = newest_proof(node)
    anchored = node.chain.anchor_proofs.get(proof.epoch)
    if anchored is None:
        raise KaisarError(f"the certificate of epoch {proof.epoch} is not here", hint="restart the node")
    data = export_reward(node.chain.ledger.network, anchored.header, anchored.certificate, anchored.registry, proof)
    return data.decode()
