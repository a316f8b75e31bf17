"""Asking for an offer and giving one, on `/kaisar/offer/1` (`protocols/README.md`, "Orders").

The client's side is functions for the node that places an order; the worker's side is a machine that holds what it
offered for some seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Verified, open_signed, seal
from kaisar_p2p.wire.judge import judge_signature, peek, peek_signed
from kaisar_p2p.wire.money import planck_to_kai
from protocols.actions import Action, BlockApplied, Event, Incoming, Reply
from protocols.adverts import Spec, fits
from protocols.digests import offer_hash, spec_hash, workload_hash
from protocols.interpreter.calls import OrderPlace
from protocols.interpreter.state import ACTIVE, ORDER_OPEN, OrderState, State
from protocols.orders import (
    BAD_DURATION,
    BAD_REQUEST,
    BAD_WORKLOAD,
    BUSY,
    NO_CAPACITY,
    NO_RUNTIME,
    NOT_ACTIVE,
    OFFER_PROTOCOL,
    REFUSALS,
    WORKLOAD_BYTES_MAX,
    Offer,
    OfferRequest,
    OrderSpec,
    Refusal,
    Workload,
    total_planck,
    workload_fault,
)
from protocols.params import Params

REQUEST_BYTES_MAX = WORKLOAD_BYTES_MAX + 1_024
OFFER_BYTES_MAX = 1_024
MAX_HOLDS = 64
MAX_HOLDS_OF_A_PEER = 4
REST_S = 60.0
"""After an offer that an owner did not take, the next ones for it reserve nothing for so long."""
MAX_RESTING = 4_096

# ── the client's side ────────────────────────────────────────────────────────────────────────────────────────────────


def order_spec(resources: Spec, duration_s: int, workload: Workload, network: bytes) -> OrderSpec:
    """What is asked for, with the workload's hash in it."""
    return OrderSpec(resources, duration_s, workload_hash(workload, network))


def offer_request(keys: KeyPair, spec: OrderSpec, workload: Workload, nonce: bytes, network: bytes) -> bytes:
    """The one frame to send on OFFER_PROTOCOL; `nonce` is 32 fresh random bytes of this order."""
    return seal(OfferRequest(keys.public_key, spec, workload, nonce), keys, network)


def check_offer(
    payload: bytes, request: OfferRequest, worker: bytes, max_price_planck_per_hour: int, now: float, network: bytes
) -> tuple[Verified[Offer] | None, str]:
    """A worker's answer: the offer if it is what was asked for, else None and the reason, for people. Never raises.

    `now` in seconds since the Unix epoch.
    """
    refusal = peek(Refusal, payload, OFFER_BYTES_MAX)
    if refusal is not None:
        return None, f"refused: {refusal.text or REFUSALS.get(refusal.code, 'no reason given')}"
    try:
        verified = open_signed(Offer, payload[: OFFER_BYTES_MAX + 1], network)
    except (DecodeError, SignatureError) as error:
        return None, f"not a signed offer: {error.message}"
    offer = verified.message
    if verified.signer != worker or offer.worker != worker:
        return None, "signed by another worker"
    if (offer.client_key, offer.nonce) != (request.client_key, request.nonce):
        return None, "an offer to somebody else"
    if offer.spec_hash != spec_hash(request.spec, network):
        return None, "an offer for something else"
    if offer.price_planck_per_hour > max_price_planck_per_hour:
        asked, most = planck_to_kai(offer.price_planck_per_hour), planck_to_kai(max_price_planck_per_hour)
        return None, f"asks {asked} KAI per hour, more than {most}"
    if offer.valid_until_ms <= now * 1000:
        return None, "the offer has expired"
    return verified, ""


def order_call(offer: Verified[Offer], spec: OrderSpec, points_planck: int = 0) -> OrderPlace:
    """The call that takes an offer; what is not paid in points is locked in KAI."""
    total = total_planck(offer.message.price_planck_per_hour, spec.duration_s)
    points = min(max(0, points_planck), total)
    return OrderPlace(spec, offer.envelope, total - points, points)


# ── the worker's side ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Hold:
    """An offer that a client may still take; `until` in seconds, a little longer than the offer itself is valid.

    Only a `firm` one reserves resources: asking is free, so who cannot pay, or asked before and did not take it, gets
    an offer like anybody but keeps nobody else from taking theirs. The ledger then decides who was first.
    """

    request: OfferRequest
    offer: Offer
    envelope: bytes
    until: float
    owner: bytes = b""
    firm: bool = True


