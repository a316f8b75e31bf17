"""What the ledger's calls add up to. Immutable: a snapshot is a reference (`immutables.Map` is a HAMT)."""

from __future__ import annotations

from dataclasses import dataclass, field

from immutables import Map

from protocols.adverts import Spec
from protocols.epochs import EpochHeader
from protocols.params import Params

REGISTERED, ACTIVE, RETIRED = 1, 2, 3
ORDER_OPEN, ORDER_CANCELLED, ORDER_CLOSED = 1, 2, 3


@dataclass(frozen=True)
class Unbonding:
    """Stake on its way back: withdrawable from the start of epoch `due_epoch`."""

    amount_planck: int
    due_epoch: int


@dataclass(frozen=True)
class AccountState:
    """One owner.

    Points are worth their face value for orders and nothing else; the treasury holds KAI for all of them.
    `claimed_planck` is the cumulative reward already claimed.
    """

    balance_planck: int = 0
    points_planck: int = 0
    licences: int = 0
    stake_planck: int = 0
    unbonding: tuple[Unbonding, ...] = ()
    claimed_planck: int = 0


@dataclass(frozen=True)
class MachineState:
    """A bound machine key; `roles` is a bit set of calls.PROVIDER, CHECKER, CLIENT."""

    owner: bytes
    roles: int
    bound_block: int


@dataclass(frozen=True)
class WorkerState:
    """A registered worker; `status` REGISTERED → ACTIVE → RETIRED."""

    owner: bytes
    spec: Spec
    price_planck_per_hour: int
    bond_planck: int
    status: int
    registered_block: int
    activated_block: int = 0


@dataclass(frozen=True)
class OrderState:
    """An order and its money.

    `escrow_planck` is still locked, of `locked_planck` at first, of which `points_planck` came as points. `seats` is
    the deploy committee, drawn when the order was placed. `penalty_planck` came to the client from the worker's bond.
    """

    client: bytes
    client_key: bytes
    worker: bytes
    worker_owner: bytes
    spec_hash: bytes
    resources: Spec
    offer_hash: bytes
    price_planck_per_hour: int
    duration_s: int
    escrow_planck: int
    locked_planck: int
    points_planck: int
    placed_block: int
    placed_ms: int
    seats: tuple[bytes, ...]
    threshold: int
    status: int = ORDER_OPEN
    ended_block: int = 0
    paid_seconds: int = 0
    paid_planck: int = 0
    refunded_planck: int = 0
    refunded_points: int = 0
    penalty_planck: int = 0
    outcome: int = 0


@dataclass(frozen=True)
class Anchor:
    """An anchored epoch: the header as posted, its hash, where, and the stake that signed of the stake that could."""

    header: EpochHeader
    header_hash: bytes
    block: int
    signed_stake: int
    total_stake: int
    anchor_bytes: int


@dataclass(frozen=True)
class Totals:
    """Where all KAI is that is not with an account; `issued_planck` is the sum that conservation must give."""

    issued_planck: int = 0
    treasury_planck: int = 0
    burnt_planck: int = 0
    reward_pool_planck: int = 0


Registry = tuple[tuple[bytes, int], ...]
"""((machine key, stake in planck), …) of the checkers that may be drawn, sorted by key."""


@dataclass(frozen=True)
class State:
    """State after block `number`; −1 before the genesis block.

    `open_orders[worker]` are its orders that are not closed; `used_offers[worker ‖ nonce]` is until when the offer was
    valid; dropped after that. `registries[e]` is taken from the state at the end of epoch e−1; `mixes[e]` likewise is
    the mix of the newest header anchored by then; `beacons[s]` is set by the first block of slot s; all three are kept
    for `kept_epochs` epochs.
    """

    network: bytes
    params: Params
    number: int = -1
    block_hash: bytes = bytes(32)
    time_ms: int = 0
    accounts: Map[bytes, AccountState] = field(default_factory=Map)
    machines: Map[bytes, MachineState] = field(default_factory=Map)
    workers: Map[bytes, WorkerState] = field(default_factory=Map)
    orders: Map[bytes, OrderState] = field(default_factory=Map)
    open_orders: Map[bytes, tuple[bytes, ...]] = field(default_factory=Map)
    used_offers: Map[bytes, int] = field(default_factory=Map)
    bootstrap: Map[bytes, tuple[str, ...]] = field(default_factory=Map)
    anchors: Map[int, Anchor] = field(default_factory=Map)
    last_anchor: int = -1
    licences_sold: int = 0
    totals: Totals = Totals()
    registries: Map[int, Registry] = field(default_factory=Map)
    mixes: Map[int, bytes] = field(default_factory=Map)
    beacons: Map[int, bytes] = field(default_factory=Map)

    @property
    def slot(self) -> int:
        """The slot of the newest block."""
        return self.params.slot_of(self.number)

    @property
    def epoch(self) -> int:
        """The epoch of the newest block."""
        return self.params.epoch_of(self.number)
