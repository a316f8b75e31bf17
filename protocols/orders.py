"""Offers: how a client asks workers for a price and a short hold before it places an order on the ledger.

Messages, and what a workload must look like. `selection` chooses whom to ask, `offers` asks and answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, AtMost, Bytes32, Count, Planck, Text64, Text256, encode, message
from protocols.adverts import Spec

OFFER_PROTOCOL = "/kaisar/offer/1"
SECONDS_PER_HOUR = 3600


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

    `image` is digest-pinned for Docker and empty for a bare command (process runtime); `ports` are TCP ports that the
    program listens on, the first one being health-checked and probed by witnesses.
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


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_REQUEST, NOT_ACTIVE, NO_CAPACITY, BAD_WORKLOAD, BAD_DURATION, BUSY, NO_RUNTIME = range(1, 8)
REFUSALS = {
    BAD_REQUEST: "not a valid request of that client",
    NOT_ACTIVE: "the worker is not certified, or has left",
    NO_CAPACITY: "the worker has not so much free",
    BAD_WORKLOAD: "the workload cannot be run as it is described",
    BAD_DURATION: "the duration is out of bounds",
    BUSY: "too many offers are held already; try again in some seconds",
    NO_RUNTIME: "the worker cannot run this kind of workload",
}
WORKLOAD_BYTES_MAX = 65_536
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_IMAGE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,255}")


def workload_fault(workload: Workload) -> str:
    """Why nobody could run this workload, or "": sizes, command, names of variables, ports."""
    if len(encode(workload)) > WORKLOAD_BYTES_MAX:
        return f"the workload is larger than {WORKLOAD_BYTES_MAX} bytes"
    if not workload.image and not (workload.command and workload.command[0]):
        return "neither an image nor a command"
    if workload.image and not _IMAGE.fullmatch(workload.image):
        return "not the name of an image"
    names = [variable.name for variable in workload.environment]
    if any(not _VARIABLE.fullmatch(name) for name in names) or len(set(names)) < len(names):
        return "a variable's name is not a name, or is there twice"
    if any("\0" in text for text in (*workload.command, *(variable.value for variable in workload.environment))):
        return "a zero byte in the command or in a variable"
    if 0 in workload.ports or len(set(workload.ports)) < len(workload.ports):
        return "port 0, or a port twice"
    return ""


def total_planck(price_planck_per_hour: int, duration_s: int) -> int:
    """What an order locks: the price of its whole duration in planck, rounded up."""
    return -(-price_planck_per_hour * duration_s // SECONDS_PER_HOUR)
