"""What a lease has earned: witness windows → lease leaf → planck. Integers only.

A window is a slot. Only windows that a deploy committee certified as UP are paid, so a lease that nobody can reach
costs nothing from the moment it is gone. Money moves in the ledger's rules, when a leaf of an anchored epoch is proven.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocols.deploy import CANCELLED, COMPLETED, EXPIRED, FAILED, OPEN, UP
from protocols.epochs import LeaseLeaf
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_CLOSED, OrderState
from protocols.params import Params
from protocols.quorum import QuorumCertificate, WitnessCore

SECONDS_PER_HOUR = 3600
NEVER = 0
"""`first_window` and `last_window` of a lease that was never UP: no order can be placed before slot 0 has passed."""


def cost_planck(price_planck_per_hour: int, seconds: int, *, round_up: bool = False) -> int:
    """Price of so many seconds, in planck: rounded up for what a client locks, down for what a provider is paid."""
    product = price_planck_per_hour * seconds
    return -(-product // SECONDS_PER_HOUR) if round_up else product // SECONDS_PER_HOUR


def lease_windows(duration_s: int, params: Params) -> int:
    """Windows that a lease of `duration_s` spans, counted from the first one in which it was UP."""
    return -(-duration_s * 1000 // params.slot_ms)


def deploy_windows(params: Params) -> int:
    """Windows after its placement in which an order has to be UP for the first time."""
    return -(-params.deploy_timeout_ms // params.slot_ms)


def up_windows(certificates: Iterable[QuorumCertificate]) -> dict[bytes, frozenset[int]]:
    """The slots in which each order was certified as UP."""
    found: dict[bytes, set[int]] = {}
    for certificate in certificates:
        core = certificate.core
        if isinstance(core, WitnessCore) and core.status == UP:
            found.setdefault(core.order_id, set()).add(core.slot)
    return {order_id: frozenset(slots) for order_id, slots in found.items()}


def needs_leaf(order: OrderState, first_slot: int, params: Params) -> bool:
    """Whether an order has a leaf in the body that starts at `first_slot`: it is open, or was closed since."""
    return order.status != ORDER_CLOSED or params.slot_of(order.ended_block) >= first_slot


def lease_leaf(
    order_id: bytes,
    order: OrderState,
    previous: LeaseLeaf | None,
    windows: Iterable[int],
    last_slot: int,
    params: Params,
) -> LeaseLeaf:
    """The lease at the end of slot `last_slot`.

    Args:
        order_id: 32 bytes.
        order: as the ledger knows it at the end of the epoch.
        previous: the leaf in the body before this one, if the order was in it. A leaf with an outcome stays as it is.
        windows: slots with an UP certificate that no earlier body counted, in any order.
        last_slot: the last slot that the body covers.
        params: the network's numbers.

    Outcomes, the first that applies:
        FAILED: `unwitnessed_windows` windows in a row without UP; or no UP at all within the deploy timeout.
        COMPLETED: the whole duration was witnessed; or its time is over and no more than `unwitnessed_windows` windows
            are missing.
        CANCELLED: by the client; EXPIRED: its time is over with more windows missing.

    A window without a certificate counts as missing only `certificate_grace_slots` slots later, because certificates
    need time to arrive.
    """
    if previous is not None and previous.outcome != OPEN:
        return previous
    lease = _Lease.of(order, last_slot, params)
    seen = sorted({slot for slot in windows if lease.placed <= slot <= min(last_slot, lease.cancelled)})
    if previous is None or previous.first_window == NEVER:
        if not seen:
            return LeaseLeaf(order_id, 0, NEVER, lease.outcome_if_never_up(), NEVER)
        previous = LeaseLeaf(order_id, 0, seen[0], OPEN, seen[0])
    return _continued(lease, previous, seen, params)


def _continued(lease: _Lease, leaf: LeaseLeaf, seen: list[int], params: Params) -> LeaseLeaf:
    """A leaf that has its first window, with the windows in `seen` (sorted) added."""
    final = leaf.first_window + lease.windows - 1
    end = min(final, lease.cancelled)
    last, counted, failed = leaf.last_window, 0, False
    for slot in seen:
        if slot > end:
            break
        failed = min(slot - 1, lease.decided) - last >= params.unwitnessed_windows
        if failed:
            break
        counted, last = counted + 1, max(last, slot)
    failed = failed or min(end, lease.decided) - last >= params.unwitnessed_windows
    seconds = min(lease.duration_s, leaf.seconds + counted * params.slot_ms // 1000)
    outcome = FAILED if failed else lease.outcome(seconds, final, params)
    return LeaseLeaf(leaf.order_id, seconds, last, outcome, leaf.first_window)


@dataclass(frozen=True)
class _Lease:
    """An order in slots. Windows up to `decided` will get no more certificates."""

    placed: int
    cancelled: int
    decided: int
    windows: int
    deploy_windows: int
    duration_s: int

    @classmethod
    def of(cls, order: OrderState, last_slot: int, params: Params) -> _Lease:
        ended = order.status in (ORDER_CANCELLED, ORDER_CLOSED)
        return cls(
            placed=params.slot_of(order.placed_block),
            cancelled=params.slot_of(order.ended_block) if ended else 1 << 32,
            decided=last_slot - params.certificate_grace_slots,
            windows=lease_windows(order.duration_s, params),
            deploy_windows=deploy_windows(params),
            duration_s=order.duration_s,
        )

    def outcome_if_never_up(self) -> int:
        if min(self.decided, self.cancelled) >= self.placed + self.deploy_windows:
            return FAILED
        return CANCELLED if self.decided >= self.cancelled else OPEN

    def outcome(self, seconds: int, final: int, params: Params) -> int:
        missing_ms = (self.duration_s - seconds) * 1000
        if seconds >= self.duration_s:
            return COMPLETED
        if self.decided >= final and missing_ms <= params.unwitnessed_windows * params.slot_ms:
            return COMPLETED
        if self.decided >= self.cancelled:
            return CANCELLED
        return EXPIRED if self.decided >= final else OPEN
