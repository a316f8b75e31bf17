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
from collections.abc import Awaitable, Callable

import trio

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.limits import MeshLimits, TokenBucket
from kaisar_p2p.mesh.noise import NoiseSession, NotAuthentic
from kaisar_p2p.mesh.yamux_stream import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    LARGEST_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW,
    ConnectionOver,
    MuxedStream,
    ProtocolViolation,
    ReceivedBytes,
)

from libp2p.abc import IMuxedConn  # isort: skip
from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable  # isort: skip
from multiaddr import Multiaddr  # isort: skip

log = logging.getLogger(__name__)

_QUEUED_BYTES = 512 * 1024  # writers wait above this
_GROWN_BYTES = 8 * 1024 * 1024  # that the windows of one connection may grow in all


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
        self.violation: ProtocolViolation | NotAuthentic | None = None  # that ended the connection
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
            if isinstance(error, ProtocolViolation | NotAuthentic):
                self.violation = error
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
        self.enqueue(HEADER.pack(0, GO_AWAY, 0, 0, 0))
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
            silent_s = now - self.last_received
            if silent_s > 2.5 * interval_s and not we_were_busy:  # seen when the third ping is due
                raise ConnectionOver(f"silent for {silent_s:.0f} s")
            for stream in [stream for stream in self._streams.values() if stream.expired(now)]:
                stream.reset_nowait()
            self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
            self._ping_sent = now
            self.enqueue(HEADER.pack(0, PING, SYN, 0, self._ping_id))

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
            self._read_header(*HEADER.unpack_from(data, offset))
            offset += 12
        self.received_bytes += offset
        return offset

    def _read_header(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version != 0 or kind > GO_AWAY:
            raise ProtocolViolation(f"frame of version {version} and type {kind}")
        if kind == PING:
            self._on_ping(flags, length)
        elif kind == GO_AWAY:
            raise ConnectionOver("the peer said goodbye")
        else:
            stream = self._accept(stream_id) if flags & SYN else self._streams.get(stream_id)
            if kind == DATA:
                if stream is not None:
                    stream.spend_credit(length)
                elif length > LARGEST_WINDOW:
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
        if flags & RST:
            stream.end_reset()
        elif flags & FIN:
            stream.end_received()

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self.enqueue(HEADER.pack(0, PING, ACK, 0, value))
        elif flags & ACK and value == self._ping_id:
            self.rtt_s = trio.current_time() - self._ping_sent

    # -- streams ------------------------------------------------------------------------------------------------------

    def _accept(self, stream_id: int) -> MuxedStream | None:
        """A stream that the peer opens; None, and a reset, when it may not."""
        if stream_id == 0 or (stream_id & 1) == (self._next_id & 1) or stream_id in self._streams:
            raise ProtocolViolation(f"stream id {stream_id} is not the peer's to open")
        assert self._opens is not None
        allowed = self._opens.try_take(1, trio.current_time())
        if not allowed or self._inbound >= self._limits.streams_per_connection:
            self.enqueue(HEADER.pack(0, WINDOW, RST, stream_id, 0))
            return None
        stream = MuxedStream(self, stream_id)
        try:
            self._accept_send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError):
            self.enqueue(HEADER.pack(0, WINDOW, RST, stream_id, 0))
            return None
        self._streams[stream_id] = stream
        self._inbound += 1
        self.enqueue(HEADER.pack(0, WINDOW, ACK, stream_id, 0))
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

    @property
    def outbound_count(self) -> int:
        """Streams that we opened and that are not over."""
        return len(self._streams) - self._inbound

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
        self.enqueue(HEADER.pack(0, WINDOW, SYN, stream.stream_id, 0))
        return stream

    async def accept_stream(self) -> MuxedStream:
        """The next stream that the peer opened; raises MuxedConnUnavailable at the end of the connection."""
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection has ended") from None
