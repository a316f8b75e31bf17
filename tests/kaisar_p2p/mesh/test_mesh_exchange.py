"""Peer exchange and what is built on it, over real meshes in this process."""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio

from kaisar_p2p.errors import PeerUnreachable
from kaisar_p2p.mesh import Mesh, MeshConfig, open_mesh
from kaisar_p2p.mesh.discovery import exchange as peers
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import parse
from kaisar_p2p.mesh.discovery.discovery import Backoff, Discovery, subnet_of
from kaisar_p2p.mesh.discovery.records import RECORD_BYTES, RELAY, AddressRecord, network_id, open_record
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal

NETWORK = network_id("test")


async def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.01)


async def echo(stream: MeshStream) -> None:
    await stream.send_frame(await stream.receive_frame())


def envelope(signer: KeyPair, about: bytes, *addresses: str, network: bytes = NETWORK, **changes: int) -> bytes:
    told = AddressRecord(about, 2**63, addresses, int(time.time()), 3600, 0)
    return seal(replace(told, **changes), signer, network)  # type: ignore[arg-type]


async def connect(*meshes: Mesh, to: Mesh) -> None:
    for mesh in meshes:
        mesh.keep_connected(to.key, to.addrs)
        with trio.fail_after(10):
            await mesh.wait_until(lambda mesh=mesh: mesh.is_connected(to.key))


def ask_with(mesh: Mesh, other: Mesh, *records: bytes) -> None:
    """`other` answers every question with these records besides its own."""
    other._discovery.exchange._choose = lambda _asker, _question: records  # type: ignore[method-assign]


async def asked(mesh: Mesh, other: Mesh) -> list[bytes] | None:
    connection = mesh._network.connection_to(other.key)
    assert connection is not None
    return await mesh._discovery.exchange.ask(connection)


async def test_nobody_can_send_dialers_of_another_key_elsewhere(lab) -> None:
    victim, liar, asker = [await lab.mesh(target_peers=0) for _ in range(3)]
    await connect(asker, to=liar)
    mallory = KeyPair.from_seed(os.urandom(32))
    trap = "/ip4/127.0.0.1/tcp/1"
    genuine = victim._own_record.envelope()
    forged = [
        envelope(mallory, victim.key, trap),  # about another key than the signer's
        envelope(mallory, mallory.public_key, trap, network=network_id("other")),
        envelope(mallory, mallory.public_key, trap, issued_at=int(time.time()) - 100_000),
        genuine[:-1] + bytes([genuine[-1] ^ 1]),
        b"",
        b"nonsense",
    ]
    ask_with(asker, liar, *forged)
    assert await asked(asker, liar) == []
    assert asker._book.of(victim.key) == asker._book.of(mallory.public_key) == ()
    ask_with(asker, liar, genuine)
    assert await asked(asker, liar) == [victim.key]
    assert list(map(str, asker._book.of(victim.key))) == [text.split("/p2p/")[0] for text in victim.addrs]


async def test_a_replayed_record_changes_nothing(lab) -> None:
    mover, liar, asker = [await lab.mesh(target_peers=0) for _ in range(3)]
    old = mover._own_record.envelope()
    mover._announcer.set_confirmed((parse("/ip4/127.0.0.1/tcp/7")[0],))
    await connect(asker, to=liar)
    await connect(asker, to=mover)
    await eventually(lambda: asker._book.record_of(mover.key, trio.current_time()) is not None)
    record = asker._book.record_of(mover.key, trio.current_time())
    ask_with(asker, liar, old)
    assert await asked(asker, liar) is not None
    assert asker._book.record_of(mover.key, trio.current_time()) is record


