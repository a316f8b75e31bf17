"""Orders and the settlement of leases: escrow → provider by the witnessed second, the rest back to the client."""

from __future__ import annotations

from dataclasses import replace

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire.envelope import open_signed
from protocols.adverts import Spec
from protocols.committees import deploy_beacon, deploy_committee
from protocols.deploy import CANCELLED, EXPIRED, FAILED, OPEN
from protocols.digests import offer_hash, spec_hash
from protocols.epochs import LEASES, LeaseLeaf
from protocols.interpreter.calls import LeaseSettle, OrderCancel, OrderPlace
from protocols.interpreter.draft import Draft, Refused
from protocols.interpreter.events import LeaseSettled, OrderEnded, OrderPlaced
from protocols.interpreter.proofs import proven_leaf
from protocols.interpreter.state import ACTIVE, ORDER_CANCELLED, ORDER_CLOSED, ORDER_OPEN, OrderState, WorkerState
from protocols.orders import Offer, total_planck
from protocols.params import PERMILLE
from protocols.quorum import Committee
from protocols.settlement import cost_planck


def place(draft: Draft, signer: bytes, call: OrderPlace, order_id: bytes) -> bytes:
    """Lock the price of an offer that the worker signed; points come out of the treasury, which backs them."""
    offer = _open_offer(draft, call)
    worker = _check_offer(draft, signer, call, offer)
    _check_capacity(draft, offer.worker, worker.spec, call.spec.resources)
    cost = total_planck(offer.price_planck_per_hour, call.spec.duration_s)
    if call.escrow_planck + call.points_planck != cost:
        raise Refused("escrow and points are not exactly the price of the duration")
    account = draft.payer(signer, call.escrow_planck)
    if account.points_planck < call.points_planck:
        raise Refused("not so many points")
    committee = _draw_seats(draft, order_id)
    draft.accounts[signer] = replace(
        account,
        balance_planck=account.balance_planck - call.escrow_planck,
        points_planck=account.points_planck - call.points_planck,
    )
    draft.treasury_planck -= call.points_planck
    draft.used_offers[offer.worker + offer.nonce] = offer.valid_until_ms
    draft.orders[order_id] = _order(draft, signer, call, offer, worker.owner, committee)
    draft.open_orders[offer.worker] = (*draft.open_orders.get(offer.worker, ()), order_id)
    draft.events.append(OrderPlaced(order_id))
    return order_id


def _open_offer(draft: Draft, call: OrderPlace) -> Offer:
    try:
        verified = open_signed(Offer, call.offer, draft.network)
    except (DecodeError, SignatureError) as error:
        raise Refused("the offer is not a signed offer") from error
    if verified.signer != verified.message.worker:
        raise Refused("the offer is not signed by its worker")
    return verified.message


def _check_offer(draft: Draft, signer: bytes, call: OrderPlace, offer: Offer) -> WorkerState:
    draft.machine_of(signer, offer.client_key)
    worker = draft.worker(offer.worker)
    if worker.status != ACTIVE:
        raise Refused("the worker is not active")
    if offer.spec_hash != spec_hash(call.spec, draft.network):
        raise Refused("the offer is for another specification")
    if offer.valid_until_ms < draft.base.time_ms:
        raise Refused("the offer has expired")
    if offer.worker + offer.nonce in draft.used_offers:
        raise Refused("the offer was used already")
    if offer.price_planck_per_hour == 0:
        raise Refused("a price of nothing")
    if not draft.params.min_duration_s <= call.spec.duration_s <= draft.params.max_duration_s:
        raise Refused("the duration is out of bounds")
    return worker


