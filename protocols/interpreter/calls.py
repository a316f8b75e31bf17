"""The calls that a wallet can sign. Payload = ``b"KSR"``, version byte, call id (= message tag), canonical message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias, cast, get_args

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import (
    U8,
    U16,
    AtMost,
    Bytes32,
    Bytes64,
    Count,
    Message,
    Planck,
    Text256,
    decode,
    encode,
    message,
)
from protocols.adverts import Spec
from protocols.epochs import EpochCertificate, EpochHeader, LeafProof
from protocols.orders import OrderSpec
from protocols.quorum import QuorumCertificate

MAGIC = b"KSR\x01"
PROVIDER, CHECKER, CLIENT = 1, 2, 4
"""Roles of a machine, a bit each."""
BIND_DOMAIN = "kaisar/bind"


@message(80)
@dataclass(frozen=True)
class Transfer:
    """Move KAI to another account."""

    to: Bytes32
    amount_planck: Planck


@message(81)
@dataclass(frozen=True)
class LicenceBuy:
    """Buy checker licences; `referrer` is zero for none."""

    count: U16
    referrer: Bytes32


@message(82)
@dataclass(frozen=True)
class StakeBond:
    """Stake KAI for checking."""

    amount_planck: Planck


@message(83)
@dataclass(frozen=True)
class StakeUnbond:
    """Start the unbonding of stake; it stops counting at once and can be withdrawn later."""

    amount_planck: Planck


@message(84)
@dataclass(frozen=True)
class StakeWithdraw:
    """Move all stake whose unbonding is over back to the balance."""


@message(85)
@dataclass(frozen=True)
class MachineBind:
    """Bind a machine key to this account.

    `signature` is the machine's, under the domain "kaisar/bind", over the account's 32 bytes ‖ the byte `roles`.
    """

    machine: Bytes32
    roles: U8
    signature: Bytes64


@message(86)
@dataclass(frozen=True)
class WorkerRegister:
    """Register a bound machine as a worker: pays the fee, locks the bond."""

    worker: Bytes32
    spec: Spec
    price_planck_per_hour: Planck


@message(87)
@dataclass(frozen=True)
class WorkerActivate:
    """A PASS certificate makes the worker active."""

    certificate: QuorumCertificate


@message(88)
@dataclass(frozen=True)
class WorkerRetire:
    """Leave; the bond returns when no lease is open."""

    worker: Bytes32


@message(89)
@dataclass(frozen=True)
class BootstrapAnnounce:
    """Publish where a bound machine can be reached; replaces what it announced before."""

    machine: Bytes32
    addrs: Annotated[tuple[Text256, ...], Count(8)]


@message(90)
@dataclass(frozen=True)
class OrderPlace:
    """Place an order: `offer` is the worker's signed envelope.

    `escrow_planck` + `points_planck` are exactly ⌈price × duration / 3600⌉.
    """

    spec: OrderSpec
    offer: Annotated[bytes, AtMost(1024)]
    escrow_planck: Planck
    points_planck: Planck


@message(91)
@dataclass(frozen=True)
class OrderCancel:
    """End an order early."""

    order_id: Bytes32


@message(92)
@dataclass(frozen=True)
class LeaseSettle:
    """Pay what the anchored lease leaf says; anyone may send it."""

    proof: LeafProof


@message(93)
@dataclass(frozen=True)
class AnchorPost:
    """Anchor an epoch."""

    header: EpochHeader
    certificate: EpochCertificate


@message(94)
@dataclass(frozen=True)
class RewardClaim:
    """Claim all rewards up to an anchored epoch."""

    proof: LeafProof


CallBody: TypeAlias = (
    Transfer | LicenceBuy | StakeBond | StakeUnbond | StakeWithdraw | MachineBind | WorkerRegister | WorkerActivate
    | WorkerRetire | BootstrapAnnounce | OrderPlace | OrderCancel | LeaseSettle | AnchorPost | RewardClaim
)  # fmt: skip
CALLS: dict[int, type[CallBody]] = {cast(type[Message], cls).TAG: cls for cls in get_args(CallBody)}


def bind_body(account: bytes, roles: int) -> bytes:
    """What the machine signs in `MachineBind`."""
    return account + bytes([roles])


def payload_of(body: CallBody) -> bytes:
    """The bytes that a wallet submits to the ledger."""
    return MAGIC + bytes([cast(Message, body).TAG]) + encode(body)


def parse_payload(payload: bytes) -> CallBody:
    """The call in a payload; DecodeError for an unknown version or call, or a malformed body."""
    if payload[:4] != MAGIC or len(payload) < 5:
        raise DecodeError("not a call of this version")
    cls = CALLS.get(payload[4])
    if cls is None:
        raise DecodeError(f"unknown call {payload[4]}")
    return decode(cls, payload[5:])