async def test_a_peer_that_restarted_with_its_clock_behind_is_heard_again(lab) -> None:
    hub, node = [await lab.mesh(target_peers=0) for _ in range(2)]
    await connect(node, to=hub)
    await eventually(lambda: hub._book.record_of(node.key, trio.current_time()) is not None)
    known = hub._book.record_of(node.key, trio.current_time())
    own = node._own_record
    own._sequence, own._told, own._clock = 0, None, lambda: time.time() - 3600
    own.services = RELAY
    await asked(node, hub)  # the hub answers with what it has
    assert own.sequence >= known.message.sequence
    await asked(node, hub)
    assert hub._book.offering(RELAY, trio.current_time()) == [node.key]


async def test_floods_of_records_stay_within_a_share_of_the_book(lab) -> None:
    liar, asker = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0, known_peers=64)
    await connect(asker, to=liar)
    strangers = [KeyPair.from_seed(os.urandom(32)) for _ in range(16 * 8)]
    lies = [envelope(each, each.public_key, "/ip4/127.0.0.1/tcp/1") for each in strangers]
    for start in range(0, len(lies), 16):
        ask_with(asker, liar, *lies[start : start + 16])
        await asked(asker, liar)
    assert len(asker._book.peers()) <= 64 // 4 + 1  # and the liar, whom a person named
    with pytest.raises(PeerUnreachable):
        await asker.open_stream(strangers[-1].public_key, "/echo", timeout_s=10, max_frame_bytes=10)


async def test_a_key_is_found_over_several_hops(lab) -> None:
    """asker – hub – third, and only the third has met the one that is looked for."""
    asker, hub, third, wanted = [await lab.mesh(target_peers=0, exchange_s=1000.0) for _ in range(4)]
    wanted.serve("/echo", echo, max_frame_bytes=100)
    await connect(asker, third, to=hub)
    await connect(wanted, to=third)
    await eventually(lambda: third._book.record_of(wanted.key, trio.current_time()) is not None)
    await eventually(lambda: hub._book.record_of(third.key, trio.current_time()) is not None)
    assert wanted.key not in hub._book.peers()
    assert await asker.request(wanted.key, "/echo", b"hi", deadline_s=10, max_reply_bytes=100) == b"hi"


async def test_relays_are_heard_of_among_many(lab) -> None:
    asker, hub = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
    for number in range(200):
        keys = KeyPair.from_seed(number.to_bytes(32, "big"))
        told = envelope(keys, keys.public_key, "/ip4/127.0.0.1/tcp/1", services=RELAY if number == 99 else 0)
        hub._book.take(open_record(told, NETWORK, time.time()), str(number), trio.current_time())
    await connect(asker, to=hub)
    relay = KeyPair.from_seed((99).to_bytes(32, "big")).public_key
    await eventually(lambda: asker._offering(RELAY) == [relay])
    assert 1 < len(asker._book.peers()) <= 18


async def test_a_key_that_nobody_knows_is_given_up_soon(lab) -> None:
    a, b = await lab.pair(target_peers=0)
    with trio.fail_after(15), pytest.raises(PeerUnreachable):
        await a.open_stream(KeyPair.from_seed(os.urandom(32)).public_key, "/echo", timeout_s=14, max_frame_bytes=10)
    assert a.is_connected(b.key)


async def test_peers_of_another_network_part_and_stay_apart(lab, caplog) -> None:
    here = await lab.mesh()
    async with open_mesh(MeshConfig(network="another", limits=here.config.limits), os.urandom(32)) as there:
        with caplog.at_level(logging.WARNING):
            there.keep_connected(here.key, here.addrs, asked_for=True)
            await eventually(lambda: there._discovery.is_foreign(here.key) and here._discovery.is_foreign(there.key))
            await eventually(lambda: not there.peers() and not here.peers())
            await eventually(lambda: "is of another network" in caplog.text)
        assert "genesis" in caplog.text
        with pytest.raises(PeerUnreachable, match="another network"):
            await there.open_stream(here.key, "/echo", timeout_s=5, max_frame_bytes=10)
        assert here._book.of(there.key) == ()  # nothing was learned


