"""The parts without IO: addresses, buckets, reputation, framing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID
from nacl.signing import SigningKey

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.mesh import peer_of
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import Address, local_addresses, parse, with_peer
from kaisar_p2p.mesh.ids import id_bytes_of, id_of, key_of, key_pair_of
from kaisar_p2p.mesh.limits import TokenBucket


def test_peer_ids_are_those_of_the_library() -> None:
    seed = os.urandom(32)
    key = bytes(SigningKey(seed).verify_key)
    assert id_of(key) == ID.from_pubkey(key_pair_of(seed).public_key)
    assert key_of(id_bytes_of(key)) == key
    assert key_of(b"\x12\x20" + bytes(32)) is None


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address, _ = parse(text)
    except ValueError:
        return
    assert parse(str(address))[0] == address


@given(st.binary(max_size=60), st.sampled_from(["/ip4/1.2.3.4/tcp/1/p2p/", "/ip6/::1/tcp/", "/dns4/"]))
def test_almost_addresses(tail: bytes, head: str) -> None:
    with contextlib.suppress(ValueError):
        parse(head + tail.decode("latin-1"))


def test_addresses_name_their_peer() -> None:
    key = bytes(SigningKey.generate().verify_key)
    text = with_peer(Address("ip4", "1.2.3.4", 4001), key)
    assert peer_of(text) == (key, "/ip4/1.2.3.4/tcp/4001")
    relay = f"{text}/p2p-circuit"
    assert peer_of(f"{relay}/p2p/{text.rpartition('/')[2]}") == (key, relay)
    for bad in ("", "1.2.3.4:4001", "/ip4/1.2.3.4/tcp/4001", relay):
        with pytest.raises(ConfigError):
            peer_of(bad)


def test_a_wildcard_is_not_told_to_others() -> None:
    for address in local_addresses([Address("ip4", "0.0.0.0", 4001)]):
        assert address.port == 4001
        assert not address.is_wildcard


def book(**changes: object) -> AddressBook:
    options = {"allow_private": False, "peers": 10, "addresses_per_peer": 3} | changes
    return AddressBook(**options)  # type: ignore[arg-type]


def test_private_addresses_are_taken_only_where_they_make_sense() -> None:
    private = ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/192.168.1.1/tcp/1", "/ip6/::1/tcp/1"]
    assert book().add(b"k", private) == 0
    assert book().add(b"k", ["/ip4/8.8.8.8/tcp/1"]) == 1
    assert book(addresses_per_peer=8, allow_private=True).add(b"k", private) == 4
    assert book().add(b"k", private[:1], trusted=True) == 1


def test_the_book_is_bounded_and_keeps_what_is_pinned() -> None:
    known = book()
    known.pin(b"pinned")
    known.add(b"pinned", ["/ip4/8.8.8.8/tcp/1"])
    for number in range(100):
        known.add(b"%d" % number, [f"/ip4/8.8.8.8/tcp/{port}" for port in range(1, 50)])
    assert len(known.peers()) == 10
    assert known.of(b"pinned") == (Address("ip4", "8.8.8.8", 1),)
    assert [address.port for address in known.of(b"99")] == [49, 48, 47]


def test_an_address_that_worked_comes_first() -> None:
    known = book()
    known.add(b"k", ["/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/2"])
    known.confirm(b"k", Address("ip4", "8.8.8.8", 1))
    assert known.of(b"k")[0].port == 1


@given(st.lists(st.floats(0, 10), max_size=50))
def test_a_bucket_never_gives_more_than_burst_and_rate(steps: list[float]) -> None:
    bucket, now, given_out = TokenBucket(5.0, 10.0, 0.0), 0.0, 0
    for step in steps:
        now += step
        while bucket.try_take(1, now):
            given_out += 1
    assert given_out <= 10 + 5 * now + 1


def test_a_bucket_in_debt_says_how_long() -> None:
    bucket = TokenBucket(10.0, 10.0, 0.0)
    assert bucket.take(10, 0.0) == 0.0
    assert bucket.take(20, 0.0) == 2.0
    assert bucket.take(0, 2.0) == 0.0


def test_libp2p_imports_without_fastecdsa_and_without_its_unused_parts() -> None:
    script = (
        "import sys; import kaisar_p2p.mesh;"
        "heavy = {'aioquic', 'zeroconf', 'httpx', 'requests', 'prometheus_client', 'dns'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "import httpx; assert httpx.Client.get;"  # the real one, not the stand-in
        "from libp2p.crypto.ed25519 import create_new_key_pair; create_new_key_pair()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_stand_in_refuses_to_be_used_and_late_imports_get_the_real_thing() -> None:
    """An RSA or secp256k1 peer must fail the handshake, not pass it because a stand-in says yes to everything."""
    script = (
        "import kaisar_p2p.mesh, pytest;"
        "from libp2p.crypto.rsa import RSAPublicKey; from libp2p.crypto.secp256k1 import Secp256k1PublicKey;"
        "pytest.raises(NotImplementedError, RSAPublicKey.from_bytes, bytes(100));"
        "pytest.raises(NotImplementedError, Secp256k1PublicKey.from_bytes, bytes(33));"
        "from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol; assert CircuitV2Protocol.run"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
