"""Addresses as a weapon: knocking around in our network, filling the book, looking new to be dialed."""

from __future__ import annotations

import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from kaisar_p2p.mesh import Mesh, MeshConfig
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import CircuitAddress, parse_any
from kaisar_p2p.mesh.discovery.discovery import Discovery
from kaisar_p2p.mesh.discovery.exchange import PeerExchange
from kaisar_p2p.mesh.discovery.records import AddressRecord, OwnRecord, Record, network_id, open_record
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal

NETWORK = network_id("test")
KEYS = KeyPair.from_seed(bytes(32))
KEY = KEYS.public_key
LOCAL_SERVICES = (
    "/ip4/127.0.0.1/tcp/6379",
    "/dns4/localhost/tcp/6379",
    "/ip4/169.254.169.254/tcp/80",
    "/ip6/::1/tcp/22",
)


def signed(*addresses: str) -> Record:
    return open_record(seal(AddressRecord(KEY, 1, addresses, 1000, 600, 0), KEYS, NETWORK), NETWORK, 1000)


def at_home() -> AddressBook:
    """Of a node behind a home router: all its addresses are private ones, and it does not listen on loopback."""
    return AddressBook(allow_private=True, allow_loopback=False, peers=100, addresses_per_peer=8)


def known_of(book: AddressBook) -> list[str]:
    return sorted(map(str, book.of(KEY)))


def test_a_stranger_s_record_does_not_lead_to_services_of_this_machine_or_the_router() -> None:
    book = at_home()
    book.take(signed(*LOCAL_SERVICES, "/ip4/192.168.1.1/tcp/80", "/ip4/192.168.1.7/tcp/4001"), "liar", 0.0)
    assert known_of(book) == ["/ip4/192.168.1.7/tcp/4001"]


def test_nor_does_mdns() -> None:
    book = AddressBook(allow_private=False, peers=100, addresses_per_peer=8)
    book.add(KEY, [*LOCAL_SERVICES, "/ip4/192.168.1.7/tcp/4001"], lan=True, source="mdns")
    assert known_of(book) == ["/ip4/192.168.1.7/tcp/4001"]


async def test_nor_does_a_bootstrap_record_of_the_ledger_but_a_person_may() -> None:
    mesh = Mesh(MeshConfig(listen=("/ip4/0.0.0.0/tcp/4001",), allow_private=False), os.urandom(32))
    mesh.keep_connected(KEY, ["/ip4/127.0.0.1/tcp/6379", "/ip4/10.0.0.7/tcp/4001", "/dns4/kaisar.example/tcp/4001"])
    assert known_of(mesh._book) == ["/dns4/kaisar.example/tcp/4001", "/ip4/10.0.0.7/tcp/4001"]
    mesh.keep_connected(KEY, ["/ip4/127.0.0.1/tcp/4002"], asked_for=True)
    assert "/ip4/127.0.0.1/tcp/4002" in known_of(mesh._book)


@pytest.mark.parametrize("lab", [AddressBook(allow_private=True, peers=9, addresses_per_peer=8)])
def test_in_a_lab_everything_is_dialed(lab: AddressBook) -> None:
    lab.take(signed("/ip4/127.0.0.1/tcp/80", "/dns4/localhost/tcp/80", "/ip4/10.0.0.1/tcp/80"), "peer", 0.0)
    assert len(known_of(lab)) == 3


async def test_what_is_announced_to_all_does_not_push_out_what_others_bring() -> None:
    mesh = Mesh(MeshConfig(), os.urandom(32))
    most = mesh.config.limits.known_peers
    mesh._book.add(KEY, ["/ip4/8.8.8.8/tcp/4001"], source="honest")
    for _ in range(most + 10):
        mesh.add_addresses(os.urandom(32), ["/ip4/9.9.9.9/tcp/4001"])
    assert known_of(mesh._book) == ["/ip4/8.8.8.8/tcp/4001"]
    assert len(mesh._book.peers()) <= most // 4 + 1


@pytest.mark.parametrize(
    "host", ["::ffff:127.0.0.1", "::ffff:7f00:1", "::FFFF:10.0.0.1", "fe80::1%\x1b[2J", "fe80::1%a b"]
)
def test_addresses_in_disguise_are_none(host: str) -> None:
    """IPv6 sockets reach IPv4 services through those; the ends of others would be printed."""
    with pytest.raises(ValueError):
        parse_any(f"/ip6/{host}/tcp/6379")


async def test_nobody_looks_new_by_naming_an_address_elsewhere_too() -> None:
    book = AddressBook(allow_private=False, peers=1000, addresses_per_peer=4)
    for number in range(50):
        book.add(os.urandom(32), [f"/ip4/9.9.1.{number}/tcp/1", f"/ip4/77.{number}.1.1/tcp/1"], source="a")
    book.add(KEY, ["/ip4/8.8.8.8/tcp/1"], source="a")
    network = SimpleNamespace(
        limits=MeshConfig().limits,
        get_peer_id=lambda: SimpleNamespace(to_bytes=lambda: bytes(38)),
        connection_to=lambda _key: None,
        is_banned=lambda _key: False,
    )
    discovery = Discovery(network, book, SimpleNamespace(), random.Random(1))  # type: ignore[arg-type]
    discovery._outbound_subnets = lambda: Counter({"9.9.0.0/16": 1})  # type: ignore[method-assign]
    assert {discovery._next_candidate() for _ in range(100)} == {KEY}


async def test_peers_over_one_relay_do_not_push_out_those_over_another() -> None:
    book = AddressBook(allow_private=False, peers=8, addresses_per_peer=4)
    own = OwnRecord(KeyPair.from_seed(bytes([9]) * 32), NETWORK, lambda: (), 600, lambda: 1000.0)
    exchange = PeerExchange(NETWORK, own, book, None, list, random.Random(1), bytes(32))  # type: ignore[arg-type]
    exchange._checked = lambda _connection, record: record  # type: ignore[method-assign,assignment,return-value]

    def over(relay: bytes) -> object:
        through, _ = parse_any("/ip4/8.8.8.8/tcp/1")
        return SimpleNamespace(relayed=True, remote_host="", address=CircuitAddress(relay, through))  # type: ignore[arg-type]

    exchange._learn(over(b"h" * 32), signed("/ip4/8.8.4.4/tcp/1"))  # type: ignore[arg-type]
    for number in range(1, 9):
        keys = KeyPair.from_seed(bytes([number]) * 32)
        told = AddressRecord(keys.public_key, 1, ("/ip4/9.9.9.9/tcp/1",), 1000, 600, 0)
        exchange._learn(over(b"e" * 32), open_record(seal(told, keys, NETWORK), NETWORK, 1000))  # type: ignore[arg-type]
    assert known_of(book) == ["/ip4/8.8.4.4/tcp/1"]
