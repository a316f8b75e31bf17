"""What a connection does on which nothing happens: pings from one side, sent without waking anybody."""

from __future__ import annotations

import os

import pytest
import trio

from kaisar_p2p.mesh.connection import TcpStream
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.keepalive import Keeper, Liveness
from kaisar_p2p.mesh.transport.pnet import PrivateStream

posix_only = pytest.mark.skipif(os.name != "posix", reason="elsewhere the writer sends everything")

_KEEPALIVE_S = MeshLimits().keepalive_s
_KEY, _OURS, _THEIRS = bytes(32), bytes(24), bytes([1] * 24)


async def _pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        port = listener.socket.getsockname()[1]
        one = await trio.open_tcp_stream("127.0.0.1", port)
        return one, await listener.accept()


def _private(stream: trio.SocketStream, ours: bytes, theirs: bytes) -> PrivateStream:
    private = PrivateStream(stream, _KEY, ours, theirs, None)
    private._early = b""  # the check of the first bytes is over
    return private


async def _read(stream: TcpStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(65_536)
    return data


@posix_only
@pytest.mark.parametrize("private", [False, True])
async def test_what_did_not_leave_soon_leaves_with_the_next_write(private: bool) -> None:
    one, other = await _pair()
    near = _private(one, _OURS, _THEIRS) if private else TcpStream(one)
    far = _private(other, _THEIRS, _OURS) if private else TcpStream(other)
    sent, number = b"", 0
    async with one, other:
        while True:
            part = number.to_bytes(4, "big") * 4096
            sent, number = sent + part, number + 1
            if not near.write_soon(part):
                break
        assert not near.write_soon(b"more")
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.write, b"the end")
                assert await _read(far, len(sent) + 11) == sent + b"more" + b"the end"
            assert near.write_soon(b"again")
            assert await _read(far, 5) == b"again"


async def test_a_broken_connection_takes_nothing_and_the_next_write_says_so() -> None:
    one, other = await _pair()
    near = TcpStream(one)
    await other.aclose()
    await one.aclose()
    assert not near.write_soon(b"x")
    with pytest.raises(Exception, match="broke"):
        await near.write(b"y")


class _Side:
    """One end of a connection on which nothing happens but pings."""

    def __init__(self, *, dialed: bool) -> None:
        self.liveness = Liveness(_KEEPALIVE_S, 30.0)
        self.last_received = trio.current_time()
        self.liveness.begin(self.last_received, dialed=dialed)
        self.tend_at, self.pings = 0.0, 0

    def tend(self, now: float) -> None:
        assert self.liveness.look(now, self.last_received) is None
        ping = self.liveness.ping_due(now, self.last_received)
        if ping is not None:
            self.pings += 1
            self.last_received = self.other.last_received = now
            self.liveness.on_pong(ping, now)
        self.tend_at = self.liveness.next_look(now, self.last_received)

    other: _Side


async def test_one_side_pings_and_it_is_the_one_that_was_dialed(autojump_clock) -> None:
    dialer, dialed = _Side(dialed=True), _Side(dialed=False)
    dialer.other, dialed.other = dialed, dialer
    async with trio.open_nursery() as nursery:
        for side in (dialer, dialed):
            keeper = Keeper(_KEEPALIVE_S)
            keeper.add(side)
            nursery.start_soon(keeper.run)
            await trio.sleep(0.7)
        await trio.sleep(3600)
        nursery.cancel_scope.cancel()
    assert 3600 / _KEEPALIVE_S * 0.8 < dialed.pings <= 3600 / _KEEPALIVE_S
    assert dialer.pings < dialed.pings / 10  # for the round-trip time


def test_a_dialer_that_is_not_pinged_pings_in_time() -> None:
    keepalive_s = _KEEPALIVE_S
    liveness = Liveness(keepalive_s, 30.0)
    liveness.begin(0.0, dialed=True)
    liveness.ping_due(0.0, 0.0)
    liveness.on_pong(liveness._ping_id, 0.0)
    assert liveness.ping_due(keepalive_s, 0.0) is None
    assert liveness.next_look(0.1, 0.1) <= keepalive_s / 2  # or it would seem that we were asleep
    assert liveness.ping_due(1.25 * keepalive_s, 0.0) is not None
    assert liveness.next_look(1.3 * keepalive_s, 0.0) == 1.3 * keepalive_s  # it is waited for