class Holds:
    """What a worker has offered: shared by the machine that offers and the one that runs leases.

    Workloads stay in memory until their order is on the ledger and paid, so that nobody can fill the disk by asking.
    """

    def __init__(self) -> None:
        self._holds: dict[bytes, Hold] = {}
        self._resting: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def has_room(self) -> bool:
        """Whether another hold fits, if need be in the place of one that reserves nothing."""
        return len(self._holds) < MAX_HOLDS or any(not hold.firm for hold in self._holds.values())

    def add(self, hold: Hold, network: bytes) -> None:
        """Keep what was offered; when there are too many, the oldest that reserves nothing gives way."""
        if len(self._holds) >= MAX_HOLDS:
            weak = next((key for key, each in self._holds.items() if not each.firm), None)
            if weak is not None:
                del self._holds[weak]
        self._holds[offer_hash(hold.offer, network)] = hold

    def reserves(self, owner: bytes, price_planck: int, state: State, now: float) -> bool:
        """Whether an offer of this price would reserve: the owner can pay for all of them, and took the last one."""
        account = state.accounts.get(owner)
        promised = sum(_price(hold) for hold in self._holds.values() if hold.owner == owner and hold.firm)
        able = account is not None and account.balance_planck + account.points_planck >= promised + price_planck
        return able and self._resting.get(owner, 0.0) <= now

    def find(self, request: OfferRequest) -> Hold | None:
        """The offer that this very request got already."""
        return next((hold for hold in self._holds.values() if hold.request == request), None)

    def of_peer(self, client_key: bytes) -> int:
        """How many offers a client holds."""
        return sum(hold.request.client_key == client_key for hold in self._holds.values())

    def take(self, offer: bytes) -> Workload | None:
        """The workload of an offer (its hash) that was taken; the hold is over."""
        hold = self._holds.pop(offer, None)
        return hold.request.workload if hold else None

    def expire(self, now: float) -> None:
        """Drop what nobody took."""
        for key in [key for key, hold in self._holds.items() if hold.until <= now]:
            hold = self._holds.pop(key)
            if hold.firm:
                self._resting.pop(hold.owner, None)
                self._resting[hold.owner] = now + REST_S
        while self._resting and (len(self._resting) > MAX_RESTING or next(iter(self._resting.values())) <= now):
            del self._resting[next(iter(self._resting))]

    def free(self, state: State, worker: bytes) -> Spec | None:
        """What open orders and holds leave of the worker's registered resources; None if it is not registered."""
        registered = state.workers.get(worker)
        if registered is None:
            return None
        taken = [order.resources for order in _running(state, worker)]
        taken += [
            hold.request.spec.resources
            for hold in self._holds.values()
            if hold.firm and worker + hold.offer.nonce not in state.used_offers
        ]
        return _without(registered.spec, taken)


def _running(state: State, worker: bytes) -> list[OrderState]:
    """As the ledger counts: an order that is cancelled or whose time is over holds no resources, settled or not."""
    over_ms = state.time_ms - state.params.deploy_timeout_ms
    orders = (state.orders[each] for each in state.open_orders.get(worker, ()))
    return [
        order for order in orders if order.status == ORDER_OPEN and over_ms < order.placed_ms + 1000 * order.duration_s
    ]


def _price(hold: Hold) -> int:
    return total_planck(hold.offer.price_planck_per_hour, hold.request.spec.duration_s)


def _without(spec: Spec, taken: list[Spec]) -> Spec:
    return replace(
        spec,
        cpu_cores=max(0, spec.cpu_cores - sum(each.cpu_cores for each in taken)),
        memory_mb=max(0, spec.memory_mb - sum(each.memory_mb for each in taken)),
        disk_mb=max(0, spec.disk_mb - sum(each.disk_mb for each in taken)),
        gpus=max(0, spec.gpus - sum(each.gpus for each in taken)),
    )


