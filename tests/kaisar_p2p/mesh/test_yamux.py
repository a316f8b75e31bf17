"""Our yamux over a pair of in-memory sessions."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.yamux import MuxedStream, Muxer
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError, MuxedStreamReset


class Session:
    """What a muxer uses of a Noise session, over a memory stream."""

    def __init__(self, stream: trio.abc.Stream, is_initiator: bool) -> None:
        self._stream = stream
        self.is_initiator = is_initiator
        self.plaintext = bytearray()
        self.writes = 0

    async def fill(self) -> bytearray:
        try:
            data = await self._stream.receive_some(65536)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            data = b""
        if not data:
            raise ConnectionClosedError("closed")
        self.plaintext += data
        return self.plaintext

    async def write(self, data: bytes) -> None:
        self.writes += 1
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


@pytest.fixture
async def pair():
    left, right = trio.testing.memory_stream_pair()
    muxers = [Muxer(Session(s, first), b"peer", limits=MeshLimits()) for s, first in ((left, True), (right, False))]
    async with trio.open_nursery() as nursery:
        for muxer in muxers:
            nursery.start_soon(muxer.start)
            await muxer.event_started.wait()
        yield muxers
        nursery.cancel_scope.cancel()


async def opened(pair) -> tuple[MuxedStream, MuxedStream]:
    with trio.fail_after(5):
        return pair[0].open_stream_nowait(), await pair[1].accept_stream()


async def read_all(stream: MuxedStream) -> bytes:
    data = bytearray()
    while True:
        try:
            data += await stream.read()
        except MuxedStreamEOF:
            return bytes(data)


async def test_bytes_arrive_in_order_both_ways(pair) -> None:
    a, b = await opened(pair)
    sent = os.urandom(3_000_000)
    got: dict[str, bytes] = {}

    async def send(stream: MuxedStream) -> None:
        for start in range(0, len(sent), 70_001):
            await stream.write(sent[start : start + 70_001])
        await stream.close_write()

    async def receive(name: str, stream: MuxedStream) -> None:
        got[name] = await read_all(stream)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for name, stream in (("a", a), ("b", b)):
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, name, stream)
    assert got == {"a": sent, "b": sent}
    assert pair[0].stream_count == pair[1].stream_count == 0


async def test_a_stream_nobody_reads_holds_one_window_and_does_not_block_others(pair) -> None:
    a, b = await opened(pair)
    with trio.move_on_after(0.2):
        await a.write(bytes(10_000_000))
    assert len(b._received) == 256 * 1024
    other, there = await opened(pair)
    await other.write(b"x")
    with trio.fail_after(5):
        assert await there.read() == b"x"


async def test_the_window_grows_for_a_reader_that_keeps_up(pair) -> None:
    a, b = await opened(pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.write, bytes(5_000_000))
        total = 0
        while total < 5_000_000:
            total += len(await b.read())
    assert b._window == 1024 * 1024


async def test_half_close_and_end(pair) -> None:
    a, b = await opened(pair)
    await a.write(b"question")
    await a.close_write()
    with pytest.raises(MuxedStreamError):
        await a.write(b"more")
    assert await read_all(b) == b"question"
    await b.write(b"answer")
    await b.close_write()
    assert await read_all(a) == b"answer"
    assert pair[0].stream_count == pair[1].stream_count == 0


async def test_what_arrived_before_a_reset_can_be_read(pair) -> None:
    a, b = await opened(pair)
    await a.write(b"last words")
    await trio.testing.wait_all_tasks_blocked()
    a.reset_nowait()
    await trio.testing.wait_all_tasks_blocked()
    assert await b.read() == b"last words"
    with pytest.raises(MuxedStreamReset):
        await b.read()
    with pytest.raises(MuxedStreamError):
        await b.write(b"x")
    assert pair[1].stream_count == 0


async def test_a_waiting_writer_learns_of_a_reset(pair) -> None:
    a, b = await opened(pair)
    with pytest.raises(MuxedStreamReset), trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self_reset_later, b)
            try:
                await a.write(bytes(1_000_000))
            finally:
                nursery.cancel_scope.cancel()


async def self_reset_later(stream: MuxedStream) -> None:
    await trio.testing.wait_all_tasks_blocked()
    stream.reset_nowait()


async def test_streams_end_with_the_connection(pair) -> None:
    a, b = await opened(pair)
    await pair[0].close()
    with pytest.raises((MuxedStreamReset, MuxedStreamEOF)), trio.fail_after(5):
        await b.read()
    with trio.fail_after(5):
        await pair[1].event_closed.wait()
    with pytest.raises(MuxedConnUnavailable):
        pair[0].open_stream_nowait()
    with pytest.raises(MuxedConnUnavailable):
        await pair[1].accept_stream()


async def test_more_streams_than_allowed_are_reset(pair) -> None:
    streams = [pair[0].open_stream_nowait() for _ in range(80)]
    await trio.testing.wait_all_tasks_blocked()
    refused = sum(stream._was_reset for stream in streams)
    assert refused == 80 - MeshLimits().streams_per_connection
    assert pair[1].stream_count == MeshLimits().streams_per_connection


async def test_small_writes_leave_together(pair) -> None:
    a, _b = await opened(pair)
    await trio.testing.wait_all_tasks_blocked()
    before = pair[0]._session.writes
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(a.write, b"x" * 100)
    await trio.testing.wait_all_tasks_blocked()
    assert pair[0]._session.writes - before <= 5


async def test_a_connection_buffers_so_much_and_no_more(pair) -> None:
    """64 streams × 256 KiB would be 16 MiB: reading stops at the connection's own limit and goes on when it is read."""
    streams = [pair[0].open_stream_nowait() for _ in range(64)]
    there = [await pair[1].accept_stream() for _ in range(64)]
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.write, bytes(256 * 1024))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert pair[1]._buffered_bytes <= 8 * 1024 * 1024 + 128 * 1024
        for stream in there:
            total = 0
            with trio.fail_after(5):
                while total < 256 * 1024:
                    total += len(await stream.read())
    assert pair[1]._buffered_bytes == 0
