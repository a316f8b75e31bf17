"""Choosing workers, asking for offers, giving them: reproducible draws, clear reasons, bounded holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import open_signed, seal
from kaisar_p2p.wire.money import planck_to_kai
from protocols.actions import BlockApplied, Incoming, Reply
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec, WorkerAdvert
from protocols.digests import spec_hash
from protocols.interpreter.state import (
    ACTIVE,
    ORDER_CANCELLED,
    ORDER_OPEN,
    REGISTERED,
    AccountState,
    MachineState,
    OrderState,
    State,
    WorkerState,
)
from protocols.offers import (
    MAX_HOLDS,
    MAX_HOLDS_OF_A_PEER,
    Hold,
    Holds,
    OfferMachine,
    check_offer,
    hold_s,
    offer_request,
    order_call,
    order_spec,
)
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
    Offer,
    OfferRequest,
    Refusal,
    Variable,
    Workload,
    total_planck,
    workload_fault,
)
from protocols.params import DEMO
from protocols.selection import choose, match, why_nobody

NETWORK = sha256(b"orders").digest()
BEACON = sha256(b"beacon").digest()
NOW = 1_790_000_000.0
OWNER = bytes(32)
SPEC = Spec(CPU_CLASS, 4, 4096, 4096, 0, 0, "")
WANTED = Spec(0, 1, 512, 512, 0, 0, "")
WORKLOAD = Workload("", ("serve",), (Variable("A", "b"),), (8080,))
CHEAP = 10**18


def keys_of(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(name.encode()).digest())


WORKER, CLIENT = keys_of("worker"), keys_of("client")


def state_of(workers: dict[bytes, WorkerState] | None = None, **changes: Any) -> State:
    known = workers or {WORKER.public_key: WorkerState(OWNER, SPEC, CHEAP, 1, ACTIVE, 0)}
    machines = Map({key: MachineState(OWNER, 7, 0) for key in (*known, CLIENT.public_key)})
    accounts = Map({OWNER: AccountState(balance_planck=10**24)})
    state = State(
        NETWORK, DEMO, number=9, time_ms=int(NOW * 1000), workers=Map(known), machines=machines, accounts=accounts
    )
    return replace(state, **changes)


def advert(number: int, *, price: int = CHEAP, spec: Spec = SPEC, free: Spec | None = None) -> WorkerAdvert:
    key = sha256(number.to_bytes(4, "big")).digest()
    return WorkerAdvert(key, OWNER, int(NOW * 1000), (), spec, free or spec, price, 0, 0, "process")


def active(*adverts: WorkerAdvert) -> State:
    return state_of({each.worker: WorkerState(OWNER, each.spec, 1, 1, ACTIVE, 0) for each in adverts})


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_choice_is_the_same_for_everybody_and_another_for_another_order() -> None:
    adverts = [advert(number) for number in range(8)]
    state = active(*adverts)
    chosen = choose(adverts, WANTED, CHEAP, b"n" * 32, BEACON, state)
    assert choose(list(reversed(adverts)), WANTED, CHEAP, b"n" * 32, BEACON, state) == chosen
    assert sorted(each.worker for each in chosen) == sorted(each.worker for each in adverts)
    orders = {
        tuple(each.worker for each in choose(adverts, WANTED, CHEAP, bytes([n]) * 32, BEACON, state)) for n in range(8)
    }
    assert len(orders) > 1
    assert choose(adverts, WANTED, CHEAP, b"n" * 32, bytes(32), state) != chosen


def test_score_price_and_latency_shift_the_odds_and_shut_nobody_out() -> None:
    adverts = [advert(number) for number in range(2)]
    good, other = (each.worker for each in adverts)
    state = active(*adverts)

    def firsts(changed: list[WorkerAdvert], **hints: Any) -> Counter[bytes]:
        draws = (choose(changed, WANTED, 10 * CHEAP, n.to_bytes(32, "big"), BEACON, state, **hints) for n in range(300))
        return Counter(chosen[0].worker for chosen in draws)

    even = {good: 500, other: 500}
    fair = firsts(adverts, scores_permille=even)
    assert 100 < fair[good] < 200
    assert 250 < firsts(adverts, scores_permille={good: 1000, other: 100})[good] < 300
    dear = [adverts[0], replace(adverts[1], price_planck_per_hour=9 * CHEAP)]
    assert 240 < firsts(dear, scores_permille=even)[good] < 300
    assert 200 < firsts(adverts, scores_permille=even, latencies_ms={good: 0, other: 300})[good] < 300


def test_only_active_workers_that_fit_and_are_not_too_dear_are_chosen() -> None:
    fits, small, dear, busy, unknown = (
        advert(0),
        advert(1, spec=replace(SPEC, memory_mb=256)),
        advert(2, price=CHEAP + 1),
        advert(3, free=replace(SPEC, cpu_cores=0)),
        advert(4),
    )
    state = active(fits, small, dear, busy)
    assert choose([fits, small, dear, busy, unknown], WANTED, CHEAP, bytes(32), BEACON, state) == [fits]
    assert not match(WANTED, busy)
    assert choose([], WANTED, CHEAP, bytes(32), BEACON, state) == []


@given(st.lists(st.tuples(st.integers(0, 2**70), st.integers(0, 2000), st.integers(-5, 10**6)), max_size=12))
def test_any_prices_scores_and_latencies_give_a_permutation(figures: list[tuple[int, int, int]]) -> None:
    adverts = [advert(number, price=price) for number, (price, _, _) in enumerate(figures)]
    scores = {each.worker: score for each, (_, score, _) in zip(adverts, figures, strict=True)}
    latencies = {each.worker: latency for each, (_, _, latency) in zip(adverts, figures, strict=True)}
    state = active(*adverts) if adverts else state_of()
    chosen = choose(adverts, WANTED, 2**70, bytes(32), BEACON, state, scores_permille=scores, latencies_ms=latencies)
    assert sorted(each.worker for each in chosen) == sorted(each.worker for each in adverts)


GPU_SPEC = Spec(GPU_CLASS, 8, 8192, 8192, 2, 24_000, "RTX 4090")


@pytest.mark.parametrize(
    ("adverts", "wanted", "price", "reason"),
    [
        ([], WANTED, CHEAP, "no worker is active"),
        ([advert(9)], WANTED, CHEAP, "certified"),
        ([advert(0)], replace(WANTED, gpus=1), CHEAP, "no worker has 1 GPUs; the largest has 0"),
        ([advert(0)], replace(WANTED, memory_mb=9999), CHEAP, "MB of memory; the largest has 4096"),
        ([advert(0, spec=GPU_SPEC)], replace(WANTED, gpus=1, gpu_model="H200"), CHEAP, "GPU model H200"),
        (
            [advert(0, spec=GPU_SPEC), advert(1, spec=replace(SPEC, memory_mb=65536))],
            replace(WANTED, gpus=1, memory_mb=60000),
            CHEAP,
            "no single worker",
        ),
        ([advert(0, free=replace(SPEC, cpu_cores=0))], WANTED, CHEAP, "all 1 workers that are large enough are busy"),
        (
            [advert(0, price=CHEAP + 1)],
            WANTED,
            CHEAP,
            f"asks {planck_to_kai(CHEAP + 1)} KAI per hour, more than {planck_to_kai(CHEAP)}",
        ),
        ([advert(0)], WANTED, CHEAP, ""),
    ],
)
def test_why_nobody_can_serve(adverts: list[WorkerAdvert], wanted: Spec, price: int, reason: str) -> None:
    state = active(advert(0), advert(1))
    told = why_nobody(adverts, wanted, price, state)
    assert reason in told
    assert bool(told) == (not choose(adverts, wanted, price, bytes(32), BEACON, state))


# ── workloads ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"command": ()}, "neither an image nor a command"),
        ({"command": ("",)}, "neither an image nor a command"),
        ({"command": (), "image": "nginx@sha256:" + "0" * 64}, ""),
        ({"image": "-v /:/host"}, "not the name of an image"),
        ({"command": ("a", "b\0c")}, "zero byte"),
        ({"environment": (Variable("A", "x\0"),)}, "zero byte"),
        ({"environment": (Variable("A=B", ""),)}, "not a name"),
        ({"environment": (Variable("A", ""), Variable("A", ""))}, "twice"),
        ({"ports": (0,)}, "port 0"),
        ({"ports": (80, 80)}, "port twice"),
        ({"ports": ()}, ""),
        ({"command": ("x" * 4096,) * 64}, "larger than"),
    ],
)
def test_what_a_workload_must_look_like(changes: dict[str, Any], fault: str) -> None:
    told = workload_fault(replace(WORKLOAD, **changes))
    assert fault in told
    assert bool(told) == bool(fault)


@given(st.integers(0, 2**90), st.integers(0, 90 * 86400))
def test_the_total_is_rounded_up_to_the_planck(price: int, duration_s: int) -> None:
    assert 0 <= total_planck(price, duration_s) * 3600 - price * duration_s < 3600


# ── offers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Desk:
    """An offer machine with its holds, and a client that asks."""

    def __init__(self, state: State | None = None, *, runtime: str = "process", max_leases: int = 8) -> None:
        self.state = state or state_of()
        self.holds = Holds()
        self.machine = OfferMachine(WORKER, self.holds, runtime=runtime, max_leases=max_leases)
        self.machine.step(BlockApplied(self.state, ()), NOW)
        self.number = 0

    def request(self, **changes: Any) -> OfferRequest:
        self.number += 1
        workload = changes.pop("workload", WORKLOAD)
        spec = order_spec(
            replace(WANTED, **changes.pop("resources", {})), changes.pop("duration_s", 60), workload, NETWORK
        )
        nonce = changes.pop("nonce", self.number.to_bytes(32, "big"))
        return OfferRequest(changes.pop("client_key", CLIENT.public_key), changes.pop("spec", spec), workload, nonce)

    def ask(self, request: OfferRequest, *, keys: KeyPair = CLIENT, peer: bytes = b"", now: float = NOW) -> bytes:
        return self.send(seal(request, keys, NETWORK), peer=peer or keys.public_key, now=now)

    def send(self, payload: bytes, *, peer: bytes = CLIENT.public_key, now: float = NOW) -> bytes:
        actions = self.machine.step(Incoming(7, peer, OFFER_PROTOCOL, payload, now), now)
        assert len(actions) == 1
        assert isinstance(actions[0], Reply)
        assert actions[0].call_id == 7
        return actions[0].payload


def code_of(payload: bytes) -> int:
    refusal = decode(Refusal, payload)
    assert REFUSALS[refusal.code] in refusal.text
    return refusal.code


def test_an_offer_is_what_was_asked_for_at_the_workers_price() -> None:
    desk = Desk()
    request = desk.request()
    payload = desk.send(offer_request(CLIENT, request.spec, WORKLOAD, request.nonce, NETWORK))
    offer, why = check_offer(payload, request, WORKER.public_key, CHEAP, NOW, NETWORK)
    assert why == ""
    assert offer is not None
    assert offer.message.price_planck_per_hour == CHEAP
    assert offer.message.valid_until_ms == int(NOW * 1000) + DEMO.offer_hold_ms
    assert len(payload) <= 1024
    call = order_call(offer, request.spec, points_planck=5)
    assert call.escrow_planck + call.points_planck == total_planck(CHEAP, 60)
    assert call.points_planck == 5
    assert order_call(offer, request.spec, points_planck=10**30).escrow_planck == 0


def test_the_same_request_gets_the_same_offer_and_one_hold() -> None:
    desk = Desk()
    request = desk.request()
    assert desk.ask(request) == desk.ask(request, now=NOW + 1)
    assert len(desk.holds) == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"duration_s": 59}, BAD_DURATION),
        ({"duration_s": DEMO.max_duration_s + 1}, BAD_DURATION),
        ({"workload": replace(WORKLOAD, command=())}, BAD_WORKLOAD),
        ({"workload": replace(WORKLOAD, image="nginx")}, NO_RUNTIME),
        ({"resources": {"cpu_cores": 5}}, NO_CAPACITY),
        ({"resources": {"cpu_cores": 0}}, NO_CAPACITY),
        ({"resources": {"memory_mb": 0}}, NO_CAPACITY),
        ({"resources": {"gpus": 1}}, NO_CAPACITY),
        ({"client_key": keys_of("another").public_key}, BAD_REQUEST),
    ],
)
def test_a_refusal_has_a_code_and_words(changes: dict[str, Any], code: int) -> None:
    assert code_of(Desk().ask(Desk().request(**changes))) == code


def test_requests_that_are_not_the_clients_own_are_refused() -> None:
    desk = Desk()
    request = desk.request()
    stranger = keys_of("stranger")
    assert code_of(desk.ask(request, peer=stranger.public_key)) == BAD_REQUEST
    assert code_of(desk.ask(request, keys=stranger)) == BAD_REQUEST
    assert code_of(desk.ask(replace(request, client_key=stranger.public_key), keys=stranger)) == BAD_REQUEST
    sealed = bytearray(seal(request, CLIENT, NETWORK))
    sealed[-1] ^= 1
    assert code_of(desk.send(bytes(sealed))) == BAD_REQUEST
    assert code_of(desk.send(seal(request, CLIENT, bytes(32)))) == BAD_REQUEST
    other = replace(request, workload=replace(WORKLOAD, command=("other",)))
    assert code_of(desk.ask(other)) == BAD_WORKLOAD
    assert not len(desk.holds)


def test_a_worker_that_is_not_certified_offers_nothing() -> None:
    for status in (REGISTERED, 3):
        state = state_of({WORKER.public_key: WorkerState(OWNER, SPEC, CHEAP, 1, status, 0)})
        desk = Desk(state)
        assert code_of(desk.ask(desk.request())) == NOT_ACTIVE
    fresh = OfferMachine(WORKER, Holds(), runtime="process", max_leases=8)
    reply = fresh.step(Incoming(1, CLIENT.public_key, OFFER_PROTOCOL, b"", NOW), NOW)[0]
    assert isinstance(reply, Reply)
    assert code_of(reply.payload) == NOT_ACTIVE


def test_docker_workers_want_images() -> None:
    desk = Desk(runtime="docker")
    assert code_of(desk.ask(desk.request())) == NO_RUNTIME
    assert decode_offer(desk.ask(desk.request(workload=replace(WORKLOAD, image="nginx"))))


def decode_offer(payload: bytes) -> Offer:
    return open_signed(Offer, payload, NETWORK).message


def test_holds_take_capacity_until_they_expire() -> None:
    desk = Desk()
    two = {"resources": {"cpu_cores": 2}}
    decode_offer(desk.ask(desk.request(**two)))
    decode_offer(desk.ask(desk.request(**two)))
    assert code_of(desk.ask(desk.request(resources={"cpu_cores": 1}))) == NO_CAPACITY
    later = NOW + hold_s(DEMO)
    assert hold_s(DEMO) > DEMO.offer_hold_ms / 1000
    decode_offer(desk.ask(desk.request(**two), now=later))
    assert len(desk.holds) == 1


def test_holds_are_bounded_for_each_peer_and_overall() -> None:
    large = replace(SPEC, cpu_cores=1000, memory_mb=10**6, disk_mb=10**6)
    clients = [keys_of(f"client {number}") for number in range(MAX_HOLDS // MAX_HOLDS_OF_A_PEER + 1)]
    state = state_of({WORKER.public_key: WorkerState(OWNER, large, CHEAP, 1, ACTIVE, 0)})
    machines = Map({each.public_key: MachineState(OWNER, 4, 0) for each in clients})
    desk = Desk(replace(state, machines=machines))
    for client in clients[:-1]:
        for _ in range(MAX_HOLDS_OF_A_PEER):
            decode_offer(desk.ask(desk.request(client_key=client.public_key), keys=client))
        assert code_of(desk.ask(desk.request(client_key=client.public_key), keys=client)) == BUSY
    assert len(desk.holds) == MAX_HOLDS
    assert code_of(desk.ask(desk.request(client_key=clients[-1].public_key), keys=clients[-1])) == BUSY


def test_asking_for_nothing_keeps_nobody_out() -> None:
    """All of the worker is asked for again and again, by one owner with many keys: others get their offers."""
    whole = {"resources": {"cpu_cores": SPEC.cpu_cores}}
    flood, other = [keys_of(f"flood {number}") for number in range(32)], keys_of("other")
    rich, poor, honest = (sha256(name).digest() for name in (b"rich", b"poor", b"honest"))
    owners = [*(rich, poor) * 16, honest]
    machines = {each.public_key: MachineState(owner, 4, 0) for each, owner in zip([*flood, other], owners, strict=True)}
    accounts = Map({rich: AccountState(10**24), poor: AccountState(0), honest: AccountState(10**24)})
    desk = Desk(replace(state_of(), machines=Map(machines), accounts=accounts))
    asked = {"client_key": other.public_key}
    for second in range(0, 40, 10):
        for client in flood:
            for _ in range(MAX_HOLDS_OF_A_PEER + 1):
                desk.ask(desk.request(client_key=client.public_key, **whole), keys=client, now=NOW + second)
        assert len(desk.holds) <= MAX_HOLDS
        if second:  # the first offer to the rich one was firm: a hold is a hold
            decode_offer(desk.ask(desk.request(resources={"cpu_cores": 1}, **asked), keys=other, now=NOW + second))


def with_order(state: State, request: OfferRequest, offer: Offer) -> State:
    order = OrderState(
        OWNER, CLIENT.public_key, WORKER.public_key, OWNER, offer.spec_hash, request.spec.resources, bytes(32),
        CHEAP, 60, 0, 0, 0, 9, int(NOW * 1000), (), 0,
    )  # fmt: skip
    return replace(
        state,
        orders=Map({b"o" * 32: order}),
        open_orders=Map({WORKER.public_key: (b"o" * 32,)}),
        used_offers=Map({WORKER.public_key + offer.nonce: offer.valid_until_ms}),
    )


@pytest.mark.parametrize(("max_leases", "makes_an_offer"), [(1, False), (2, True)])
def test_the_owner_limits_the_leases_of_its_machine(max_leases: int, makes_an_offer: bool) -> None:
    first = Desk()
    request = first.request()
    state = with_order(first.state, request, decode_offer(first.ask(request)))
    desk = Desk(state, max_leases=max_leases)
    answer = desk.ask(desk.request(nonce=b"n" * 32))
    if makes_an_offer:
        assert decode_offer(answer).nonce == b"n" * 32
    else:
        assert code_of(answer) == BUSY


@pytest.mark.parametrize("changes", [{"status": ORDER_CANCELLED}, {"placed_ms": 0}])
def test_an_order_that_only_awaits_its_settlement_is_no_lease(changes: dict[str, int]) -> None:
    """Placing and cancelling costs a client nothing, so it must not cost the provider its customers."""
    first = Desk()
    request = first.request()
    state = with_order(first.state, request, decode_offer(first.ask(request)))
    over = replace(state.orders[b"o" * 32], **changes)
    desk = Desk(replace(state, orders=Map({b"o" * 32: over}), time_ms=int(NOW * 1000)), max_leases=1)
    assert decode_offer(desk.ask(desk.request(nonce=b"n" * 32))).nonce == b"n" * 32
    full = Desk(replace(state, orders=Map({b"o" * 32: over}), params=replace(state.params, max_open_orders=1)))
    assert code_of(full.ask(full.request(nonce=b"n" * 32))) == BUSY


def test_open_orders_take_capacity_and_a_taken_offer_counts_once() -> None:
    desk = Desk()
    request = desk.request(resources={"cpu_cores": 2})
    offer = decode_offer(desk.ask(request))
    state = with_order(desk.state, request, offer)
    order = state.orders[b"o" * 32]
    desk.machine.step(BlockApplied(state, ()), NOW)
    free = desk.holds.free(state, WORKER.public_key)
    assert free is not None
    assert free.cpu_cores == 2
    assert order.status == ORDER_OPEN
    assert code_of(desk.ask(desk.request(nonce=offer.nonce, duration_s=61))) == BAD_REQUEST
    over = replace(state, time_ms=int(NOW * 1000) + 60_000 + DEMO.deploy_timeout_ms)
    assert desk.holds.free(over, WORKER.public_key) == SPEC
    assert desk.holds.free(over, CLIENT.public_key) is None


def test_a_client_checks_every_part_of_an_offer() -> None:
    request = Desk().request()
    good = Offer(
        WORKER.public_key,
        CLIENT.public_key,
        spec_hash(request.spec, NETWORK),
        CHEAP,
        int(NOW * 1000) + 1,
        request.nonce,
    )

    def why(payload: bytes) -> str:
        offer, reason = check_offer(payload, request, WORKER.public_key, CHEAP, NOW, NETWORK)
        assert (offer is None) == bool(reason)
        return reason

    other = keys_of("other")
    assert why(seal(good, WORKER, NETWORK)) == ""
    assert "another worker" in why(seal(good, other, NETWORK))
    assert "another worker" in why(seal(replace(good, worker=other.public_key), WORKER, NETWORK))
    assert "somebody else" in why(seal(replace(good, client_key=other.public_key), WORKER, NETWORK))
    assert "somebody else" in why(seal(replace(good, nonce=bytes(32)), WORKER, NETWORK))
    assert "something else" in why(seal(replace(good, spec_hash=bytes(32)), WORKER, NETWORK))
    assert "more than" in why(seal(replace(good, price_planck_per_hour=CHEAP + 1), WORKER, NETWORK))
    assert "expired" in why(seal(replace(good, valid_until_ms=int(NOW * 1000)), WORKER, NETWORK))
    assert "not a signed offer" in why(seal(good, WORKER, bytes(32)))
    assert "refused: nope" in why(encode(Refusal(BUSY, "nope")))
    assert REFUSALS[BUSY] in why(encode(Refusal(BUSY, "")))


@given(st.binary(max_size=300))
def test_any_answer_and_any_request_is_judged(data: bytes) -> None:
    desk = Desk()
    assert check_offer(data, desk.request(), WORKER.public_key, CHEAP, NOW, NETWORK)[0] is None
    assert code_of(desk.send(data)) == BAD_REQUEST


@given(st.integers(0, 5000), st.integers(1, 255))
def test_a_changed_byte_of_a_request_is_refused(at: int, change: int) -> None:
    desk = Desk()
    payload = bytearray(seal(desk.request(), CLIENT, NETWORK))
    payload[at % len(payload)] ^= change
    code_of(desk.send(bytes(payload)))
    assert not len(desk.holds)


def test_a_hold_is_taken_once() -> None:
    desk = Desk()
    request = desk.request()
    envelope = desk.ask(request)
    holds = Holds()
    holds.add(Hold(request, decode_offer(envelope), envelope, NOW + 1), NETWORK)
    key = next(iter(holds._holds))
    assert holds.take(key) == WORKLOAD
    assert holds.take(key) is None