async def test_new_addresses_are_told_at_once(lab) -> None:
    a, b = await lab.pair(exchange_s=1000.0, target_peers=0)
    await eventually(lambda: a._book.record_of(b.key, trio.current_time()) is not None)
    told: list[tuple[str, ...]] = []
    b.on_addresses_changed = lambda: told.append(b.addrs)
    b._announcer.set_confirmed((parse("/ip4/127.0.0.1/tcp/9")[0],))
    assert told == [b.addrs]
    assert "/ip4/127.0.0.1/tcp/9/" in told[0][0]
    await eventually(lambda: "/ip4/127.0.0.1/tcp/9" in map(str, a._book.of(b.key)))
    b._announcer.set_confirmed((parse("/ip4/127.0.0.1/tcp/9")[0],))
    assert len(told) == 1


class Memory:
    """What outlives a restart."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def load(self, name: str) -> bytes | None:
        return self.blobs.get(name)

    def save(self, name: str, blob: bytes) -> None:
        self.blobs[name] = blob


async def test_a_restarted_node_needs_no_bootstrap(lab) -> None:
    memory, seed, config = Memory(), os.urandom(32), MeshConfig(network="test")
    hub, other = await lab.pair()
    async with open_mesh(config, seed, memory) as node:
        await connect(node, to=hub)
        with trio.fail_after(10):
            await node.wait_until(lambda: node.is_connected(other.key))
    assert memory.blobs["addresses"]
    await eventually(lambda: not other.is_connected(node.key))
    await lab.stop(hub)
    async with open_mesh(config, seed, memory) as node:
        with trio.fail_after(10):
            await node.wait_until(lambda: node.is_connected(other.key))


async def test_interfaces_that_change_are_noticed(lab, monkeypatch) -> None:
    mesh = await lab.mesh(interfaces_s=0.02)
    assert mesh.addrs[0].startswith("/ip4/127.0.0.1/")
    woken: list[int] = []
    mesh._announcer.on_woken = lambda: woken.append(1)
    monkeypatch.setattr(
        "kaisar_p2p.mesh.discovery.announce.local_addresses", lambda _bound: (parse("/ip4/198.51.100.7/tcp/5")[0],)
    )
    await eventually(lambda: bool(woken))
    assert mesh.addrs[0].startswith("/ip4/198.51.100.7/tcp/5/p2p/")


async def test_a_machine_that_was_suspended_redials_at_once(lab) -> None:
    """Ten minutes without network: waiting peers are at their longest delays, which `wake` cuts short."""
    seed = os.urandom(32)
    hub, node = await lab.mesh(seed), await lab.mesh(target_peers=0)
    port = int(hub.addrs[0].split("/")[4])
    await connect(node, to=hub)
    node._discovery._attempts[hub.key].backoff._failures = 16
    await lab.stop(hub)
    await eventually(lambda: not node.is_connected(hub.key))
    await lab.mesh(seed, port=port)
    node._discovery.wake()
    with trio.fail_after(5):
        await node.wait_connected()


def test_the_longest_delay_is_half_a_minute() -> None:
    backoff = Backoff(random.Random(0))
    delays = [backoff.next_s() for _ in range(30)]
    assert max(delays) <= 30
    assert delays[0] <= 0.25
    assert min(delays[10:]) >= 15


async def test_a_peer_that_was_asked_for_and_cannot_be_reached_is_told_once(lab, caplog) -> None:
    gone = await lab.mesh()
    key, addrs = gone.key, gone.addrs
    await lab.stop(gone)
    node = await lab.mesh(target_peers=0)
    with caplog.at_level(logging.WARNING):
        node.keep_connected(key, addrs, asked_for=True)
        await eventually(lambda: node._discovery._attempts_at(key).backoff._failures >= 3)
    warnings = [each for each in caplog.messages if key.hex()[:12] in each]
    assert len(warnings) == 1
    assert "refused" in warnings[0]
    [why] = node.report().unreached
    assert why in warnings[0]


async def test_a_bootstrap_that_is_gone_matters_to_who_is_alone(lab, caplog) -> None:
    gone, hub = await lab.mesh(), await lab.mesh(target_peers=0)
    key, addrs = gone.key, gone.addrs
    await lab.stop(gone)
    alone, met = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
    await connect(met, to=hub)
    with caplog.at_level(logging.WARNING):
        for node in (met, alone):
            node._discovery._attempts_at(key).backoff._failures = 4  # some seconds later
            node.keep_connected(key, addrs)
        await eventually(lambda: key.hex()[:12] in caplog.text)
        await eventually(lambda: met._discovery._attempts_at(key).backoff.failures >= 6)
    assert len([each for each in caplog.messages if key.hex()[:12] in each]) == 1


def candidates_of(book: AddressBook, outbound: Counter[str]) -> Counter[str]:
    """Which /16 the search takes its next peers from."""
    network = SimpleNamespace(
        limits=MeshConfig().limits,
        get_peer_id=lambda: SimpleNamespace(to_bytes=lambda: bytes(38)),
        connection_to=lambda _key: None,
        is_banned=lambda _key: False,
    )
    discovery = Discovery(network, book, SimpleNamespace(), random.Random(1))  # type: ignore[arg-type]
    discovery._outbound_subnets = lambda: outbound  # type: ignore[method-assign]
    found = [discovery._next_candidate() for _ in range(400)]
    return Counter(subnet_of(book.of(key)[0].host) for key in found if key is not None)


async def test_the_search_prefers_subnets_that_we_are_not_connected_to() -> None:
    book = AddressBook(allow_private=False, peers=1000, addresses_per_peer=4)
    for number in range(50):
        book.add(os.urandom(32), [f"/ip4/9.9.1.{number}/tcp/1"], source="a")
    book.add(os.urandom(32), ["/ip4/8.8.8.8/tcp/1"], source="a")
    assert set(candidates_of(book, Counter({"9.9.0.0/16": 1}))) == {"8.8.0.0/16"}


async def test_a_talkative_source_does_not_choose_our_peers() -> None:
    book = AddressBook(allow_private=False, peers=1000, addresses_per_peer=4)
    for number in range(200):
        book.add(os.urandom(32), [f"/ip4/9.{number}.1.1/tcp/1"], source="talkative")
    book.add(os.urandom(32), ["/ip4/8.8.8.8/tcp/1"], source="quiet")
    assert candidates_of(book, Counter())["8.8.0.0/16"] > 120


async def test_those_who_come_to_us_do_not_keep_us_from_choosing(lab) -> None:
    """However many dial a node, it goes on to look for half of its peers itself."""
    node, *crowd = [await lab.mesh(target_peers=0) for _ in range(5)]
    await connect(*crowd, to=node)
    node._network.limits = node._discovery._limits = replace(node.config.limits, target_peers=4)
    honest = await lab.mesh(target_peers=0)
    node.add_addresses(honest.key, honest.addrs)
    with trio.fail_after(10):
        await node.wait_until(lambda: node.is_connected(honest.key))


async def test_several_that_want_a_key_search_once(lab) -> None:
    a, b = await lab.pair(target_peers=0)
    searches: list[bytes] = []
    look_for = a._discovery._rendezvous._ask_around

    async def counted(key: bytes) -> None:
        searches.append(key)
        await look_for(key)

    a._discovery._rendezvous._ask_around = counted
    key = KeyPair.from_seed(os.urandom(32)).public_key

    async def want() -> None:
        with pytest.raises(PeerUnreachable):
            await a._discovery.connect(key)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(want)
    assert searches == [key]
    assert a.is_connected(b.key)


async def test_questions_are_bounded(lab) -> None:
    with pytest.raises(ValueError, match="at most 4"):
        encode(peers.PeersQuestion(bytes(8), NETWORK, b"", (bytes(32),) * 5, 0))
    largest = peers.PeersAnswer(bytes(8), NETWORK, b"x" * RECORD_BYTES, (b"x" * RECORD_BYTES,) * 16)
    assert len(encode(largest)) <= peers.FRAME_BYTES
