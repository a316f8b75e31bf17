"""Who asks the ledger to pay: settlement of our leases from anchored leaves (`protocols/README.md`, "Settlement").

Anybody may send a settlement. The worker's owner does as soon as an epoch is anchored; the client only if the lease has
ended and nobody has settled it some blocks later, so that a provider that is gone cannot keep the refund.
"""

from __future__ import annotations

from collections.abc import Callable

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import decode
from protocols.actions import Action, BlockApplied, Event, Submit
from protocols.deploy import OPEN
from protocols.epochs import EpochBody, LeaseLeaf
from protocols.interpreter.calls import LeaseSettle, payload_of
from protocols.interpreter.state import ORDER_CLOSED, OrderState, State
from protocols.proofs import NothingToProve, prove_lease

CLIENT_PATIENCE_BLOCKS = 3


class Claims:
    """Settles what concerns `owner`, once for each new anchor.

    Args:
        owner: 32-byte account.
        body_of: encoded body of an anchored header by its hash, or None while it is not here.
    """

    deadline: float | None = None

    def __init__(self, owner: bytes, body_of: Callable[[bytes], bytes | None]) -> None:
        self._owner = owner
        self._body_of = body_of
        self._body: EpochBody | None = None
        self._body_hash = b""

    def step(self, event: Event, now: float) -> list[Action]:
        """Blocks drive it."""
        if not isinstance(event, BlockApplied) or not event.live or event.state.last_anchor < 0:
            return []
        state = event.state
        mine = {
            order_id: order
            for order_id, order in state.orders.items()
            if order.status != ORDER_CLOSED and self._owner in (order.client, order.worker_owner)
        }
        body = self._newest_body(state) if mine else None
        if body is None:
            return []
        actions: list[Action] = []
        for leaf in body.leases:
            order = mine.get(leaf.order_id)
            if order is not None and self._should_settle(order, leaf, state):
                try:
                    proof = prove_lease(body, leaf.order_id, state.network)
                except NothingToProve:  # a tree too large for a proof: the next epoch's may not be
                    continue
                key = f"settle/{leaf.order_id.hex()}/{body.epoch}"
                actions.append(Submit(key, payload_of(LeaseSettle(proof))))
        return actions

    def _newest_body(self, state: State) -> EpochBody | None:
        header_hash = state.anchors[state.last_anchor].header_hash
        if header_hash != self._body_hash:
            data = self._body_of(header_hash)
            if data is None:
                return None
            try:
                self._body, self._body_hash = decode(EpochBody, data), header_hash
            except DecodeError:
                return None
        return self._body

    def _should_settle(self, order: OrderState, leaf: LeaseLeaf, state: State) -> bool:
        if leaf.seconds <= order.paid_seconds and leaf.outcome == OPEN:
            return False
        if self._owner == order.worker_owner:
            return True
        since = state.number - state.anchors[state.last_anchor].block
        return leaf.outcome != OPEN and since >= CLIENT_PATIENCE_BLOCKS
