"""Our yamux over a pair of in-memory sessions."""

from __future__ import annotations

import contextlib
import os

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.yamux import MuxedStream, Muxer
from kaisar_p2p.mesh.transport.yamux_frames import ACK, HEADER, PING, WINDOW, ProtocolViolation


class Session:
    """What a muxer uses of a Noise session, over a memory stream."""

    def __init__(self, stream: trio.abc.Stream, is_initiator: bool) -> None:
        self._stream = stream
        self.is_initiator = is_initiator
        self.writes = 0

    async def receive(self, most: int = 65536) -> memoryview:
        try:
            data = await self._stream.receive_some(most)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            data = b""
        if not data:
            raise ConnectionClosedError("closed")
        return memoryview(data)

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
    assert b._received_bytes == 256 * 1024
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
    async with trio.open_nursery() as nursery:
        nursery.start_soon(self_reset_later, b)
        with pytest.raises(MuxedStreamReset), trio.fail_after(5):
            await a.write(bytes(1_000_000))


async def self_reset_later(stream: MuxedStream) -> None:
    await trio.testing.wait_all_tasks_blocked()
    stream.reset_nowait()


async def test_streams_end_with_the_connection(pair) -> None:
    _a, b = await opened(pair)
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
    streams = [pair[0].open_stream_nowait() for _ in range(MeshLimits().streams_per_connection + 16)]
    await trio.testing.wait_all_tasks_blocked()
    refused = sum(stream._was_reset for stream in streams)
    assert refused == 16
    assert pair[1].stream_count == MeshLimits().streams_per_connection


async def test_small_writes_leave_together(pair) -> None:
    a, _b = await opened(pair)
    await trio.testing.wait_all_tasks_blocked()
    before = pair[0]._session.writes
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(a.write, b"x" * 100)
    await trio.testing.wait_all_tasks_blocked()
    assert pair[0]._session.writes - before <= 50  # never header and body apart


async def test_windows_of_a_connection_grow_within_a_budget(pair) -> None:
    streams = [await opened(pair) for _ in range(20)]
    for a, b in streams:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, bytes(2_000_000))
            total = 0
            while total < 2_000_000:
                total += len(await b.read())
    assert sum(b.grown for _, b in streams) == 8 * 1024 * 1024
    for a, _b in streams:
        a.reset_nowait()
    await trio.testing.wait_all_tasks_blocked()
    assert pair[1]._growth_left == 8 * 1024 * 1024


async def test_when_memory_runs_short_the_streams_that_nobody_reads_are_reset(pair) -> None:
    """The 300 MB window flood: what waits stays below the bound, and the connection serves other streams."""
    pair[1].received.most = 9 * 1024 * 1024  # of which a connection may have a third
    async with trio.open_nursery() as nursery:

        async def flood(stream: MuxedStream) -> None:
            with contextlib.suppress(MuxedStreamError):
                await stream.write(bytes(10_000_000))

        for a, _b in [await opened(pair) for _ in range(60)]:
            nursery.start_soon(flood, a)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 2 * 1024 * 1024 < pair[1].received.held <= 3 * 1024 * 1024 + 60 * 64 * 1024
        small, there = await opened(pair)
        await small.write(b"x")
        with trio.fail_after(5):
            assert await there.read() == b"x"
        nursery.cancel_scope.cancel()
    await pair[0].close()
    await pair[1].event_closed.wait()
    assert pair[1].received.held == pair[1].unread_bytes == 0


async def test_small_writes_share_frames(pair) -> None:
    a, b = await opened(pair)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_small, a, 2000)
            got = b""
            while len(got) < 200_000:
                got += await b.read()
    assert got == b"".join(n.to_bytes(4, "big") * 25 for n in range(2000))
    assert pair[1]._parser.frames < 200


async def send_small(stream: MuxedStream, count: int) -> None:
    for n in range(count):
        await stream.write(n.to_bytes(4, "big") * 25)


async def test_writers_are_held_back(pair) -> None:
    """By the queue when the link is stuck, whatever window the peer granted."""
    streams = [(await opened(pair))[0] for _ in range(40)]
    pair[0]._session.write = never
    written = [0]

    async def flood(stream: MuxedStream) -> None:
        stream.add_allowance(1 << 30)
        while True:
            await stream.write(bytes(1024))
            written[0] += 1024

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(flood, stream)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 1 << 20 <= written[0] <= (1 << 20) + 262_144 + 40 * 5 * 1024
        nursery.cancel_scope.cancel()


async def never(_data: bytes) -> None:
    await trio.sleep_forever()


