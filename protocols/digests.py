"""Hashes that several protocols, and the ledger, must compute alike."""

from __future__ import annotations

from collections.abc import Iterable

from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import domain_hash
from protocols.epochs import EpochHeader
from protocols.orders import Offer, OrderSpec, Workload


def workload_hash(workload: Workload, network: bytes) -> bytes:
    """What `OrderSpec.workload_hash` holds."""
    return domain_hash("kaisar/workload", network, encode(workload))


def spec_hash(spec: OrderSpec, network: bytes) -> bytes:
    """What `Offer.spec_hash` and `OrderState.spec_hash` hold."""
    return domain_hash("kaisar/spec", network, encode(spec))


def offer_hash(offer: Offer, network: bytes) -> bytes:
    """What `OrderState.offer_hash` and `TicketCore.offer_hash` hold: of the message, not of its envelope."""
    return domain_hash(Offer.DOMAIN, network, encode(offer))


def header_hash(header: EpochHeader, network: bytes) -> bytes:
    """What committee members vote for, and what the next header's `previous` holds."""
    return domain_hash("kaisar/header", network, encode(header))


def registry_root(registry: Iterable[tuple[bytes, int]]) -> bytes:
    """RFC 9162 root over the registry's entries in order: 32-byte key ‖ stake in planck as 16 bytes, big-endian."""
    return merkle.root(key + stake.to_bytes(16, "big") for key, stake in registry)