def _check_capacity(draft: Draft, key: bytes, has: Spec, asked: Spec) -> None:
    if not asked.cpu_cores or not asked.memory_mb:
        raise Refused("an order needs at least a core and some memory")
    if asked.gpus and asked.gpu_memory_mb > has.gpu_memory_mb:
        raise Refused("the worker's GPUs have less memory")
    order_ids = draft.open_orders.get(key, ())
    if len(order_ids) >= draft.params.max_open_orders:
        raise Refused("the worker has too many orders that are not settled")
    running = [order.resources for each in order_ids if occupies(draft, order := draft.orders[each])]
    if any(
        sum(getattr(spec, name) for spec in (*running, asked)) > getattr(has, name)
        for name in ("cpu_cores", "memory_mb", "disk_mb", "gpus")
    ):
        raise Refused("the worker has not so much free")


def occupies(draft: Draft, order: OrderState) -> bool:
    """Whether an order still holds its worker's resources: open, and its time is not over at this block."""
    ends_ms = order.placed_ms + draft.params.deploy_timeout_ms + 1000 * order.duration_s
    return order.status == ORDER_OPEN and draft.base.time_ms < ends_ms


def _draw_seats(draft: Draft, order_id: bytes) -> Committee:
    base = draft.base
    if order_id in draft.orders:
        raise Refused("the order exists already")
    beacon = deploy_beacon(base.mixes[base.epoch], base.block_hash, base.network)
    committee = deploy_committee(base.params, base.registries[base.epoch], beacon, order_id, network=base.network)
    if committee is None:
        raise Refused("no checker can watch over an order yet")
    return committee


def _order(
    draft: Draft, signer: bytes, call: OrderPlace, offer: Offer, worker_owner: bytes, committee: Committee
) -> OrderState:
    locked = call.escrow_planck + call.points_planck
    return OrderState(
        client=signer,
        client_key=offer.client_key,
        worker=offer.worker,
        worker_owner=worker_owner,
        spec_hash=offer.spec_hash,
        resources=call.spec.resources,
        offer_hash=offer_hash(offer, draft.network),
        price_planck_per_hour=offer.price_planck_per_hour,
        duration_s=call.spec.duration_s,
        escrow_planck=locked,
        locked_planck=locked,
        points_planck=call.points_planck,
        placed_block=draft.base.number,
        placed_ms=draft.base.time_ms,
        seats=committee.seats,
        threshold=committee.threshold,
    )


def cancel(draft: Draft, signer: bytes, call: OrderCancel) -> bytes:
    """End an order early; the money moves when the lease's last leaf is settled.

    When epochs have not been anchored for long, no leaf may ever come: then either side can end the order for good.
    """
    order = draft.orders.get(call.order_id)
    if order is None:
        raise Refused("no such order")
    if signer in (order.client, order.worker_owner) and _is_stuck(draft, order):
        return _release(draft, call.order_id, order)
    if order.client != signer:
        raise Refused("the order is another account's")
    if order.status != ORDER_OPEN:
        raise Refused("the order is not open")
    draft.orders[call.order_id] = replace(order, status=ORDER_CANCELLED, ended_block=draft.base.number)
    draft.events.append(OrderEnded(call.order_id))
    return call.order_id


def _is_stuck(draft: Draft, order: OrderState) -> bool:
    """Whether the order's time is over, it is not settled, and no epoch was anchored for `release_epochs`."""
    since = max(draft.last_anchor, draft.params.epoch_of(order.placed_block))
    long_ago = draft.base.epoch > since + draft.params.release_epochs
    return long_ago and order.status != ORDER_CLOSED and not occupies(draft, order)


def _release(draft: Draft, order_id: bytes, order: OrderState) -> bytes:
    """Give back what was never settled as it came; whose fault it was that nobody anchored, nobody can tell."""
    points = max(0, order.points_planck - order.paid_planck)
    closed = _give_back(draft, order_id, order, points, CANCELLED)
    draft.orders[order_id] = closed
    draft.events.append(LeaseSettled(order_id, 0, closed.refunded_planck, closed.refunded_points, True))
    if order.status == ORDER_OPEN:
        draft.events.append(OrderEnded(order_id))
    return order_id


