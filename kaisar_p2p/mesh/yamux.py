"""Yamux: many streams over one encrypted connection (https://github.com/hashicorp/yamux/blob/master/spec.md).

Replaces the library's muxer, whose receive windows are not enforced (a peer can fill our memory), which has no
limit of streams and sends a window update for every read. Here one task reads, one writes whatever has gathered
meanwhile, one sends pings.

What a peer can cost: `streams_per_connection` streams, the window of each until somebody reads it, and all peers
together `buffered_bytes`: above that, streams that nobody reads are reset. Whoever breaks the framing or a window loses
the connection.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType

import trio

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.limits import MeshLimits, TokenBucket
from kaisar_p2p.mesh.noise import NoiseSession

from libp2p.abc import IMuxedConn, IMuxedStream  # isort: skip
from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.stream_muxer.exceptions import (  # isort: skip
    MuxedConnUnavailable,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr  # isort: skip

log = logging.getLogger(__name__)

_HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
_DATA, _WINDOW, _PING, _GO_AWAY = 0, 1, 2, 3
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_FIRST_WINDOW = 256 * 1024  # given to every stream by the specification
_LARGEST_WINDOW = 1024 * 1024  # grown to while the reader keeps up
_FRAME_BYTES = 64 * 1024 - 1
_QUEUED_BYTES = 512 * 1024  # writers wait above this
_GROWN_BYTES = 8 * 1024 * 1024  # that the windows of one connection may grow in all
_SMALL_BACKLOG = 64 * 1024  # a stream with less is not the one to blame when memory runs short
_LINGER_S = 30.0  # a stream that we closed and the peer did not


class ProtocolViolation(Exception):
    """The peer broke yamux; its connection ends."""


@dataclass
class ReceivedBytes:
    """Bytes received and not read yet, of all connections of a node together."""

    most: int
    held: int = 0

    @property
    def too_many(self) -> bool:
        """More than the node wants to hold."""
        return self.held > self.most


class MuxedStream(IMuxedStream):
    """One stream. Reading and writing may happen in different tasks; each write is atomic."""

    def __init__(self, connection: Muxer, stream_id: int) -> None:
        self.muxed_conn = connection
        self.stream_id = stream_id
        self._connection = connection
        self._received = bytearray()
        self._window = _FIRST_WINDOW  # size of the receive window
        self._credit = _FIRST_WINDOW  # what the peer may still send
        self._allowance = _FIRST_WINDOW  # what we may still send
        self._eof = self._was_reset = self._closed = False
        self._counted = True  # in the node's bytes held
        self._discard_until: float | None = None
        self._readable: trio.Event | None = None
        self._writable: trio.Event | None = None
        self._write_lock = trio.Lock()

    @property
    def grown(self) -> int:
        """What the receive window has grown since the stream was opened."""
        return self._window - _FIRST_WINDOW

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`; raises MuxedStreamEOF at the end and MuxedStreamReset after a reset."""
        received = self._received
        if received:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not received:
            if self._was_reset:
                raise MuxedStreamReset("the stream was reset")
            if self._eof or self._discard_until is not None:
                raise MuxedStreamEOF("the stream has ended")
            if self._readable is None:
                self._readable = trio.Event()
            await self._readable.wait()
        if n is None or n < 0 or n >= len(received):
            data = bytes(received)
            received.clear()
        else:
            data = bytes(received[:n])
            del received[:n]
        self._uncount(len(data))
        self._reopen_window()
        return data

    def _reopen_window(self) -> None:
        if self._eof or self._was_reset or self._discard_until is not None:
            return
        used = self._window - self._credit - len(self._received)
        if used >= self._window // 2:
            self._window += self._connection.grow(min(self._window, _LARGEST_WINDOW - self._window))
            more = self._window - self._credit - len(self._received)
            self._credit += more
            self._connection.enqueue(_HEADER.pack(0, _WINDOW, 0, self.stream_id, more))

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, waiting for the peer's window; raises MuxedStreamError when the stream is over."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._write_lock.acquire_nowait()  # the awaited form gives way to other tasks even when it is free
        except trio.WouldBlock:
            await self._write_lock.acquire()
        try:
            view = memoryview(bytes(data))
            while view:
                self._check_writable()
                if self._allowance <= 0:
                    await self._wait_for_window()
                    continue
                size = min(self._allowance, _FRAME_BYTES, len(view))
                self._allowance -= size
                self._connection.enqueue(_HEADER.pack(0, _DATA, 0, self.stream_id, size), view[:size])
                view = view[size:]
                await self._connection.drained()
            self._check_writable()
        finally:
            self._write_lock.release()

    def write_nowait(self, data: bytes) -> bool:
        """Send all of `data` if that needs no waiting; False, and nothing sent, otherwise."""
        size = len(data)
        if (
            size > min(self._allowance, _FRAME_BYTES)
            or self._closed
            or self._connection.congested
            or self._write_lock.locked()
        ):
            return False
        self._allowance -= size
        self._connection.enqueue(_HEADER.pack(0, _DATA, 0, self.stream_id, size), data)
        return True

    def _check_writable(self) -> None:
        if self._was_reset:
            raise MuxedStreamReset("the stream was reset")
        if self._closed:
            raise MuxedStreamError("the stream is closed for sending")

    async def _wait_for_window(self) -> None:
        if self._writable is None:
            self._writable = trio.Event()
        await self._writable.wait()

    async def close_write(self) -> None:
        """Tell the peer that nothing more comes; reading goes on."""
        self._send_fin()
        await trio.lowlevel.checkpoint()

    def _send_fin(self) -> None:
        if not self._closed:
            self._closed = True
            self._connection.enqueue(_HEADER.pack(0, _WINDOW, _FIN, self.stream_id, 0))
            if self._eof:
                self._connection.forget(self)

    async def close(self) -> None:
        """Finish sending and read no more; the stream is gone when the peer has finished too, or `_LINGER_S` later."""
        self._send_fin()
        if not self._eof and not self._was_reset:
            self._discard_until = trio.current_time() + _LINGER_S
        self._drop_received()
        self.wake()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """End the stream at once in both directions."""
        self.reset_nowait()
        await trio.lowlevel.checkpoint()

    def reset_nowait(self) -> None:
        """`reset` without a checkpoint."""
        if not self._was_reset and not (self._closed and self._eof):
            self._connection.enqueue(_HEADER.pack(0, _WINDOW, _RST, self.stream_id, 0))
        self.end_reset()
        self._drop_received()

    def end_reset(self) -> None:
        """The stream was reset, by either side or with its connection."""
        self._was_reset = self._closed = True
        self._connection.forget(self)
        self.wake()

    def end_received(self) -> None:
        """The peer finished sending."""
        self._eof = True
        if self._closed:
            self._connection.forget(self)
        self.wake()

    def accept_data(self, data: bytearray) -> None:
        """Bytes from the peer, already counted against its window."""
        if self._discard_until is not None or self._was_reset:
            return
        self._received += data
        memory = self._connection.received
        memory.held += len(data)
        if memory.too_many and len(self._received) > _SMALL_BACKLOG:
            log.warning("stream of %s reset: too much is waiting to be read", self._connection.peer_id)
            self.reset_nowait()
        if self._readable is not None:
            self._readable.set()
            self._readable = None

    def spend_credit(self, size: int) -> None:
        """Count `size` bytes against what the peer may send."""
        self._credit -= size
        if self._credit < 0:
            raise ProtocolViolation("data beyond the receive window")

    def add_allowance(self, size: int) -> None:
        """The peer can take `size` bytes more."""
        self._allowance = min(self._allowance + size, 1 << 32)
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    def expired(self, now: float) -> bool:
        """We closed, the peer did not, and it has had its time."""
        return self._discard_until is not None and now > self._discard_until

    def wake(self) -> None:
        """Let waiting readers and writers look at the state again."""
        for event in (self._readable, self._writable):
            if event is not None:
                event.set()
        self._readable = self._writable = None

    def _drop_received(self) -> None:
        self._uncount(len(self._received))
        self._received.clear()

    def _uncount(self, size: int) -> None:
        if self._counted:
            self._connection.received.held -= size

    def end_with_connection(self) -> None:
        """The connection is over: what has arrived can be read, but nobody waits for memory because of it."""
        self._uncount(len(self._received))
        self._counted = False
        self.end_reset()

    def set_deadline(self, ttl: int) -> None:
        """Deadlines are cancel scopes of the caller."""
        raise NotImplementedError("use trio.fail_after")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        return self._connection.get_remote_address()

    async def __aenter__(self) -> MuxedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Muxer(IMuxedConn):
    """A connection that carries streams. `start` runs it and returns when it has ended."""

    def __init__(
        self,
        session: NoiseSession,
        peer_id: ID,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
        *,
        limits: MeshLimits | None = None,
        received: ReceivedBytes | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.on_close = on_close  # part of the library's interface
        self.event_started, self.event_closed = trio.Event(), trio.Event()
        self.rtt_s: float | None = None
        self.received_bytes = self.sent_bytes = 0
        self.last_received = 0.0  # trio time
        self._limits = limits or MeshLimits()
        self.received = received or ReceivedBytes(self._limits.buffered_bytes)
        self._session = session
        self._initiator = session.is_initiator if is_initiator is None else is_initiator
        self._next_id = 1 if self._initiator else 2
        self._streams: dict[int, MuxedStream] = {}
        self._inbound = 0
        self._opens: TokenBucket | None = None
        self._accept_send, self._accept_receive = trio.open_memory_channel[MuxedStream](
            self._limits.streams_per_connection
        )
        self._queue: list[bytes | memoryview] = []
        self._queued_bytes = 0
        self._growth_left = _GROWN_BYTES
        self._queue_filled: trio.Event | None = None
        self._queue_drained: trio.Event | None = None
        self._emptied: trio.Event | None = None
        self._scope: trio.CancelScope | None = None
        self._ended = False
        self._ping_id, self._ping_sent = 0, 0.0

    # -- the library's view -------------------------------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """We dialed."""
        return self._initiator

    @property
    def is_closed(self) -> bool:
        """The connection has ended."""
        return self.event_closed.is_set()

    @property
    def is_established(self) -> bool:
        """The connection carries streams."""
        return self.event_started.is_set() and not self._ended

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        return self._session.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The peer's address as a multiaddr."""
        return self._session.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self._session.get_connection_type()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run until the connection ends; never raises but for cancellation."""
        now = trio.current_time()
        self.last_received = now
        self._opens = TokenBucket(self._limits.opens_per_s, self._limits.opens_burst, now)
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._end_with, self._write_loop)
                nursery.start_soon(self._end_with, self._ping_loop)
                self.event_started.set()
                await self._end_with(self._read_loop)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self._end()

    async def _end_with(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run one of the loops; whichever ends, ends the connection."""
        try:
            await loop()
        except Exception as error:  # noqa: BLE001  (the edge: a peer's bytes end its connection, nothing else)
            log.debug("connection with %s ends: %r", self.peer_id, error)
        assert self._scope is not None
        self._scope.cancel()

    async def _end(self) -> None:
        self._ended = True
        self._accept_send.close()
        for stream in list(self._streams.values()):
            stream.end_with_connection()
        self._queue.clear()
        if self._queue_drained is not None:
            self._queue_drained.set()
        try:
            await self._session.close()
        except Exception as error:  # noqa: BLE001  (the socket may be gone already)
            log.debug("closing the connection with %s: %r", self.peer_id, error)
        self.event_closed.set()

    async def close(self) -> None:
        """Say goodbye, give it a moment to leave, and end the connection."""
        if self._scope is None or self._ended:
            return
        self.enqueue(_HEADER.pack(0, _GO_AWAY, 0, 0, 0))
        with trio.move_on_after(0.2):
            while self._queue and not self._ended:
                self._queue_drained = self._queue_drained or trio.Event()
                await self._queue_drained.wait()
        self._scope.cancel()
        with trio.move_on_after(2):
            await self.event_closed.wait()

    def abort(self) -> None:
        """End the connection at once."""
        if self._scope is not None:
            self._scope.cancel()

    # -- sending ------------------------------------------------------------------------------------------------------

    def enqueue(self, *parts: bytes | memoryview) -> None:
        """Queue bytes for the writer task."""
        if self._ended:
            return
        for part in parts:
            self._queue.append(part)
            self._queued_bytes += len(part)
        if self._queue_filled is not None:
            self._queue_filled.set()
            self._queue_filled = None

    @property
    def congested(self) -> bool:
        """More than enough is queued, or the connection has ended."""
        return self._queued_bytes > _QUEUED_BYTES or self._ended

    async def drained(self) -> None:
        """Wait while more than enough is queued."""
        while self._queued_bytes > _QUEUED_BYTES and not self._ended:
            if self._queue_drained is None:
                self._queue_drained = trio.Event()
            await self._queue_drained.wait()

    async def _write_loop(self) -> None:
        while True:
            if not self._queue:
                self._queue_filled = trio.Event()
                await self._queue_filled.wait()
            batch, self._queue, size, self._queued_bytes = self._queue, [], self._queued_bytes, 0
            await self._session.write(b"".join(batch))
            self.sent_bytes += size
            if self._queue_drained is not None:
                self._queue_drained.set()
                self._queue_drained = None

    async def _ping_loop(self) -> None:
        interval_s = self._limits.keepalive_s
        while True:
            planned = trio.current_time() + interval_s
            await trio.sleep_until(planned)
            now = trio.current_time()
            we_were_busy = now - planned > interval_s / 2  # then what the peer sent has not been read yet
            if now - self.last_received > 3 * interval_s and not we_were_busy:
                raise ProtocolViolation(f"silent for {3 * interval_s:.0f} s")
            for stream in [stream for stream in self._streams.values() if stream.expired(now)]:
                stream.reset_nowait()
            self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
            self._ping_sent = now
            self.enqueue(_HEADER.pack(0, _PING, _SYN, 0, self._ping_id))

    # -- receiving ----------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        data = self._session.plaintext
        while True:
            used = self._read_frames(data)
            if used:
                del data[:used]
            await self.drained()  # a peer that makes us answer but does not read is not read either
            await self._session.fill()
            self.last_received = trio.current_time()

    _body_left = 0  # bytes of the current data frame that have not arrived
    _body_stream: MuxedStream | None = None
    _body_flags = 0

    def _read_frames(self, data: bytearray) -> int:
        """Act on all that has arrived; the number of bytes used."""
        offset, size = 0, len(data)
        while True:
            if self._body_left:
                part = min(self._body_left, size - offset)
                if part and self._body_stream is not None:
                    self._body_stream.accept_data(data[offset : offset + part])
                offset += part
                self._body_left -= part
                if self._body_left:
                    break
                self._finish_flags(self._body_stream, self._body_flags)
            if size - offset < 12:
                break
            self._read_header(*_HEADER.unpack_from(data, offset))
            offset += 12
        self.received_bytes += offset
        return offset

    def _read_header(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version != 0 or kind > _GO_AWAY:
            raise ProtocolViolation(f"frame of version {version} and type {kind}")
        if kind == _PING:
            self._on_ping(flags, length)
        elif kind == _GO_AWAY:
            raise ProtocolViolation("the peer said goodbye")
        else:
            stream = self._accept(stream_id) if flags & _SYN else self._streams.get(stream_id)
            if kind == _DATA:
                if stream is not None:
                    stream.spend_credit(length)
                elif length > _LARGEST_WINDOW:
                    raise ProtocolViolation("data beyond any window")
                self._body_left, self._body_stream, self._body_flags = length, stream, flags
                if not length:
                    self._finish_flags(stream, flags)
            elif stream is not None:
                if length:
                    stream.add_allowance(length)
                self._finish_flags(stream, flags)

    def _finish_flags(self, stream: MuxedStream | None, flags: int) -> None:
        if stream is None:
            return
        if flags & _RST:
            stream.end_reset()
        elif flags & _FIN:
            stream.end_received()

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & _SYN:
            self.enqueue(_HEADER.pack(0, _PING, _ACK, 0, value))
        elif flags & _ACK and value == self._ping_id:
            self.rtt_s = trio.current_time() - self._ping_sent

    # -- streams ------------------------------------------------------------------------------------------------------

    def _accept(self, stream_id: int) -> MuxedStream | None:
        """A stream that the peer opens; None, and a reset, when it may not."""
        if stream_id == 0 or (stream_id & 1) == (self._next_id & 1) or stream_id in self._streams:
            raise ProtocolViolation(f"stream id {stream_id} is not the peer's to open")
        assert self._opens is not None
        allowed = self._opens.try_take(1, trio.current_time())
        if not allowed or self._inbound >= self._limits.streams_per_connection:
            self.enqueue(_HEADER.pack(0, _WINDOW, _RST, stream_id, 0))
            return None
        stream = MuxedStream(self, stream_id)
        try:
            self._accept_send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError):
            self.enqueue(_HEADER.pack(0, _WINDOW, _RST, stream_id, 0))
            return None
        self._streams[stream_id] = stream
        self._inbound += 1
        self.enqueue(_HEADER.pack(0, _WINDOW, _ACK, stream_id, 0))
        return stream

    def grow(self, size: int) -> int:
        """How much of `size` a stream's window may grow."""
        granted = min(size, self._growth_left)
        self._growth_left -= granted
        return granted

    def forget(self, stream: MuxedStream) -> None:
        """Both sides are done with the stream."""
        known = self._streams.pop(stream.stream_id, None)
        if known is not None:
            self._growth_left += stream.grown
        if not self._streams and self._emptied is not None:
            self._emptied.set()
        if known is not None and (stream.stream_id & 1) != (self._next_id & 1):
            self._inbound -= 1

    async def wait_without_streams(self) -> None:
        """Wait until no stream is open."""
        while self._streams and not self._ended:
            self._emptied = trio.Event()
            await self._emptied.wait()

    @property
    def stream_count(self) -> int:
        """Streams that are not over."""
        return len(self._streams)

    async def open_stream(self) -> MuxedStream:
        """Open a stream to the peer."""
        stream = self.open_stream_nowait()
        await trio.lowlevel.checkpoint()
        return stream

    def open_stream_nowait(self) -> MuxedStream:
        """`open_stream` without a checkpoint."""
        if self._ended or not self.event_started.is_set():
            raise MuxedConnUnavailable("the connection has ended")
        stream = MuxedStream(self, self._next_id)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self.enqueue(_HEADER.pack(0, _WINDOW, _SYN, stream.stream_id, 0))
        return stream

    async def accept_stream(self) -> MuxedStream:
        """The next stream that the peer opened; raises MuxedConnUnavailable at the end of the connection."""
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection has ended") from None
