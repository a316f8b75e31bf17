"""What a lease has earned: witness windows → lease leaf → planck. Integers only.

A window is a slot. Only windows that a deploy committee certified as UP are paid, so a lease that nobody can reach
costs nothing from the moment it is gone. A worker is blamed only for windows that were certified as GONE: a program
that stopped may have been stopped by its tenant, and absent witnesses say nothing about the worker. Money moves in the
ledger's rules, when a leaf of an anchored epoch is proven.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocols.deploy import CANCELLED, COMPLETED, EXPIRED, FAILED, OPEN, UP
from protocols.epochs import LeaseLeaf
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_CLOSED, ORDER_OPEN, OrderState
from protocols.orders import SECONDS_PER_HOUR
from protocols.params import Params
from protocols.quorum import QuorumCertificate, WitnessCore

NEVER = 0
"""`first_window` and `last_window` of a lease that was never UP: no order can be placed before slot 0 has passed."""


MASK_WINDOWS = 32


def cost_planck(price_planck_per_hour: int, seconds: int) -> int:
    """What a provider is paid for so many seconds, in planck, rounded down; `total_planck` is what was locked."""
    return price_planck_per_hour * seconds // SECONDS_PER_HOUR


def lease_windows(duration_s: int, params: Params) -> int:
    """Windows that a lease of `duration_s` spans, counted from the first one in which it was UP."""
    return -(-duration_s * 1000 // params.slot_ms)


def deploy_windows(params: Params) -> int:
    """Windows after its placement in which an order has to be UP for the first time."""
    return -(-params.deploy_timeout_ms // params.slot_ms)


def up_windows(certificates: Iterable[QuorumCertificate]) -> dict[bytes, frozenset[int]]:
    """The slots in which each order was certified as UP."""
    return seen_windows(certificates, UP)


def seen_windows(certificates: Iterable[QuorumCertificate], status: int) -> dict[bytes, frozenset[int]]:
    """The slots in which each order was certified as `status`: UP, DOWN or GONE."""
    found: dict[bytes, set[int]] = {}
    for certificate in certificates:
        core = certificate.core
        if isinstance(core, WitnessCore) and core.status == status:
            found.setdefault(core.order_id, set()).add(core.slot)
    return {order_id: frozenset(slots) for order_id, slots in found.items()}


def needs_leaf(order: OrderState, first_slot: int, params: Params) -> bool:
    """Whether an order has a leaf in the body that starts at `first_slot`: it is open, or was closed since."""
    return order.status != ORDER_CLOSED or params.slot_of(order.ended_block) >= first_slot


def is_watched(order: OrderState, slot: int, params: Params) -> bool:
    """Whether a window can belong to the order's lease: from its placement to its end, or as long as it can last."""
    placed = params.slot_of(order.placed_block)
    longest = deploy_windows(params) + params.certificate_grace_slots + lease_windows(order.duration_s, params)
    last = placed + longest if order.status == ORDER_OPEN else params.slot_of(order.ended_block)
    return placed <= slot <= min(last, placed + longest)


def lease_leaf(
    order_id: bytes,
    order: OrderState,
    previous: LeaseLeaf | None,
    windows: Iterable[int],
    last_slot: int,
    params: Params,
    *,
    gone: Iterable[int] = (),
    down: Iterable[int] = (),
) -> LeaseLeaf:
    """The lease at the end of slot `last_slot`.

    Args:
        order_id: 32 bytes.
        order: as the ledger knows it at the end of the epoch.
        previous: the leaf in the body before this one, if the order was in it. A leaf with an outcome stays as it is.
        windows: slots with an UP certificate that no earlier body counted, in any order.
        last_slot: the last slot that the body covers.
        params: the network's numbers.
        gone: as `windows`, for slots with a GONE certificate.
        down: the same for DOWN.

    Outcomes, the first that applies:
        FAILED: `unwitnessed_windows` windows in a row without UP; or no UP at all within the deploy timeout.
        COMPLETED: the whole duration was witnessed; or its time is over and no more than `unwitnessed_windows` windows
            are missing.
        CANCELLED: by the client; EXPIRED: its time is over with more windows missing.

    FAILED is the worker's `fault` if its missing windows were certified as GONE. The first of them may have no
    certificate, because a worker that vanishes in the middle of a window leaves its witnesses divided.

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
    return _continued(lease, previous, seen, _Missed.of(previous, gone, down, last_slot), params)


def _continued(lease: _Lease, leaf: LeaseLeaf, seen: list[int], missed: _Missed, params: Params) -> LeaseLeaf:
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
    fault = int(failed and missed.are_the_workers_fault(last, params.unwitnessed_windows))
    if outcome != OPEN:
        return LeaseLeaf(leaf.order_id, seconds, last, outcome, leaf.first_window, fault)
    return LeaseLeaf(leaf.order_id, seconds, last, outcome, leaf.first_window, 0, *missed.masks_after(last))


@dataclass(frozen=True)
class _Missed:
    """Slots in which a lease was certified as GONE or DOWN."""

    gone: frozenset[int]
    down: frozenset[int]

    @classmethod
    def of(cls, leaf: LeaseLeaf, gone: Iterable[int], down: Iterable[int], last_slot: int) -> _Missed:
        """What the leaf remembers, and what no body has counted before."""
        return cls(
            *(
                frozenset(
                    {leaf.last_window + 1 + bit for bit in range(MASK_WINDOWS) if mask >> bit & 1}
                    | {slot for slot in slots if slot <= last_slot}
                )
                for mask, slots in ((leaf.gone, gone), (leaf.down, down))
            )
        )

    def are_the_workers_fault(self, last: int, windows: int) -> bool:
        """Whether the `windows` after `last`, the newest that was UP, show that the worker had vanished."""
        first, *others = range(last + 1, last + 1 + max(1, windows))
        return self.gone.issuperset(others or [first]) and first not in self.down

    def masks_after(self, last: int) -> tuple[int, int]:
        """`gone` and `down` of a leaf whose newest UP window is `last`."""
        gone, down = (
            sum(1 << (slot - last - 1) for slot in slots if last < slot <= last + MASK_WINDOWS)
            for slots in (self.gone, self.down)
        )
        return gone, down


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
