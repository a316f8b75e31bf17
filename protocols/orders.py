"""Offers: how a client asks workers for a price and a short hold before it places an order on the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, AtMost, Bytes32, Count, Planck, Text64, Text256, message
from protocols.adverts import Spec

OFFER_PROTOCOL = "/kaisar/offer/1"


@message(60)
@dataclass(frozen=True)
class Variable:
    """One environment variable of the tenant's program."""

    name: Text64
    value: Annotated[str, AtMost(4096)]


@message(61)
@dataclass(frozen=True)
class Workload:
    """What to run. The ledger holds only its hash: a tenant's command is nobody else's business.

    `image` is digest-pinned for Docker and empty for a bare command (process runtime); `ports` are TCP ports the program
    listens on, the first one being health-checked and probed by witnesses.
    """

    image: Text256
    command: Annotated[tuple[Annotated[str, AtMost(4096)], ...], Count(64)]
    environment: Annotated[tuple[Variable, ...], Count(64)]
    ports: Annotated[tuple[U16, ...], Count(16)]


@message(62)
@dataclass(frozen=True)
class OrderSpec:
    """What an order asks for; its hash, the workload's included, is in the offer."""

    resources: Spec
    duration_s: U32
    workload_hash: Bytes32


@message(63)
@dataclass(frozen=True)
class OfferRequest:
    """Client → worker on `/kaisar/offer/1`, signed by the client's machine key."""

    DOMAIN: ClassVar[str] = "kaisar/askoffer"
    client_key: Bytes32
    spec: OrderSpec
    workload: Workload
    nonce: Bytes32


@message(64)
@dataclass(frozen=True)
class Offer:
    """Worker → client, signed: a price and a hold until `valid_until_ms`."""

    DOMAIN: ClassVar[str] = "kaisar/offer"
    worker: Bytes32
    client_key: Bytes32
    spec_hash: Bytes32
    price_planck_per_hour: Planck
    valid_until_ms: U64
    nonce: Bytes32


@message(65)
@dataclass(frozen=True)
class Refusal:
    """Worker → client: no offer, with a reason for people. Codes are in `REFUSALS`."""

    code: U8
    text: Text256
