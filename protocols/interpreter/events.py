"""What a block changed, for machines and people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotStarted:
    """The first block of a slot; its beacon is in state.beacons[slot]."""

    slot: int


@dataclass(frozen=True)
class EpochStarted:
    """The first block of an epoch; its registry and mix are in the state."""

    epoch: int


@dataclass(frozen=True)
class CallIgnored:
    """A call without effect, and why."""

    call_hash: bytes
    signer: bytes
    call: str
    reason: str


@dataclass(frozen=True)
class CallApplied:
    """A call with effect; `call` is its class name, `subject` the machine, order or account concerned."""

    call_hash: bytes
    signer: bytes
    call: str
    subject: bytes


@dataclass(frozen=True)
class WorkerRegistered:
    """Due for its registration check from the next slot on."""

    worker: bytes


@dataclass(frozen=True)
class WorkerActivated:
    """Certified; may be rented."""

    worker: bytes


@dataclass(frozen=True)
class WorkerRetired:
    """Left the network."""

    worker: bytes


@dataclass(frozen=True)
class OrderPlaced:
    """state.orders[order_id] is open."""

    order_id: bytes


@dataclass(frozen=True)
class OrderEnded:
    """Cancelled by the client, or closed by its settlement."""

    order_id: bytes


@dataclass(frozen=True)
class LeaseSettled:
    """Money moved: paid to the provider, given back to the client, and from the worker's bond to the client."""

    order_id: bytes
    paid_planck: int
    refunded_planck: int
    refunded_points: int
    closed: bool
    penalty_planck: int = 0


@dataclass(frozen=True)
class Anchored:
    """state.anchors[epoch] is set."""

    epoch: int


@dataclass(frozen=True)
class RewardClaimed:
    """An account drew its rewards."""

    account: bytes
    amount_planck: int


LedgerEvent = (
    SlotStarted | EpochStarted | CallIgnored | CallApplied | WorkerRegistered | WorkerActivated | WorkerRetired
    | OrderPlaced | OrderEnded | LeaseSettled | Anchored | RewardClaimed
)  # fmt: skip
