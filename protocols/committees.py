"""The public committees, their sizes, and what makes their certificates valid.

Everything here is computed alike by the ledger's rules, by every seat and by whoever checks them afterwards.
"""

from __future__ import annotations

from functools import lru_cache

from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import domain_hash, verify
from protocols import sortition
from protocols.digests import header_hash
from protocols.epochs import EpochCertificate, EpochHeader, HeaderVote
from protocols.interpreter.state import Registry, State
from protocols.params import Params
from protocols.quorum import MAX_SEATS, Committee, QuorumCertificate

MEMBERS_MAX = 256
"""Members of an epoch's committee: what a certificate's mask can name."""
DRAWS_KEPT = 8_192
"""Committees that are remembered, about 0.5 kB each: an epoch's body asks for each of them several times."""


def check_size(params: Params, eligible: int) -> tuple[int, int]:
    """Seats and threshold of a check committee when `eligible` checkers have stake.

    A committee is never "the first T of a larger draw": who answers first could then choose itself.
    """
    if eligible >= params.small_swarm_checkers:
        return params.committee_seats, params.committee_threshold
    if eligible >= params.small_committee_seats:
        return params.small_committee_seats, params.small_committee_threshold
    return _everybody(eligible)


def deploy_size(params: Params, eligible: int) -> tuple[int, int]:
    """Seats and threshold of a deploy committee when `eligible` checkers have stake."""
    if eligible >= params.deploy_seats:
        return params.deploy_seats, params.deploy_threshold
    return _everybody(eligible)


def check_committee(state: State, slot: int, worker: bytes) -> Committee | None:
    """Who checks `worker` in `slot`.

    None when the slot's beacon or its epoch's registry is not known (not started yet, or no longer kept) or when nobody
    can be drawn.
    """
    beacon = state.beacons.get(slot)
    registry = state.registries.get(state.params.epoch_of_slot(slot))
    if beacon is None or not registry:
        return None
    k, threshold = check_size(state.params, _eligible(registry))
    return _draw(registry, beacon, worker, k, threshold, state.network)


def deploy_beacon(mix: bytes, block_hash: bytes, network: bytes) -> bytes:
    """Beacon of the orders placed in one block: nobody knows it before the block's hash exists."""
    return domain_hash("kaisar/placed", network, mix, block_hash)


def deploy_committee(
    params: Params, registry: Registry, beacon: bytes, order_id: bytes, *, network: bytes
) -> Committee | None:
    """Who authorises and witnesses an order: drawn when it is placed (`OrderState.seats`); None if nobody can be."""
    k, threshold = deploy_size(params, _eligible(registry))
    return _draw(registry, beacon, order_id, k, threshold, network)


def verify_certificate(certificate: QuorumCertificate, committee: Committee, network: bytes) -> bool:
    """Whether a quorum of the committee's seats signed the certificate's core; never raises on decoded messages."""
    seats = [seat for seat in range(MAX_SEATS) if certificate.mask >> seat & 1]
    if len(seats) < max(committee.threshold, 1) or len(seats) != len(certificate.signatures):
        return False
    if seats[-1] >= len(committee.seats):
        return False
    body, tag = encode(certificate.core), certificate.core.DOMAIN
    return all(
        verify(committee.seats[seat], tag, network, body, signature)
        for seat, signature in zip(seats, certificate.signatures, strict=True)
    )


def epoch_members(registry: Registry) -> Registry:
    """Who closes an epoch: everybody up to 256 checkers, else the 256 largest stakes (of equal ones the smallest keys).

    In the registry's order, which is also that of a certificate's mask.
    """
    return registry if len(registry) <= MEMBERS_MAX else _largest(registry)


@lru_cache(maxsize=4)
def _largest(registry: Registry) -> Registry:
    return tuple(sorted(sorted(registry, key=lambda entry: (-entry[1], entry[0]))[:MEMBERS_MAX]))


def header_stake(certificate: EpochCertificate, registry: Registry) -> tuple[int, int]:
    """Stake that the mask claims, and that of all `epoch_members`; (0, total) for a mask that does not fit.

    Signatures are not looked at.
    """
    members = epoch_members(registry)
    total = sum(stake for _, stake in members)
    masked = _masked(certificate.mask)
    if len(masked) != len(certificate.signatures) or (masked and masked[-1] >= len(members)):
        return 0, total
    return sum(members[member][1] for member in masked), total


def is_supermajority(signed: int, total: int) -> bool:
    """At least two thirds of the stake."""
    return 0 < 2 * total <= 3 * signed


def verify_header(certificate: EpochCertificate, header: EpochHeader, registry: Registry, network: bytes) -> bool:
    """Whether members with ≥ 2/3 of the members' stake signed this header; cheap checks come before signatures."""
    if not is_supermajority(*header_stake(certificate, registry)):
        return False
    vote = encode(HeaderVote(header.epoch, header.round, header_hash(header, network)))
    members = epoch_members(registry)
    return all(
        verify(members[member][0], HeaderVote.DOMAIN, network, vote, signature)
        for member, signature in zip(_masked(certificate.mask), certificate.signatures, strict=True)
    )


def _masked(mask: bytes) -> list[int]:
    bits = int.from_bytes(mask, "little")
    return [index for index in range(8 * len(mask)) if bits >> index & 1]


def _everybody(eligible: int) -> tuple[int, int]:
    return (eligible, 2 * eligible // 3 + 1) if eligible else (0, 0)


def _eligible(registry: Registry) -> int:
    return sum(stake > 0 for _, stake in registry)


@lru_cache(maxsize=DRAWS_KEPT)
def _draw(
    registry: Registry, beacon: bytes, subject: bytes, k: int, threshold: int, network: bytes
) -> Committee | None:
    if not threshold:
        return None
    members = sortition.committee(beacon, subject, registry, k, network=network)
    return Committee(tuple(registry[member][0] for member in members), threshold)
