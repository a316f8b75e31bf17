"""Gossip on the topic `epoch`: reveals, header proposals and votes; whose turn it is, and what is believed.

A message is about an epoch that ends: from its last slot on, because nodes see a block at slightly different times, and
until the epoch is anchored or the next one ends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import decode, decode_any
from kaisar_p2p.wire.crypto import domain_hash
from kaisar_p2p.wire.envelope import Signed, Verified, open_signed
from kaisar_p2p.wire.verdict import Verdict
from protocols.committees import epoch_members
from protocols.digests import registry_root
from protocols.epoch_body import last_slot_of, mix_input
from protocols.epochs import EpochHeader, HeaderProposal, HeaderVote, MixReveal
from protocols.interpreter.state import Registry, State

TOPIC = "epoch"
MESSAGE_BYTES_MAX = 2048
MAX_ROUNDS = 256
EpochMessage = MixReveal | HeaderProposal | HeaderVote
_CLASSES: tuple[type[Any], ...] = (MixReveal, HeaderProposal, HeaderVote)


def proposers(state: State, epoch: int) -> tuple[bytes, ...]:
    """Keys of those who may propose, in order of rounds: shuffled by the beacon of the epoch's last slot.

    Empty while that beacon or the registry is not known, or no longer kept.
    """
    beacon = state.beacons.get(last_slot_of(epoch, state.params))
    registry = state.registries.get(epoch)
    return _shuffled(beacon, registry, state.network) if beacon is not None and registry else ()


def proposer_of(state: State, epoch: int, round_: int) -> bytes | None:
    """Whose turn round `round_` is."""
    order = proposers(state, epoch)
    return order[round_ % len(order)] if order else None


def validate_epoch(
    data: bytes, received_at: float, state: State
) -> tuple[Verdict, str, Verified[MixReveal] | Verified[HeaderProposal] | Verified[HeaderVote] | None]:
    """Judge a gossip message by the state at hand; never raises. Whether a round's time has come, the machine knows."""
    # [REJECT] The message is small and canonical.
    if len(data) > MESSAGE_BYTES_MAX:
        return Verdict.REJECT, "too long", None
    try:
        signed = decode(Signed, data)
        message = _message(signed.body)
    except DecodeError as error:
        return Verdict.REJECT, error.message, None
    epoch = message.header.epoch if isinstance(message, HeaderProposal) else message.epoch
    reason = _not_now(state, epoch)
    if reason:
        return Verdict.IGNORE, reason, None
    # [REJECT] The sender is a member of the epoch's committee, with stake.
    if not any(key == signed.signer and stake > 0 for key, stake in epoch_members(state.registries[epoch])):
        return Verdict.REJECT, "the sender is not in the epoch's registry", None
    reason = _impossible(message, signed.signer, state)
    if reason:
        return Verdict.REJECT, reason, None
    # [REJECT] The signature is the sender's.
    try:
        verified: Verified[Any] = open_signed(type(message), data, state.network)
    except (DecodeError, SignatureError) as error:
        return Verdict.REJECT, error.message, None
    # [REJECT] A reveal is the sender's VRF output for this epoch.
    if isinstance(message, MixReveal) and vrf.verify(signed.signer, mix_input(state, epoch), message.proof) is None:
        return Verdict.REJECT, "false VRF proof", None
    return Verdict.ACCEPT, "", verified


def _message(body: bytes) -> EpochMessage:
    message: Any = decode_any(_CLASSES, body)
    return message  # type: ignore[no-any-return]


def _not_now(state: State, epoch: int) -> str:
    # [IGNORE] The epoch is ending or over here: we may lag behind the sender.
    if state.number < 0 or state.slot < last_slot_of(epoch, state.params):
        return "the epoch has not ended here"
    # [IGNORE] It is the newest that has ended, and not anchored: an honest sender may lag behind us.
    if epoch < state.epoch - 1 or epoch <= state.last_anchor:
        return "the epoch is over"
    # [IGNORE] Its registry and beacon are known.
    if not proposers(state, epoch):
        return "nothing is known of the epoch"
    return ""


def _impossible(message: EpochMessage, sender: bytes, state: State) -> str:
    if isinstance(message, MixReveal):
        return ""
    round_ = message.header.round if isinstance(message, HeaderProposal) else message.round
    # [REJECT] The round can exist.
    if round_ >= MAX_ROUNDS:
        return "impossible round"
    if isinstance(message, HeaderVote):
        return ""
    # [REJECT] It is the proposer's turn in that round.
    if proposer_of(state, message.header.epoch, round_) != sender:
        return "not the proposer of the round"
    # [REJECT] The header speaks of this epoch and registry.
    return "" if _fits(message.header, state) else "impossible header"


def _fits(header: EpochHeader, state: State) -> bool:
    last = last_slot_of(header.epoch, state.params)
    if header.last_slot != last or header.first_slot > last:
        return False
    return header.registry_root == _root(state.registries[header.epoch])


@lru_cache(maxsize=4)
def _root(registry: Registry) -> bytes:
    return registry_root(registry)


@lru_cache(maxsize=4)
def _shuffled(beacon: bytes, registry: Registry, network: bytes) -> tuple[bytes, ...]:
    members = (key for key, stake in epoch_members(registry) if stake > 0)
    return tuple(sorted(members, key=lambda key: domain_hash("kaisar/turn", network, beacon, key)))
