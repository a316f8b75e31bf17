"""Orders: against a worker that says whatever a test wants, on a real mesh and a real ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import OrderRefused
from kaisar_p2p.mesh import Mesh, MeshStream
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import open_signed, seal
from node import ordering
from node.config import Config
from node.index import Index
from node.node import Node
from node.ordering import PlacedOrder, PlaceOrder
from node.store import NodeStore
from protocols.adverts import CPU_CLASS, Spec, WorkerAdvert
from protocols.committees import check_committee
from protocols.digests import spec_hash
from protocols.interpreter import calls
from protocols.interpreter.state import ACTIVE
from protocols.lease_client import LeaseClientMachine, OrderRecord
from protocols.orders import BUSY, OFFER_PROTOCOL, Offer, OfferRequest, Refusal, Workload
from protocols.params import KAI
from protocols.popw import PASS
from protocols.quorum import QuorumCertificate, VerdictCore

SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")
WANTED = Spec(CPU_CLASS, 1, 512, 100, 0, 0, "")
WORKLOAD = Workload("", ("sleep", "60"), (), ())
PRICE = 36 * KAI
REQUEST = PlaceOrder(WANTED, WORKLOAD, 600, PRICE)
Handler = Callable[[MeshStream], Awaitable[None]]
PEOPLE = {"client": 1, "provider": 2, "checker": 3}


@dataclass
class Market:
    """A client's node, and one worker that is certified on the ledger."""

    node: Node
    worker: Mesh
    keys: KeyPair
    network: bytes

    def answer_with(self, handler: Handler) -> None:
        self.worker.serve(OFFER_PROTOCOL, handler, max_frame_bytes=1 << 17, rate_per_s=1000.0)

    def offer(self, request: OfferRequest, **changes: Any) -> Offer:
        valid_until_ms = int(self.node.clock.now() * 1000) + 10_000
        digest = spec_hash(request.spec, self.network)
        offer = Offer(self.keys.public_key, request.client_key, digest, PRICE, valid_until_ms, request.nonce)
        return replace(offer, **changes)

    async def request_on(self, stream: MeshStream) -> OfferRequest:
        return open_signed(OfferRequest, await stream.receive_frame(), self.network).message

    def advertise(self, **changes: Any) -> None:
        advert = WorkerAdvert(
            self.keys.public_key, bytes(32), int(self.node.clock.now() * 1000), self.worker.addrs, SPEC, SPEC, PRICE, 0,
            0, "process",
        )  # fmt: skip
        self.node.index.adverts[self.keys.public_key] = replace(advert, **changes)

    async def refused(self, request: PlaceOrder = REQUEST) -> OrderRefused:
        """The refusal; nothing was signed for it, and nothing locked."""
        ledger, wallet = self.node.chain.ledger, self.node.wallet
        before = self.node.chain.state.accounts[wallet.public_key], await ledger.next_nonce(wallet.public_key)  # type: ignore[attr-defined]
        with pytest.raises(OrderRefused) as caught:
            await self.node.place_order(request)
        after = self.node.chain.state.accounts[wallet.public_key], await ledger.next_nonce(wallet.public_key)  # type: ignore[attr-defined]
        assert before == after
        assert not self.node.chain.state.orders
        assert caught.value.hint
        return caught.value


async def _certify(follower: Any, wallets: dict[str, Any], worker: KeyPair, checker: KeyPair) -> None:
    """Make the worker active, as a network with one checker would."""
    chain = follower.chain
    network, params = chain.state.network, chain.state.params

    async def call(name: str, body: Any) -> None:
        receipt = await chain.ledger.submit(calls.payload_of(body), wallets[name])
        assert await chain.outcome(receipt, 10.0) == ""

    def bind(name: str, keys: KeyPair, roles: int) -> calls.MachineBind:
        body = calls.bind_body(wallets[name].public_key, roles)
        return calls.MachineBind(keys.public_key, roles, keys.sign(calls.BIND_DOMAIN, network, body))

    await call("checker", calls.LicenceBuy(1, bytes(32)))
    await call("checker", calls.StakeBond(200 * KAI))
    await call("checker", bind("checker", checker, calls.CHECKER))
    await call("provider", bind("provider", worker, calls.PROVIDER))
    await call("provider", calls.WorkerRegister(worker.public_key, SPEC, PRICE))
    committee, slot = None, 0
    registered = chain.state.workers[worker.public_key].registered_block
    while committee is None or slot <= params.slot_of(registered):
        await chain.advanced()
        slot = chain.state.slot
        committee = check_committee(chain.state, slot, worker.public_key)
    core = VerdictCore(params.epoch_of_slot(slot), slot, worker.public_key, bytes(32), PASS)
    signature = checker.sign(core.DOMAIN, network, encode(core))
    await call("provider", calls.WorkerActivate(QuorumCertificate(core, 1, (signature,))))
    assert chain.state.workers[worker.public_key].status == ACTIVE


