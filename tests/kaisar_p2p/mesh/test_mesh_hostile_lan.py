"""The local network, where anybody may say anything, and where we may be somewhere else after a nap."""

from __future__ import annotations

import os

import pytest
import trio
import zeroconf

from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.discovery.mdns import SERVICE, LocalNetwork
from kaisar_p2p.mesh.discovery.records import network_id
from tests.kaisar_p2p.mesh.test_mesh_mdns import needs_multicast

NETWORK = network_id("test")


def local(key: bytes, addresses: list[Address], found: list[tuple[bytes, list[str]]]) -> LocalNetwork:
    return LocalNetwork(
        key,
        NETWORK,
        lambda: tuple(addresses),
        lambda peer, texts: found.append((peer, texts)),
        most=8,
        interfaces=["127.0.0.1"],
    )


@pytest.mark.parametrize("name", ["\x00", "\x1b[2J", "x" * 70, "_sub", ""])
def test_a_name_that_the_package_refuses_does_not_end_the_search(name: str) -> None:
    """One packet with such a name once ended the thread that looks for peers."""
    looking = local(os.urandom(32), [], [])
    looking._on_change(None, SERVICE, f"{name}.{SERVICE}", zeroconf.ServiceStateChange.Added)  # type: ignore[arg-type]
    assert not looking._seen


@needs_multicast
async def test_after_a_change_of_addresses_peers_are_found_again(monkeypatch) -> None:
    """Also when there was no network in between: the sockets of before hear nothing on new interfaces."""
    alice, bob = os.urandom(32), os.urandom(32)
    mine, theirs = [Address("ip4", "127.0.0.1", 4001)], [Address("ip4", "127.0.0.1", 4002)]
    found: list[tuple[bytes, list[str]]] = []
    one, other = local(alice, mine, found), local(bob, theirs, [])
    made, make = [0], zeroconf.Zeroconf

    def unsteady(**options: object) -> object:
        made[0] += 1
        if made[0] == 2:
            raise OSError(101, "Network is unreachable")
        return make(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(zeroconf, "Zeroconf", unsteady)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        with trio.fail_after(10):
            while made[0] < 1:  # noqa: ASYNC110
                await trio.sleep(0.01)
        one.readdress()
        with trio.fail_after(10):
            while made[0] < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
        one.readdress()
        nursery.start_soon(other.run)
        with trio.fail_after(20):
            while (bob, ["/ip4/127.0.0.1/tcp/4002"]) not in found:  # noqa: ASYNC110
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert made[0] >= 4
