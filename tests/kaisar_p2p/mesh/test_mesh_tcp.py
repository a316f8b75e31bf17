"""Sockets: one process on a port, and dialing from it."""

from __future__ import annotations

import errno

import pytest
import trio

from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.transport import tcp

HOME = Address("ip4", "127.0.0.1", 0)


async def _listening(address: Address = HOME) -> tuple[trio.SocketListener, Address]:
    (listener,) = await tcp.listen(address)
    return listener, Address("ip4", "127.0.0.1", listener.socket.getsockname()[1])


async def test_a_port_that_is_taken_cannot_be_listened_on() -> None:
    listener, address = await _listening()
    with pytest.raises(OSError, match=r".") as caught:
        await tcp.listen(address)
    assert caught.value.errno == errno.EADDRINUSE
    await listener.aclose()


async def test_a_dial_leaves_from_the_listening_port() -> None:
    here, source = await _listening()
    there, target = await _listening()
    stream = await tcp.connect(target, source)
    accepted = await there.accept()
    assert stream.socket.getsockname()[1] == source.port
    assert accepted.socket.getpeername()[1] == source.port

    # The same two ports cannot be connected twice: the second dial leaves from another.
    second = await tcp.connect(target, source)
    assert second.socket.getsockname()[1] != source.port
    # And nobody else may listen on a port that only a dial holds any more.
    with pytest.raises(OSError, match=r"."):
        await tcp.listen(source)
    for each in (here, there, stream, second, accepted):
        await each.aclose()


async def test_the_other_end_may_dial_the_same_ports_the_other_way() -> None:
    here, source = await _listening()
    there, target = await _listening()
    first = await tcp.connect(target, source)
    second = await tcp.connect(source, target)  # from an ephemeral port, since the pair is in use
    assert second.socket.getsockname()[1] != target.port
    for each in (here, there, first, second):
        await each.aclose()


async def test_a_refused_dial_says_so() -> None:
    listener, target = await _listening()
    here, source = await _listening()
    await listener.aclose()
    with pytest.raises(OSError, match=r".") as caught:
        await tcp.connect(target, source)
    assert caught.value.errno == errno.ECONNREFUSED
    await here.aclose()


@pytest.mark.parametrize(
    ("address", "bound", "expected"),
    [
        ("45.1.2.3", "0.0.0.0", True),
        ("45.1.2.3", "192.168.1.7", True),
        ("45.1.2.3", "127.0.0.1", False),  # cannot get there
        ("127.0.0.1", "0.0.0.0", False),  # no NAT on the way
        ("192.168.1.7", "0.0.0.0", False),
    ],
)
def test_which_dials_leave_from_the_listening_port(address: str, bound: str, expected: bool) -> None:
    listening = Address("ip4", bound, 4001)
    found = tcp.dialing_source(Address("ip4", address, 1), [Address("ip6", "::", 4001), listening])
    assert found == (listening if expected else None)


def test_names_are_dialed_from_any_port() -> None:
    assert tcp.dialing_source(Address("dns4", "example.org", 1), [Address("ip4", "0.0.0.0", 4001)]) is None