@pytest.fixture
async def market(
    lab: Any, make_net: Any, make_wallet: Any, make_keys: Any, make_effects: Any, follow: Any, tmp_path: Path
) -> AsyncIterator[Market]:
    wallets = {name: make_wallet(number) for name, number in PEOPLE.items()}
    client, worker, checker = (make_keys(10 + number) for number in PEOPLE.values())
    net = make_net({wallet.public_key: 1_000 * KAI for wallet in wallets.values()}, slot_blocks=20)
    follower = await follow(net)
    with trio.fail_after(30):
        await _certify(follower, wallets, worker, checker)
    meshes = [await lab.mesh(bytes([10 + PEOPLE[name]]) * 32) for name in ("client", "provider")]
    meshes[0].add_addresses(worker.public_key, meshes[1].addrs)
    store = NodeStore(tmp_path / "node.sqlite")
    chain, machine_key = follower.chain, SimpleNamespace(public_key=client.public_key, key_pair=client)
    clock = chain._clock
    effects = make_effects(mesh=meshes[0], store=store, inbox=follower.inbox, clock=clock)
    node = Node(
        config=Config(tmp_path), roles=("client",), machine_key=machine_key, wallet=wallets["client"], chain=chain,
        mesh=meshes[0], store=store, index=Index(), inbox=follower.inbox, clock=clock, effects=effects, tunnels=None,
        runtime=None,
        lease_client=LeaseClientMachine(client, net.network), started_at=clock.now(),
    )  # type: ignore[arg-type]  # fmt: skip
    body = calls.bind_body(node.wallet.public_key, calls.CLIENT)
    bind = calls.MachineBind(client.public_key, calls.CLIENT, client.sign(calls.BIND_DOMAIN, net.network, body))
    assert (await node.call(bind)).reason == ""
    found = Market(node, meshes[1], worker, net.network)
    found.advertise()
    yield found
    store.close()


async def test_an_order_is_placed_with_a_worker_that_offers(market: Market) -> None:
    async def offer(stream: MeshStream) -> None:
        request = await market.request_on(stream)
        assert request.workload == WORKLOAD
        await stream.send_frame(seal(market.offer(request), market.keys, market.network))

    market.answer_with(offer)
    before = market.node.chain.state.accounts[market.node.wallet.public_key].balance_planck
    with trio.fail_after(20):
        placed = await market.node.place_order(REQUEST)
    assert placed == PlacedOrder(placed.order_id, market.keys.public_key, PRICE, 6 * KAI, 0)
    order = market.node.chain.state.orders[placed.order_id]
    assert (order.worker, order.client_key, order.escrow_planck) == (market.keys.public_key, market.node.key, 6 * KAI)
    assert market.node.chain.state.accounts[market.node.wallet.public_key].balance_planck == before - 6 * KAI
    ((_, record),) = market.node.store.items("order")
    assert decode(OrderRecord, record).workload == (WORKLOAD,)


