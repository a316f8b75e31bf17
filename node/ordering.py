"""Placing an order from this node: choose workers, ask for offers, lock the escrow. No other node is special."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from kaisar_p2p.errors import MeshError, OrderRefused
from kaisar_p2p.wire.envelope import Verified
from kaisar_p2p.wire.ids import short
from kaisar_p2p.wire.money import planck_to_kai
from protocols.adverts import Spec, WorkerAdvert
from protocols.interpreter.state import AccountState, State
from protocols.offers import check_offer, offer_request, order_call, order_spec
from protocols.orders import OFFER_PROTOCOL, Offer, OfferRequest, OrderSpec, Workload, total_planck, workload_fault
from protocols.selection import choose, why_nobody

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

ASKED = 6
BINDING_S = 15.0
"""How long an order waits for the call that binds our machine to its owner."""
OFFER_DEADLINE_S = 5.0
REPLY_BYTES = 2_048


@dataclass(frozen=True)
class PlaceOrder:
    """What a user asks for; `max_price_planck_per_hour` for the whole order."""

    resources: Spec
    workload: Workload
    duration_s: int
    max_price_planck_per_hour: int
    points_planck: int = 0


@dataclass(frozen=True)
class PlacedOrder:
    """An order that is final on the ledger."""

    order_id: bytes
    worker: bytes
    price_planck_per_hour: int
    escrow_planck: int
    points_planck: int


async def place(node: Node, request: PlaceOrder) -> PlacedOrder:
    """Find a worker, take its offer, lock the escrow.

    Raises OrderRefused, with nothing locked, when the request is malformed, nobody can serve it, or the balance is too
    small; LedgerError when the ledger does not answer in time.
    """
    state = await node.chain.caught_up()
    _check_request(node, state, request)
    state = await _bound_state(node)
    adverts = node.index.live_adverts(node.clock.now(), state.params.advert_ttl_ms)
    adverts = [advert for advert in adverts if advert.worker != node.key]
    nonce = secrets.token_bytes(32)  # of the order: the draw and the offers share it, so that the draw can be repeated
    candidates = _candidates(node, state, adverts, request, nonce)
    spec = order_spec(request.resources, request.duration_s, request.workload, state.network)
    refusals: list[str] = []
    for advert in candidates[:ASKED]:
        offer, reason = await _ask(node, state, advert, request, spec, nonce)
        if offer is not None:
            return await _take(node, offer, request, spec)
        refusals.append(f"{short(advert.worker)}: {reason}")
    raise OrderRefused("no worker made an offer: " + "; ".join(refusals), hint="try again, or ask for less")


def _check_request(node: Node, state: State, request: PlaceOrder) -> None:
    params, fault = state.params, workload_fault(request.workload)
    if fault:
        raise OrderRefused(fault, hint="correct the command, the image or the ports")
    if not params.min_duration_s <= request.duration_s <= params.max_duration_s:
        limits = f"{params.min_duration_s} to {params.max_duration_s} s"
        raise OrderRefused(f"a duration of {request.duration_s} s is out of bounds", hint=f"choose {limits}")
    owned = state.accounts.get(node.wallet.public_key, AccountState()).points_planck
    if request.points_planck > owned:
        asked = planck_to_kai(request.points_planck)
        raise OrderRefused(
            f"{asked} KAI are to be paid with points, the wallet has {planck_to_kai(owned)}", hint="lower --points"
        )


async def _bound_state(node: Node) -> State:
    """The newest state in which our machine is ours: a node that has just started binds it with its first call."""
    with trio.move_on_after(BINDING_S):
        while node.key not in node.chain.state.machines:
            await node.chain.advanced()
    state = node.chain.state
    if node.key not in state.machines:
        raise OrderRefused("this node's machine is not bound on the ledger yet", hint="try again in some seconds")
    if state.machines[node.key].owner != node.wallet.public_key:
        hint = "use the wallet that bound it, or `kaisar init` another data directory"
        raise OrderRefused("this node's machine is bound to another owner on the ledger", hint=hint)
    return state


def _candidates(
    node: Node, state: State, adverts: list[WorkerAdvert], request: PlaceOrder, nonce: bytes
) -> list[WorkerAdvert]:
    reason = why_nobody(adverts, request.resources, request.max_price_planck_per_hour, state)
    if reason:
        raise OrderRefused(f"nobody can serve this order: {reason}", hint="`kaisar workers` shows what there is")
    return choose(
        adverts,
        request.resources,
        request.max_price_planck_per_hour,
        nonce,
        state.beacons.get(state.slot, state.block_hash),
        state,
        scores_permille=node.index.pass_permille(),
        latencies_ms={peer.key: int(peer.rtt_s * 1000) for peer in node.mesh.peers() if peer.rtt_s is not None},
    )


async def _ask(
    node: Node, state: State, advert: WorkerAdvert, request: PlaceOrder, spec: OrderSpec, nonce: bytes
) -> tuple[Verified[Offer] | None, str]:
    keys = node.machine_key.key_pair
    asked = OfferRequest(keys.public_key, spec, request.workload, nonce)
    frame = offer_request(keys, spec, request.workload, nonce, state.network)
    try:
        answer = await node.mesh.request(
            advert.worker, OFFER_PROTOCOL, frame, deadline_s=OFFER_DEADLINE_S, max_reply_bytes=REPLY_BYTES
        )
    except (MeshError, trio.TooSlowError) as error:
        return None, str(error)
    limit = request.max_price_planck_per_hour
    return check_offer(answer, asked, advert.worker, limit, node.clock.now(), state.network)


async def _take(node: Node, offer: Verified[Offer], request: PlaceOrder, spec: OrderSpec) -> PlacedOrder:
    account = node.chain.state.accounts.get(node.wallet.public_key, AccountState())
    call = order_call(offer, spec, min(request.points_planck, account.points_planck))
    if call.escrow_planck > account.balance_planck:
        total = total_planck(offer.message.price_planck_per_hour, request.duration_s)
        raise OrderRefused(
            f"the order costs {planck_to_kai(total)} KAI, the balance is {planck_to_kai(account.balance_planck)} KAI",
            hint="shorten it, pay with points (--points), or send KAI to this wallet",
        )
    await node.effects.perform(node.lease_client.prepare(offer, spec, request.workload), node.clock.now())
    result = await node.call(call)
    if result.reason:
        raise OrderRefused(f"the ledger refused the order: {result.reason}", hint="nothing was locked; try again")
    log.info("order %s placed with worker %s", short(result.call_hash), short(offer.message.worker))
    return PlacedOrder(
        order_id=result.call_hash,
        worker=offer.message.worker,
        price_planck_per_hour=offer.message.price_planck_per_hour,
        escrow_planck=call.escrow_planck,
        points_planck=call.points_planck,
    )
