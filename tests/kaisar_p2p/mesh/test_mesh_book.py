from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import parse_any
from kaisar_p2p.mesh.discovery.records import RELAY, AddressRecord, Record, network_id, open_record
from kaisar_p2p.mesh.ids import id_of
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal

NETWORK = network_id("test")
KEYS = [KeyPair.from_seed(bytes([number]) * 32) for number in range(60)]
ALICE = KEYS[0].public_key


def book(peers: int = 40, addresses_per_peer: int = 4, *, allow_private: bool = False) -> AddressBook:
    return AddressBook(allow_private=allow_private, peers=peers, addresses_per_peer=addresses_per_peer)


def signed(keys: KeyPair, *addresses: str, sequence: int = 1, services: int = 0) -> Record:
    told = AddressRecord(keys.public_key, sequence, addresses, 1000, 600, services)
    return open_record(seal(told, keys, NETWORK), NETWORK, 1000)


def texts(known: AddressBook, key: bytes = ALICE) -> list[str]:
    return list(map(str, known.of(key)))


def test_the_newest_record_counts_and_takes_the_place_of_the_one_before() -> None:
    known = book()
    assert known.take(signed(KEYS[0], "/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/2", sequence=5), "a", 0)
    assert texts(known) == ["/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/2"]
    assert not known.take(signed(KEYS[0], "/ip4/9.9.9.9/tcp/1", sequence=5), "b", 0)  # replayed
    assert not known.take(signed(KEYS[0], "/ip4/9.9.9.9/tcp/1", sequence=4), "b", 0)
    assert known.take(signed(KEYS[0], "/ip4/8.8.8.8/tcp/2", "/ip4/8.8.4.4/tcp/3", sequence=6), "b", 0)
    assert texts(known) == ["/ip4/8.8.8.8/tcp/2", "/ip4/8.8.4.4/tcp/3"]


def test_a_new_record_does_not_remove_what_others_are_sure_of() -> None:
    known = book()
    known.add(ALICE, ["/ip4/8.8.8.8/tcp/1"])
    known.take(signed(KEYS[0], "/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/2", sequence=1), "a", 0)
    known.take(signed(KEYS[0], "/ip4/8.8.8.8/tcp/3", sequence=2), "a", 0)
    assert set(texts(known)) == {"/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/3"}


@pytest.mark.parametrize("allowed", [True, False])
def test_private_addresses_in_a_record_count_where_they_are_allowed(allowed: bool) -> None:
    known = book(allow_private=allowed)
    known.take(signed(KEYS[0], "/ip4/10.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1", "/ip6/fd00::1/tcp/1"), "a", 0)
    assert len(known.of(ALICE)) == 3 * allowed


def test_loopback_is_a_matter_of_its_own() -> None:
    known = AddressBook(allow_private=True, allow_loopback=False, peers=4, addresses_per_peer=4)
    known.take(signed(KEYS[0], "/ip4/10.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/4001"), "a", 0)
    assert texts(known) == ["/ip4/10.0.0.1/tcp/4001"]


def test_one_source_fills_a_quarter_of_the_book_with_its_own() -> None:
    known = book(peers=40)
    known.take(signed(KEYS[0], "/ip4/8.8.8.8/tcp/1"), "honest", 0)
    for keys in KEYS[1:]:
        known.take(signed(keys, "/ip4/9.9.9.9/tcp/1"), "liar", 0)
    assert sum(known.source_of(key) == "liar" for key in known.peers()) == 10
    assert ALICE in known.peers()


def test_who_spoke_of_a_peer_first_cannot_push_it_out_later() -> None:
    known = book(peers=40)
    genuine = signed(KEYS[0], "/ip4/8.8.8.8/tcp/1")
    known.take(genuine, "liar", 0)
    known.add(KEYS[1].public_key, ["/ip4/8.8.8.8/tcp/2"], source="liar")
    assert not known.take(genuine, "itself", 0, itself=True)  # nothing new, but from the peer
    known.add(KEYS[1].public_key, ["/ip4/8.8.8.8/tcp/2"])  # and the ledger names the other
    for keys in KEYS[2:]:
        known.take(signed(keys, "/ip4/9.9.9.9/tcp/1"), "liar", 0)
    assert known.source_of(ALICE) == "itself"
    assert known.source_of(KEYS[1].public_key) == ""
    assert {ALICE, KEYS[1].public_key} < set(known.peers())


@pytest.mark.parametrize("allowed", [True, False])
def test_a_name_that_a_stranger_tells_may_lead_to_a_private_address(allowed: bool) -> None:
    known = book(allow_private=allowed)
    known.take(signed(KEYS[0], "/dns4/localhost/tcp/6379"), "a", 0)
    assert bool(known.of(ALICE)) == allowed
    known.add(ALICE, ["/dns4/kaisar.example/tcp/4001"])  # the ledger's
    assert "/dns4/kaisar.example/tcp/4001" in texts(known)