class OfferMachine:
    """Answers offer requests of a worker.

    `runtime` is "docker" or "process"; `max_leases` is what the owner allows at a time, within the network's bound.
    """

    deadline: float | None = None

    def __init__(self, keys: KeyPair, holds: Holds, *, runtime: str, max_leases: int) -> None:
        self._keys = keys
        self._holds = holds
        self._runtime = runtime
        self._max_leases = max_leases
        self._state: State | None = None

    def step(self, event: Event, now: float) -> list[Action]:
        """Blocks bring the state, requests are answered at once."""
        match event:
            case BlockApplied():
                self._state = event.state
                self._holds.expire(now)
            case Incoming(protocol=protocol) if protocol == OFFER_PROTOCOL:
                return [self._answer(event, now)]
            case _:
                pass
        return []

    def _answer(self, call: Incoming, now: float) -> Reply:
        self._holds.expire(now)
        state = self._state
        if state is None:
            return _refuse(call, NOT_ACTIVE)
        seen = peek_signed(OfferRequest, call.payload, REQUEST_BYTES_MAX)
        # [REJECT] The peer asks for itself.
        if seen is None or seen[0] != call.peer or seen[1].client_key != call.peer:
            return _refuse(call, BAD_REQUEST)
        held = self._holds.find(seen[1])
        if held is not None:
            return Reply(call.call_id, held.envelope)
        refused = self._why_not(seen[1], state)
        if refused is not None:
            return _refuse(call, *refused)
        # [REJECT] The signature is right: last, because it costs most.
        if judge_signature(OfferRequest, call.payload, state.network)[2] is None:
            return _refuse(call, BAD_REQUEST)
        return self._offer(call, seen[1], state, now)

    def _why_not(self, request: OfferRequest, state: State) -> tuple[int, str] | None:
        spec, params, key = request.spec, state.params, self._keys.public_key
        worker = state.workers.get(key)
        if worker is None or worker.status != ACTIVE:
            return NOT_ACTIVE, ""
        if not params.min_duration_s <= spec.duration_s <= params.max_duration_s:
            return BAD_DURATION, f"between {params.min_duration_s} and {params.max_duration_s} seconds"
        if spec.workload_hash != workload_hash(request.workload, state.network):
            return BAD_WORKLOAD, "not the workload of that hash"
        fault = workload_fault(request.workload)
        if fault:
            return BAD_WORKLOAD, fault
        if bool(request.workload.image) != (self._runtime == "docker"):
            needs = "images" if self._runtime == "docker" else "commands without an image"
            return NO_RUNTIME, f"this worker runs {needs}"
        if state.machines.get(request.client_key) is None or key + request.nonce in state.used_offers:
            return BAD_REQUEST, "the client's machine is not bound, or the nonce was used"
        return self._no_room(spec, state)

    def _no_room(self, spec: OrderSpec, state: State) -> tuple[int, str] | None:
        key, asked = self._keys.public_key, spec.resources
        free = self._holds.free(state, key)
        if free is None or not asked.cpu_cores or not asked.memory_mb or not fits(asked, free):
            return NO_CAPACITY, ""
        unsettled = len(state.open_orders.get(key, ()))
        full = len(_running(state, key)) >= self._max_leases or unsettled >= state.params.max_open_orders
        if full or not self._holds.has_room:
            return BUSY, ""
        return None

    def _offer(self, call: Incoming, request: OfferRequest, state: State, now: float) -> Reply:
        if self._holds.of_peer(call.peer) >= MAX_HOLDS_OF_A_PEER:
            return _refuse(call, BUSY)
        key = self._keys.public_key
        offer = Offer(
            worker=key,
            client_key=request.client_key,
            spec_hash=spec_hash(request.spec, state.network),
            price_planck_per_hour=state.workers[key].price_planck_per_hour,
            valid_until_ms=int(now * 1000) + state.params.offer_hold_ms,
            nonce=request.nonce,
        )
        envelope = seal(offer, self._keys, state.network)
        owner = state.machines[request.client_key].owner
        price = total_planck(offer.price_planck_per_hour, request.spec.duration_s)
        firm = self._holds.reserves(owner, price, state, now)
        self._holds.add(Hold(request, offer, envelope, now + hold_s(state.params), owner, firm), state.network)
        return Reply(call.call_id, envelope)


def hold_s(params: Params) -> float:
    """How long resources stay reserved: as long as the offer may be taken, and until such a block is final here."""
    return (params.offer_hold_ms + (params.finality_lag_blocks + 2) * params.block_ms) / 1000


def _refuse(call: Incoming, code: int, text: str = "") -> Reply:
    detail = f"{REFUSALS[code]}: {text}" if text else REFUSALS[code]
    return Reply(call.call_id, encode(Refusal(code, detail[:256])))
