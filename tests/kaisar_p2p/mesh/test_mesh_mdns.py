"""mDNS: the records, and real multicast over loopback."""

from __future__ import annotations

import logging
import os
import socket
import threading

import pytest
import trio
import zeroconf
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh import MeshConfig, open_mesh
from kaisar_p2p.mesh.discovery.addresses import Address, with_peer
from kaisar_p2p.mesh.discovery.mdns import LocalNetwork, peer_in, txt_record, txt_strings
from kaisar_p2p.mesh.discovery.records import network_id
from kaisar_p2p.wire.crypto import KeyPair

NETWORK = network_id("test")
NAME = NETWORK.hex()[:16]
ALICE, BOB, EVE = (KeyPair.from_seed(os.urandom(32)).public_key for _ in range(3))
HERE = Address("ip4", "127.0.0.1", 4001)


def multicast_works() -> bool:
    """A packet to the group comes back over loopback."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("", 0))
            group = socket.inet_aton("224.0.0.251") + socket.inet_aton("127.0.0.1")
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            receiver.settimeout(2)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sender.sendto(b"?", ("224.0.0.251", receiver.getsockname()[1]))
            return receiver.recv(1) == b"?"
        except OSError:
            return False


needs_multicast = pytest.mark.skipif(not multicast_works(), reason="no multicast over loopback here")


@given(st.lists(st.text("abc=/.:", max_size=255), max_size=4))
def test_txt_strings_come_back(strings: list[str]) -> None:
    assert txt_strings(txt_record(strings)) == strings


@given(st.binary(max_size=3000))
def test_any_record_is_read_without_an_error(data: bytes) -> None:
    txt_strings(data)
    assert peer_in(data, NAME) is None


@given(st.binary(max_size=300))
def test_garbage_beside_what_counts_is_skipped(junk: bytes) -> None:
    told = txt_record([f"network={NAME}", f"dnsaddr={with_peer(HERE, ALICE)}"])
    found = peer_in(told + junk, NAME)
    assert found is None or found[0] == ALICE


def test_what_a_record_says() -> None:
    ours = f"network={NAME}"
    here = f"dnsaddr={with_peer(HERE, ALICE)}"
    assert peer_in(txt_record([ours, here]), NAME) == (ALICE, [str(HERE)])
    assert peer_in(txt_record([here]), NAME) is None  # another application of libp2p
    assert peer_in(txt_record(["network=0123456789abcdef", here]), NAME) is None
    assert peer_in(txt_record([ours, f"dnsaddr={HERE}"]), NAME) is None  # no key
    assert peer_in(txt_record([ours, here, f"dnsaddr={with_peer(HERE, EVE)}"]), NAME) is None


def test_a_record_fits_into_a_packet() -> None:
    assert len(txt_record(["x" * 255] * 20)) <= 1200
    assert txt_record(["x" * 256]) == b""


async def threads_ended() -> None:
    with trio.fail_after(10):
        while any("zeroconf" in each.name for each in threading.enumerate()):  # noqa: ASYNC110
            await trio.sleep(0.02)


@needs_multicast
async def test_two_on_one_network_find_each_other_and_not_a_third() -> None:
    found: dict[bytes, list[tuple[bytes, list[str]]]] = {ALICE: [], BOB: [], EVE: []}
    async with trio.open_nursery() as nursery:
        for key, network, port in ((ALICE, NETWORK, 4001), (BOB, NETWORK, 4002), (EVE, network_id("other"), 4003)):
            local = LocalNetwork(
                key,
                network,
                lambda port=port: (Address("ip4", "127.0.0.1", port),),
                lambda peer, texts, key=key: found[key].append((peer, texts)),
                most=8,
                interfaces=["127.0.0.1"],
            )
            nursery.start_soon(local.run)
        with trio.fail_after(15):
            while not (found[ALICE] and found[BOB]):  # noqa: ASYNC110
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    await threads_ended()
    assert found == {
        ALICE: [(BOB, ["/ip4/127.0.0.1/tcp/4002"])],
        BOB: [(ALICE, ["/ip4/127.0.0.1/tcp/4001"])],
        EVE: [],
    }


async def test_without_multicast_a_node_goes_on(lab, monkeypatch, caplog) -> None:
    def taken(**_options: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(zeroconf, "Zeroconf", taken)
    with caplog.at_level(logging.WARNING):
        async with open_mesh(MeshConfig(network="test", mdns=True), os.urandom(32)) as mesh:
            with trio.fail_after(10):
                while "Address already in use" not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            other = await lab.mesh()
            other.keep_connected(mesh.key, mesh.addrs)
            with trio.fail_after(10):
                await mesh.wait_connected()
    assert len([each for each in caplog.messages if "local network" in each]) == 1


async def test_on_loopback_nobody_is_looked_for(lab) -> None:
    assert (await lab.mesh())._lan is None


async def test_found_peers_are_dialed_though_private(lab, monkeypatch) -> None:
    """What mDNS tells is a hint of the local network: private addresses count, and the key has to be proven."""
    there = await lab.mesh()
    monkeypatch.setattr(Address, "is_loopback", False)  # stands for an address of the local network
    async with open_mesh(MeshConfig(network="test", allow_private=False, mdns=False), os.urandom(32)) as here:
        addresses = [text.split("/p2p/")[0] for text in there.addrs]
        assert here._book.add(there.key, addresses) == 0
        assert here._book.add(there.key, addresses, lan=True, source="mdns") == 1
        with trio.fail_after(10):
            await here.wait_connected()