async def test_no_answer_of_a_worker_locks_anything(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals, garbage, lies and silence, one after the other, from the only worker."""
    monkeypatch.setattr(ordering, "OFFER_DEADLINE_S", 0.5)
    stranger = KeyPair.from_seed(b"\x55" * 32)

    def say(make: Callable[[OfferRequest], bytes]) -> Handler:
        async def handler(stream: MeshStream) -> None:
            await stream.send_frame(make(await market.request_on(stream)))

        return handler

    def lie(keys: KeyPair = market.keys, **changes: Any) -> Handler:
        return say(lambda request: seal(market.offer(request, **changes), keys, market.network))

    async def hang(stream: MeshStream) -> None:
        await trio.sleep_forever()

    async def close(stream: MeshStream) -> None:
        await stream.receive_frame()

    cases = {
        "too many offers": say(lambda _: encode(Refusal(BUSY, ""))),
        "come back on Monday": say(lambda _: encode(Refusal(BUSY, "come back on Monday"))),
        "no reason given": say(lambda _: encode(Refusal(200, ""))),
        "not a signed offer": say(lambda _: b"\xff" * 500),
        "asks ": lie(price_planck_per_hour=PRICE + 1),
        "the offer has expired": lie(valid_until_ms=1),
        "an offer to somebody else": lie(nonce=bytes(32)),
        "an offer for something else": lie(spec_hash=bytes(32)),
        "signed by another worker": lie(stranger),
        "bad signature": say(
            lambda request: seal(market.offer(request), market.keys, bytes(32)),
        ),
        "over the limit": say(lambda _: bytes(100_000)),
        "within 0.5 s": hang,
        "the peer ended the stream early": close,
    }
    for reason, handler in cases.items():
        market.answer_with(handler)
        market.advertise()
        with trio.fail_after(20):
            error = await market.refused()
        assert "no worker made an offer" in error.message
        assert reason in error.message


async def test_nobody_can_serve(market: Market) -> None:
    refused, limit = market.refused, market.node.chain.state.params.max_duration_s
    assert "8" in (await refused(replace(REQUEST, resources=replace(WANTED, cpu_cores=64)))).message
    assert "the cheapest worker asks" in (await refused(replace(REQUEST, max_price_planck_per_hour=1))).message
    assert "out of bounds" in (await refused(replace(REQUEST, duration_s=1))).message
    assert "out of bounds" in (await refused(replace(REQUEST, duration_s=limit + 1))).message
    nothing = replace(WORKLOAD, command=())
    assert "neither an image nor a command" in (await refused(replace(REQUEST, workload=nothing))).message
    market.advertise(free=replace(SPEC, cpu_cores=0))
    assert "busy" in (await refused()).message
    market.advertise(issued_ms=1)
    assert "nobody can serve" in (await refused()).message
    market.node.index.adverts.clear()
    assert "no worker is active" in (await refused()).message


async def test_a_balance_that_is_too_small_locks_nothing(market: Market) -> None:
    async def offer(stream: MeshStream) -> None:
        request = await market.request_on(stream)
        await stream.send_frame(seal(market.offer(request), market.keys, market.network))

    market.answer_with(offer)
    with trio.fail_after(20):
        error = await market.refused(replace(REQUEST, duration_s=30 * 86_400))
    assert "the balance is" in error.message
    assert not list(market.node.store.items("order"))


async def test_a_machine_that_is_not_bound_has_to_wait(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "BINDING_S", 0.1)
    market.node.machine_key = SimpleNamespace(public_key=b"\x66" * 32)  # type: ignore[assignment]
    assert "not bound" in (await market.refused()).message


async def test_an_order_waits_while_the_machine_is_being_bound(market: Market) -> None:
    """As right after the start of a node: the binding is on its way to the ledger."""
    node, keys = market.node, KeyPair.from_seed(b"\x66" * 32)
    node.machine_key = SimpleNamespace(public_key=keys.public_key, key_pair=keys)  # type: ignore[assignment]
    node.index.adverts.clear()
    body = calls.bind_body(node.wallet.public_key, calls.CLIENT)
    bind = calls.MachineBind(
        keys.public_key, calls.CLIENT, keys.sign(calls.BIND_DOMAIN, node.chain.ledger.network, body)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.call, bind)
        with trio.fail_after(20), pytest.raises(OrderRefused, match="no worker is active"):
            await node.place_order(REQUEST)


async def test_a_worker_does_not_order_from_itself(market: Market) -> None:
    market.node.index.adverts[market.node.key] = market.node.index.adverts.pop(market.keys.public_key)
    market.node.index.adverts[market.node.key] = replace(
        market.node.index.adverts[market.node.key], worker=market.node.key
    )
    assert "no worker is active" in (await market.refused()).message


async def test_what_the_ledger_refuses_is_told(market: Market) -> None:
    """A worker that signs an offer and leaves before the order is final."""

    async def offer_and_retire(stream: MeshStream) -> None:
        request = await market.request_on(stream)
        wallet = SimpleNamespace(**vars(provider), public_key=provider.public_key, sign=provider.sign)
        receipt = await market.node.chain.ledger.submit(
            calls.payload_of(calls.WorkerRetire(market.keys.public_key)), wallet
        )
        assert await market.node.chain.outcome(receipt, 10.0) == ""
        await stream.send_frame(seal(market.offer(request), market.keys, market.network))

    provider = type(market.node.wallet)(PEOPLE["provider"])  # type: ignore[call-arg,arg-type]
    market.answer_with(offer_and_retire)
    with trio.fail_after(20), pytest.raises(OrderRefused, match="the ledger refused the order"):
        await market.node.place_order(REQUEST)
    assert not market.node.chain.state.orders
