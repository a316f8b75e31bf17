"""Yamux: many streams over one encrypted connection (https://github.com/hashicorp/yamux/blob/master/spec.md).

Replaces the library's muxer, whose receive windows are not enforced (a peer can fill our memory), which has no
limit of streams and sends a window update for every read. Here one task reads, one writes whatever has gathered
meanwhile, and one of the whole node (`keepalive`) looks after silent peers.

What a peer can cost: `streams_per_connection` streams, the window of each until somebody reads it, and all peers
together `buffered_bytes`: above that, streams that nobody reads are reset. Whoever breaks the framing or a window loses
the connection, with a `violation`; whoever does not read what we send for `send_stall_s` loses it too.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.failure_log import FailureLog
from kaisar_p2p.mesh.limits import MeshLimits, TokenBucket
from kaisar_p2p.mesh.transport.keepalive import Keeper, Liveness
from kaisar_p2p.mesh.transport.noise import READ_BYTES, NoiseSession
from kaisar_p2p.mesh.transport.yamux_frames import (
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
    FrameParser,
    ProtocolViolation,
)
from kaisar_p2p.mesh.transport.yamux_outbox import Outbox, SendingBytes
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream, ReceivedBytes

from libp2p.abc import IMuxedConn  # isort: skip
from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable  # isort: skip
from multiaddr import Multiaddr  # isort: skip

log = logging.getLogger(__name__)
failures = FailureLog(log)

__all__ = ["MuxedStream", "Muxer", "ProtocolViolation"]

_GROWN_BYTES = 8 * 1024 * 1024  # that the windows of one connection may grow in all
_FIRST_READ_BYTES = 64 * 1024
_DENSE_READ_BYTES = 16 * 1024  # of a peer that sends tiny frames: other tasks have their turn after so many
_DENSE_FRAME_BYTES = 256
_LAST_STREAM = 0xFFFFFFFF  # ids are never used again
_GOODBYE_S = 0.2  # for what is queued to leave before we close


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
        sending: SendingBytes | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.on_close = on_close  # part of the library's interface
        self.event_started, self.event_closed = trio.Event(), trio.Event()
        self.received_bytes = self.sent_bytes = 0
        self.last_received = 0.0  # trio time
        self.tend_at = 0.0  # trio time
        self.violation: ProtocolViolation | None = None  # why the connection ended, when that was the peer's fault
        self.on_stream: Callable[[MuxedStream], object] | None = None  # takes inbound streams, or `accept_stream` does
        self._limits = limits or MeshLimits()
        self.received = received or ReceivedBytes(self._limits.buffered_bytes)
        self.unread_bytes = 0  # of our part of them
        self._session = session
        self._initiator = session.is_initiator if is_initiator is None else is_initiator
        self._next_id = 1 if self._initiator else 2
        self._streams: dict[int, MuxedStream] = {}
        self._lingering: set[MuxedStream] = set()
        self._inbound = 0
        self._opens = TokenBucket(self._limits.opens_per_s, self._limits.opens_burst, 0.0)
        self._accepted: tuple[trio.MemorySendChannel[MuxedStream], trio.MemoryReceiveChannel[MuxedStream]] | None = None
        self._sending = sending or SendingBytes(self._limits.sending_bytes)
        self._outbox = Outbox(self._sending)
        self._parser = FrameParser(self)
        self._body_stream: MuxedStream | None = None
        self._body_flags = 0
        self._growth_left = _GROWN_BYTES
        self._emptied: trio.Event | None = None
        self._scope: trio.CancelScope | None = None
        self._ended = False
        self._keeper = keeper
        self._on_doubtful: Callable[[], None] = lambda: None
        self._liveness = Liveness(self._limits.keepalive_s, self._limits.send_stall_s)

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

    @property
    def rtt_s(self) -> float | None:
        """Of the last ping that came back."""
        return self._liveness.rtt_s

    def be_impatient(self, on_doubtful: Callable[[], None]) -> None:
        """Find out in seconds that nothing is answered any more, and say so again and again: there may be another way
        to the peer."""
        self._liveness.impatient = True
        self._on_doubtful = on_doubtful

    @property
    def is_doubtful(self) -> bool:
        """A ping is late: whoever has another way to the peer had better take it."""
        return self._liveness.is_doubtful(trio.current_time(), self.last_received)

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
        self.last_received = trio.current_time()
        self._liveness.begin(self.last_received, dialed=self._initiator)
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._end_with, self._write_loop)
                self._sending.senders.add(self)
                if self._keeper is not None:
                    self._keeper.add(self)
                self.event_started.set()
                await self._end_with(self._read_loop)
        finally:
            self._sending.senders.discard(self)
            if self._keeper is not None:
                self._keeper.discard(self)
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self._end()

    async def _end_with(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run one of the loops; whichever ends, ends the connection."""
        try:
            await loop()
        except ProtocolViolation as error:
            self.violation = self.violation or error
            log.debug("connection with %s ends: %s", self.peer_id, error)
        except Exception as error:  # noqa: BLE001  (the edge: a peer's bytes end its connection, nothing else)
            log.debug("connection with %s ends: %r", self.peer_id, error)
        self.abort()

    async def _end(self) -> None:
        self._ended = True
        if self._accepted is not None:
            self._accepted[0].close()
        self._outbox.close()
        for stream in list(self._streams.values()):
            stream.end_with_connection()
        try:
            await self._session.close()
        except Exception as error:  # noqa: BLE001  (the socket may be gone already)
            log.debug("closing the connection with %s: %r", self.peer_id, error)
        self.event_closed.set()

    async def close(self) -> None:
        """Say goodbye, give it a moment to leave, and end the connection."""
        if self._scope is None or self._ended:
            return
        with trio.move_on_after(_GOODBYE_S):
            await self._outbox.emptied()
            self.enqueue(HEADER.pack(0, GO_AWAY, 0, 0, 0))
            await self._outbox.emptied()
        self._scope.cancel()
        with trio.move_on_after(2):
            await self.event_closed.wait()

    def abort(self) -> None:
        """End the connection at once."""
        if self._scope is not None:
            self._scope.cancel()

    def tend(self, now: float) -> None:
        """Called by the keeper every now and then: ping a silent peer, give up a dead one."""
        verdict = self._liveness.look(now, self.last_received)
        if verdict is not None:
            log.debug("connection with %s ends: %s", self.peer_id, verdict)
            self.abort()
            return
        if self._liveness.impatient and self._liveness.is_doubtful(now, self.last_received):
            self._on_doubtful()
        ping = self._liveness.ping_due(now, self.last_received)
        if ping is not None:
            frame = HEADER.pack(0, PING, SYN, 0, ping)
            if not (self._outbox.idle and self._send_soon(frame)):
                self.enqueue(frame)
        for stream in [stream for stream in self._lingering if stream.expired(now)]:
            stream.reset_nowait()
        self.tend_at = self._liveness.next_look(now, self.last_received)

    # -- sending ------------------------------------------------------------------------------------------------------

    def enqueue(self, frame: bytes) -> None:
        """Send a control frame, ahead of all data."""
        self._outbox.control(frame)

    def _send_soon(self, frame: bytes) -> bool:
        """Send a ping or its answer, without waking the writer, which is idle; False: the writer has to send it.

        When all is quiet, this is what connections cost.
        """
        try:
            if not self._session.write_soon(frame):
                return False
        except ConnectionOver:  # the writer ends it
            return False
        self.sent_bytes += len(frame)
        return True

    def _answer_ping(self) -> None:
        frame = self._outbox.take_pong()
        if frame is not None and not self._send_soon(frame):
            self._outbox.pong(frame)
            self._outbox.flush()

    def schedule(self, stream: MuxedStream, size: int) -> None:
        """`stream` has `size` bytes more, or its end, to send."""
        self._outbox.add(stream, size)

    def unschedule(self, size: int) -> None:
        """A stream dropped so much of what it had to send."""
        self._outbox.remove(size)

    @property
    def crowded(self) -> bool:
        """So much is queued that streams with something queued have to wait."""
        return self._outbox.crowded

    def wake_when_uncrowded(self, stream: MuxedStream) -> None:
        """Let the stream's writer look again when less is queued."""
        self._outbox.waiting.add(stream)

    @property
    def held_bytes(self) -> int:
        """Written to our streams and not taken by the system."""
        return self._outbox.held_bytes

    def stuck_s(self, now: float) -> float:
        """For how long the system has not taken what we write."""
        return 0.0 if self._liveness.write_began is None else now - self._liveness.write_began

    def give_way(self) -> None:
        """End: others need the memory."""
        failures.warning("connection with %s ends: it does not read, and too much waits to be sent", self.peer_id)
        self.abort()

    async def _write_loop(self) -> None:
        outbox, session, liveness = self._outbox, self._session, self._liveness
        while True:
            data = await outbox.next_batch()
            began = liveness.write_began = trio.current_time()
            if liveness.unanswered_since <= self.last_received:
                liveness.unanswered_since = began
            await session.write(data)
            liveness.write_began = None
            outbox.sent(len(data), trio.current_time() - began)
            self.sent_bytes += len(data)

    # -- receiving ----------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        session, parser = self._session, self._parser
        now = trio.current_time()
        frames = TokenBucket(self._limits.frames_per_s, self._limits.frames_per_s, now)
        most = _FIRST_READ_BYTES
        await trio.lowlevel.checkpoint()  # who waits for `event_started` comes before the first stream
        while True:
            data = await session.receive(most)
            self.last_received = now = trio.current_time()
            size = len(data)
            self.received_bytes += size
            before = parser.frames
            self.feed(data)
            data.release()
            if self._outbox.answering:
                self._answer_ping()
            if self._outbox.unflushed:
                await trio.lowlevel.checkpoint()  # the new streams' handlers may answer at once
                self._outbox.flush()
            count = parser.frames - before
            most = _DENSE_READ_BYTES if size < count * _DENSE_FRAME_BYTES else min(READ_BYTES, 2 * most)
            debt_s = frames.take(count, now)
            if debt_s:
                await trio.sleep(debt_s)
            if self._outbox.control_congested:  # a peer that makes us answer but does not read is not read either
                await self._outbox.control_sent()

    def feed(self, data: memoryview) -> None:
        """Act on bytes of the peer; raises ProtocolViolation and ConnectionOver, and nothing else."""
        self._parser.feed(data)

    def on_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """A header has arrived; raises ProtocolViolation."""
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
                self._body_stream, self._body_flags = stream, flags
            elif stream is not None:
                if length:
                    stream.add_allowance(length)
                self._finish_flags(stream, flags)

    def on_body(self, body: memoryview) -> None:
        """Part of the body of the last data frame."""
        if self._body_stream is not None:
            self._body_stream.accept_data(body)

    def on_body_end(self) -> None:
        """The last data frame is complete."""
        if self._body_stream is not None:
            self._finish_flags(self._body_stream, self._body_flags)

    def _finish_flags(self, stream: MuxedStream, flags: int) -> None:
        if flags & RST:
            stream.end_reset()
        elif flags & FIN:
            stream.end_received()

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self._outbox.pong(HEADER.pack(0, PING, ACK, 0, value))
        elif flags & ACK:
            self._liveness.on_pong(value, trio.current_time())

    # -- streams ------------------------------------------------------------------------------------------------------

    def _accept(self, stream_id: int) -> MuxedStream | None:
        """A stream that the peer opens; None, and a reset, when it may not."""
        if stream_id == 0 or (stream_id & 1) == (self._next_id & 1) or stream_id in self._streams:
            raise ProtocolViolation(f"stream id {stream_id} is not the peer's to open")
        allowed = self._opens.try_take(1, self.last_received)
        if not allowed or self._inbound >= self._limits.streams_per_connection:
            self.enqueue(HEADER.pack(0, WINDOW, RST, stream_id, 0))
            return None
        self._streams[stream_id] = stream = MuxedStream(self, stream_id)
        self._inbound += 1
        self._outbox.control_later(HEADER.pack(0, WINDOW, ACK, stream_id, 0))
        if self.on_stream is not None:
            self.on_stream(stream)
        else:
            self._offer(stream)
        return stream

    def _offer(self, stream: MuxedStream) -> None:
        try:
            self._accept_channel()[0].send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError):
            stream.reset_nowait()

    def _accept_channel(self) -> tuple[trio.MemorySendChannel[MuxedStream], trio.MemoryReceiveChannel[MuxedStream]]:
        if self._accepted is None:
            send, receive = trio.open_memory_channel[MuxedStream](self._limits.streams_per_connection)
            self._accepted = (send, receive)
        return self._accepted

    def grow(self, size: int) -> int:
        """How much of `size` a stream's window may grow."""
        granted = min(size, self._growth_left)
        self._growth_left -= granted
        return granted

    def linger(self, stream: MuxedStream) -> None:
        """We closed the stream, the peer has not."""
        if stream.stream_id in self._streams:
            self._lingering.add(stream)

    def forget(self, stream: MuxedStream) -> None:
        """Both sides are done with the stream."""
        self._lingering.discard(stream)
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
            if self._emptied is None or self._emptied.is_set():  # several may wait
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
        if self._ended or not self.event_started.is_set() or self._next_id > _LAST_STREAM:
            raise MuxedConnUnavailable("the connection has ended")
        stream = MuxedStream(self, self._next_id)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self.enqueue(HEADER.pack(0, WINDOW, SYN, stream.stream_id, 0))
        return stream

    async def accept_stream(self) -> MuxedStream:
        """The next stream that the peer opened; raises MuxedConnUnavailable at the end of the connection."""
        if self._ended:
            raise MuxedConnUnavailable("the connection has ended")
        try:
            return await self._accept_channel()[1].receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection has ended") from None