@given(st.lists(st.tuples(st.integers(0, 59), st.sampled_from(["", "a", "b", "c", "mdns"])), max_size=120))
def test_the_book_stays_bounded_and_keeps_what_is_pinned(steps: list[tuple[int, str]]) -> None:
    known = book(peers=12)
    known.add(ALICE, ["/ip4/8.8.8.8/tcp/1"], trusted=True)
    known.pin(ALICE)
    for number, source in steps:
        known.add(KEYS[number].public_key, ["/ip4/9.9.9.9/tcp/1"], source=source, lan=source == "mdns")
    assert len(known.peers()) <= 12
    assert ALICE in known.peers()
    assert sum(map(len, known._sources.values())) == len(known.peers())


def test_direct_addresses_come_first_and_what_fails_comes_last() -> None:
    known = book()
    relay = f"/ip4/8.8.4.4/tcp/1/p2p/{id_of(KEYS[1].public_key)}/p2p-circuit"
    known.add(ALICE, ["/ip4/8.8.8.8/tcp/1", "/ip4/9.9.9.9/tcp/1", relay])
    assert texts(known) == ["/ip4/9.9.9.9/tcp/1", "/ip4/8.8.8.8/tcp/1", relay]
    known.confirm(ALICE, parse_any("/ip4/8.8.8.8/tcp/1")[0])
    assert texts(known)[0] == "/ip4/8.8.8.8/tcp/1"
    for _ in range(3):
        known.blame(ALICE, [parse_any("/ip4/8.8.8.8/tcp/1")[0], parse_any("/ip4/9.9.9.9/tcp/1")[0]], 0)
    assert texts(known)[0] == relay


def test_dead_addresses_are_forgotten_but_not_those_of_kept_peers() -> None:
    known = book()
    for keys in KEYS[:2]:
        known.add(keys.public_key, ["/ip4/8.8.8.8/tcp/1"])
    known.pin(KEYS[1].public_key)
    for number in range(20):
        for keys in KEYS[:2]:
            known.blame(keys.public_key, known.of(keys.public_key), number * 300)
    assert known.peers() == [KEYS[1].public_key]


def test_failures_within_an_hour_forget_nothing() -> None:
    known = book()
    known.add(ALICE, ["/ip4/8.8.8.8/tcp/1"])
    for _ in range(100):
        known.blame(ALICE, known.of(ALICE), 3000)
    assert known.of(ALICE)


def test_records_end() -> None:
    known = book()
    known.take(signed(KEYS[0], "/ip4/8.8.8.8/tcp/1", services=RELAY), "a", 50)
    assert known.offering(RELAY, 649) == [ALICE]
    assert known.sample(5, random.Random(0), 649)
    assert known.offering(RELAY, 651) == []
    assert known.record_of(ALICE, 651) is None
    known.expire(651)
    assert known.peers() == []


def test_the_local_network_displaces_nothing() -> None:
    known = book(addresses_per_peer=6)
    known.add(ALICE, ["/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/2", "/ip4/8.8.8.8/tcp/3"])
    known.add(ALICE, [f"/ip4/192.168.0.{number}/tcp/1" for number in range(1, 200)], lan=True, source="mdns")
    assert sum("192.168" in text for text in texts(known)) == 3
    assert sum("8.8.8.8" in text for text in texts(known)) == 3


def test_the_book_outlives_a_restart() -> None:
    known = book()
    known.add(ALICE, ["/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/2"])
    known.add(KEYS[1].public_key, ["/ip4/9.9.9.9/tcp/1"])
    known.confirm(ALICE, parse_any("/ip4/8.8.8.8/tcp/1")[0])
    again = book()
    assert again.load(known.dump()) == 1
    assert texts(again) == ["/ip4/8.8.8.8/tcp/1"]


@given(st.one_of(st.binary(max_size=200), st.sampled_from([b"[[1,2]]", b'[["00",[]]]', b"{}", b"[[[]]]", b"null"])))
def test_a_broken_dump_brings_nothing(data: bytes) -> None:
    assert book().load(data) == 0


def test_a_dump_is_bounded() -> None:
    known = book(peers=3000)
    for _ in range(1000):
        key = os.urandom(32)
        known.add(key, ["/ip4/8.8.8.8/tcp/1"])
        known.confirm(key, parse_any("/ip4/8.8.8.8/tcp/1")[0])
    assert len(known.dump()) < 64 * 1024
    assert book(peers=2000).load(known.dump()) == 256
