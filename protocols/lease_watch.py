"""What a seat of a deploy committee knows of one lease, and what it keeps of that (`lease_witness` acts on it)."""

from __future__ import annotations

from dataclasses import dataclass, field

from kaisar_p2p.wire.codec import U8, U16, U32, encode, message
from protocols.actions import Store
from protocols.interpreter.state import OrderState
from protocols.lease_votes import Ballot
from protocols.params import Params
from protocols.popw_votes import CERTIFICATE_TOPIC
from protocols.quorum import Committee
from protocols.settlement import lease_windows


@message(73)
@dataclass(frozen=True)
class WatchRecord:
    """What a seat keeps of a lease; never sent. `ready_slot` is 0 until the lease is READY."""

    port: U16
    healthy: U8
    ready_slot: U32


@dataclass
class Look:
    """A probe that is due or under way: for READY (`slot` None) or for a window; `answered` once the worker has."""

    slot: int | None
    at: float | None
    attempt: int = 0
    answered: bool = False


@dataclass
class Watch:
    """One order of whose committee this node has a seat."""

    order_id: bytes
    order: OrderState
    committee: Committee
    aggregators: tuple[bytes, ...]
    ticket: Ballot
    ready: Ballot
    windows: dict[int, Ballot] = field(default_factory=dict)
    port: int = 0
    healthy: bool = False
    ready_slot: int = 0
    first_up: int = 0
    sequence: int = -1
    ended: bool = False
    looks: dict[int | None, Look] = field(default_factory=dict)
    deliveries: int = 0
    deliver_at: float | None = None

    @property
    def record(self) -> Store:
        """What to keep."""
        return Store("watch", self.order_id, encode(WatchRecord(self.port, int(self.healthy), self.ready_slot)))

    def window(self, slot: int) -> Ballot:
        """The ballot of a window."""
        if slot not in self.windows:
            name = f"witness/{self.order_id.hex()}/{slot}"
            self.windows[slot] = Ballot(name, self.committee, self.aggregators, CERTIFICATE_TOPIC)
        return self.windows[slot]

    def ballots(self) -> list[Ballot]:
        """All of its ballots."""
        return [self.ticket, self.ready, *self.windows.values()]

    def witnesses(self, slot: int, params: Params) -> bool:
        """Whether the lease is to be seen in this window: READY before it, and its paid time is not over."""
        if not self.ready_slot or slot <= self.ready_slot:
            return False
        return slot < (self.first_up or self.ready_slot + 1) + lease_windows(self.order.duration_s, params)

    @property
    def deadline(self) -> float | None:
        """Its next probe, delivery or retry."""
        times = [look.at for look in self.looks.values()] + [ballot.deadline for ballot in self.ballots()]
        return min((at for at in (*times, self.deliver_at) if at is not None), default=None)