async def test_tiny_frames_take_no_more_memory_than_their_bytes(pair) -> None:
    a, b = await opened(pair)
    for _ in range(30_000):
        b.accept_data(memoryview(b"x"))
    assert len(b._received) == 1
    assert b._received_bytes == 30_000
    assert await b.read(10) == b"x" * 10
    b.accept_data(memoryview(b"y"))
    assert await b.read() == b"x" * 29_990 + b"y"
    a.reset_nowait()


async def test_what_is_given_back_is_read_again(pair) -> None:
    a, b = await opened(pair)
    await a.write(b"hello world")
    assert await b.read(5) == b"hello"
    b.unread(b"llo")
    assert pair[1].received.held == 9
    assert await b.read() == b"llo world"
    assert pair[1].received.held == 0


async def test_everything_queued_leaves_before_the_goodbye(pair) -> None:
    a, b = await opened(pair)
    async with trio.open_nursery() as nursery:
        await a.write(bytes(100_000))
        nursery.start_soon(pair[0].close)
        assert len(await read_until_end(b)) == 100_000
    assert pair[1].violation is None


async def read_until_end(stream: MuxedStream) -> bytes:
    data = b""
    with contextlib.suppress(MuxedStreamEOF, MuxedStreamReset), trio.fail_after(5):
        while True:
            data += await stream.read()
    return data


async def test_a_newcomer_overtakes_a_bulk_transfer(pair) -> None:
    bulk, _ = await opened(pair)
    small, _there = await opened(pair)
    outbox = pair[0]._outbox
    bulk._queue(bytes(250_000))
    outbox.take()  # what is being written when the newcomer comes
    bulk._queue(bytes(1000))
    small._queue(b"urgent")
    assert b"urgent" in outbox.take()[:100]


async def test_bulk_transfers_take_turns(pair) -> None:
    outbox = pair[0]._outbox
    streams = [(await opened(pair))[0] for _ in range(3)]
    for stream in streams:
        stream._queue(bytes(250_000))
    for _ in range(6):
        outbox.sent(len(outbox.take()), 0.001)
    left = [stream.outgoing_bytes for stream in streams]
    assert max(left) - min(left) <= 64 * 1024 + 12


async def test_a_slow_link_gets_small_batches_and_a_quick_one_large(pair) -> None:
    stream, _ = await opened(pair)
    outbox = pair[0]._outbox
    stream.add_allowance(1 << 30)
    for _ in range(6):
        stream._queue(bytes(300_000))
        outbox.sent(len(outbox.take()), 0.001)
    assert len(outbox.take()) > 250_000
    for _ in range(6):
        stream._queue(bytes(300_000))
        outbox.sent(len(outbox.take()), 0.3)
    assert len(outbox.take()) <= 16 * 1024 + 12


async def test_a_flood_of_pings_gets_one_answer_at_a_time(pair) -> None:
    for number in range(1000):
        pair[0]._on_ping(1, number)
    assert pair[0]._outbox.take() == HEADER.pack(0, PING, ACK, 0, 999)


async def test_a_broken_frame_is_told(pair) -> None:
    pair[0].enqueue(HEADER.pack(7, 0, 0, 0, 0))
    with trio.fail_after(5):
        await pair[1].event_closed.wait()
    assert isinstance(pair[1].violation, ProtocolViolation)
    assert pair[0].violation is None


async def test_more_than_the_window_is_a_violation(pair) -> None:
    a, _ = await opened(pair)
    a.add_allowance(1 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_and_suppress, a)
        with trio.fail_after(5):
            await pair[1].event_closed.wait()
    assert isinstance(pair[1].violation, ProtocolViolation)


async def write_and_suppress(stream: MuxedStream) -> None:
    with contextlib.suppress(MuxedStreamError):
        await stream.write(bytes(300_000))


async def test_a_peer_that_sends_too_many_frames_is_read_slowly(autojump_clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    muxer = Muxer(Session(left, True), b"peer", limits=MeshLimits(frames_per_s=1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.start)
        began = trio.current_time()
        await right.send_all(HEADER.pack(0, WINDOW, 0, 99, 0) * 4000)
        await muxer_read(muxer, 48_000)
        await right.send_all(HEADER.pack(0, WINDOW, 0, 99, 0))
        await muxer_read(muxer, 48_012)
        assert trio.current_time() - began >= 2
        nursery.cancel_scope.cancel()


async def muxer_read(muxer: Muxer, count: int) -> None:
    while muxer.received_bytes < count:  # noqa: ASYNC110  (nothing tells of it)
        await trio.sleep(0.01)


async def test_tiny_writes_let_other_tasks_run(pair) -> None:
    a, _ = await opened(pair)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(10_000):
            await a.write(b"x")
        nursery.cancel_scope.cancel()
    assert turns >= 50
