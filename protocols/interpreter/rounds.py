"""What the first block of a slot or an epoch fixes, before its calls: beacon, registry, mix."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from immutables import Map

from kaisar_p2p.wire.crypto import domain_hash
from protocols.interpreter.calls import CHECKER
from protocols.interpreter.events import EpochStarted, LedgerEvent, SlotStarted
from protocols.interpreter.state import Registry, State

Value = TypeVar("Value")


def open_block(state: State, number: int, block_hash: bytes, time_ms: int) -> tuple[State, list[LedgerEvent]]:
    """The state with the block's number, hash and time, and with the beacon and registry if the block starts any."""
    opened = replace(state, number=number, block_hash=block_hash, time_ms=time_ms)
    events: list[LedgerEvent] = []
    if opened.epoch not in state.registries:
        opened = _start_epoch(opened)
        events.append(EpochStarted(opened.epoch))
    if opened.slot not in state.beacons:
        beacon = domain_hash("kaisar/beacon", state.network, opened.mixes[opened.epoch], block_hash)
        opened = replace(opened, beacons=opened.beacons.set(opened.slot, beacon))
        events.append(SlotStarted(opened.slot))
    return opened, events


def _start_epoch(state: State) -> State:
    """Fix the registry and the mix, and drop what is older than `kept_epochs`."""
    epoch, first = state.epoch, state.epoch - state.params.kept_epochs + 1
    return replace(
        state,
        registries=_since(first, state.registries).set(epoch, registry_of(state)),
        mixes=_since(first, state.mixes).set(epoch, _newest_mix(state)),
        beacons=_since(first * state.params.epoch_slots, state.beacons),
        used_offers=Map({key: until for key, until in state.used_offers.items() if until >= state.time_ms}),
    )


def _since(first: int, kept: Map[int, Value]) -> Map[int, Value]:
    return Map({key: value for key, value in kept.items() if key >= first})


def _newest_mix(state: State) -> bytes:
    anchor = state.anchors.get(state.last_anchor)
    return anchor.header.mix if anchor else genesis_mix(state.network)


def genesis_mix(network: bytes) -> bytes:
    """The mix until the first anchor brings one."""
    return domain_hash("kaisar/mix", network)


def registry_of(state: State) -> Registry:
    """Checkers that may be drawn: bound as CHECKER, by an owner with a licence and enough stake; sorted by key.

    An owner's stake counts once, for the first machine it bound (the smallest key among those of one block): more
    machines give no more seats.
    """
    first: dict[bytes, tuple[int, bytes]] = {}
    for key, machine in state.machines.items():
        if machine.roles & CHECKER:
            candidate = (machine.bound_block, key)
            first[machine.owner] = min(first.get(machine.owner, candidate), candidate)
    stakes = [(key, _stake_that_counts(state, owner)) for owner, (_, key) in first.items()]
    return tuple(sorted((key, stake) for key, stake in stakes if stake > 0))


def _stake_that_counts(state: State, owner: bytes) -> int:
    account = state.accounts.get(owner)
    if account is None or account.licences < 1 or account.stake_planck < state.params.min_stake_planck:
        return 0
    return account.stake_planck