def settle(draft: Draft, call: LeaseSettle) -> bytes:
    """Pay newly witnessed seconds, and close the order if the leaf says that the lease is over. Anyone may send it."""
    leaf = proven_leaf(draft, call.proof, LEASES, LeaseLeaf)
    order = draft.orders.get(leaf.order_id)
    if order is None:
        raise Refused("no such order")
    if order.status == ORDER_CLOSED:
        raise Refused("the order is settled")
    seconds = min(leaf.seconds, order.duration_s)
    if leaf.outcome > EXPIRED:
        raise Refused("no such outcome")
    if seconds < order.paid_seconds:
        raise Refused("older than what was settled")
    if seconds == order.paid_seconds and leaf.outcome == OPEN:
        raise Refused("nothing new to settle")
    due = cost_planck(order.price_planck_per_hour, seconds) - order.paid_planck
    paid = replace(
        order,
        escrow_planck=order.escrow_planck - due,
        paid_planck=order.paid_planck + due,
        paid_seconds=seconds,
    )
    draft.add_balance(order.worker_owner, due)
    settled = paid if leaf.outcome == OPEN else _close(draft, leaf, paid)
    draft.orders[leaf.order_id] = settled
    draft.events.append(
        LeaseSettled(
            leaf.order_id,
            due,
            settled.refunded_planck,
            settled.refunded_points,
            settled.status == ORDER_CLOSED,
            settled.penalty_planck,
        )
    )
    if settled.status == ORDER_CLOSED and order.status == ORDER_OPEN:
        draft.events.append(OrderEnded(leaf.order_id))
    return leaf.order_id


def _close(draft: Draft, leaf: LeaseLeaf, order: OrderState) -> OrderState:
    """Give back what is left in escrow, and the penalty of a worker whose fault ended a lease which had begun."""
    at_fault = leaf.outcome == FAILED and leaf.fault and order.paid_seconds
    penalty = _take_penalty(draft, order, order.escrow_planck) if at_fault else 0
    return _give_back(draft, leaf.order_id, order, _rest_as_points(draft, order), leaf.outcome, penalty)


def _give_back(
    draft: Draft, order_id: bytes, order: OrderState, points: int, outcome: int, penalty: int = 0
) -> OrderState:
    """The order, closed. Its escrow goes to the client: `points` as points, the rest and the penalty in KAI."""
    rest = order.escrow_planck
    client = draft.account(order.client)
    draft.accounts[order.client] = replace(
        client,
        balance_planck=client.balance_planck + rest - points + penalty,
        points_planck=client.points_planck + points,
    )
    draft.treasury_planck += points
    _forget_open(draft, order.worker, order_id)
    return replace(
        order,
        escrow_planck=0,
        status=ORDER_CLOSED,
        ended_block=order.ended_block or draft.base.number,
        refunded_planck=rest - points,
        refunded_points=points,
        penalty_planck=penalty,
        outcome=outcome,
    )


def _rest_as_points(draft: Draft, order: OrderState) -> int:
    """How much of the escrow's rest becomes points.

    All of it once the lease ran (`refund_as_points`). Otherwise only what came as points and was not spent: points are
    spent before KAI, and never turn into KAI.
    """
    if order.paid_seconds and draft.params.refund_as_points:
        return order.escrow_planck
    return max(0, order.points_planck - order.paid_planck)


def _take_penalty(draft: Draft, order: OrderState, unused_planck: int) -> int:
    worker = draft.workers[order.worker]
    penalty = min(worker.bond_planck * draft.params.provider_fault_permille // PERMILLE, unused_planck)
    draft.workers[order.worker] = replace(worker, bond_planck=worker.bond_planck - penalty)
    return penalty


def _forget_open(draft: Draft, worker: bytes, order_id: bytes) -> None:
    rest = tuple(each for each in draft.open_orders[worker] if each != order_id)
    if rest:
        draft.open_orders[worker] = rest
    else:
        del draft.open_orders[worker]
