"""One stream of yamux: its windows, its buffers, its end. The connection it belongs to is in `yamux`."""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)

from libp2p.abc import IMuxedStream  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset  # isort: skip

if TYPE_CHECKING:
    from kaisar_p2p.mesh.yamux import Muxer

log = logging.getLogger(__name__)

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
FIRST_WINDOW = 256 * 1024  # given to every stream by the specification
LARGEST_WINDOW = 1024 * 1024  # grown to while the reader keeps up
FRAME_BYTES = 64 * 1024 - 1
_SMALL_BACKLOG = 64 * 1024  # a stream with less is not the one to blame when memory runs short
_LINGER_S = 30.0  # a stream that we closed and the peer did not


class ProtocolViolation(Exception):
    """The peer broke yamux; its connection ends, and its account is charged."""


class ConnectionOver(Exception):
    """The connection ends, and nobody is to blame."""


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
        self._window = FIRST_WINDOW  # size of the receive window
        self._credit = FIRST_WINDOW  # what the peer may still send
        self._allowance = FIRST_WINDOW  # what we may still send
        self._eof = self._was_reset = self._closed = False
        self._counted = True  # in the node's bytes held
        self._discard_until: float | None = None
        self.waiting_since = 0.0  # trio time at which the oldest byte of the last read had arrived
        self._readable: trio.Event | None = None
        self._writable: trio.Event | None = None
        self._write_lock = trio.Lock()

    @property
    def grown(self) -> int:
        """What the receive window has grown since the stream was opened."""
        return self._window - FIRST_WINDOW

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
            self._window += self._connection.grow(min(self._window, LARGEST_WINDOW - self._window))
            more = self._window - self._credit - len(self._received)
            self._credit += more
            self._connection.enqueue(HEADER.pack(0, WINDOW, 0, self.stream_id, more))

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
                size = min(self._allowance, FRAME_BYTES, len(view))
                self._allowance -= size
                self._connection.enqueue(HEADER.pack(0, DATA, 0, self.stream_id, size), view[:size])
                view = view[size:]
                await self._connection.drained()
            self._check_writable()
        finally:
            self._write_lock.release()

    def write_nowait(self, data: bytes) -> bool:
        """Send all of `data` if that needs no waiting; False, and nothing sent, otherwise."""
        size = len(data)
        if (
            size > min(self._allowance, FRAME_BYTES)
            or self._closed
            or self._connection.congested
            or self._write_lock.locked()
        ):
            return False
        self._allowance -= size
        self._connection.enqueue(HEADER.pack(0, DATA, 0, self.stream_id, size), data)
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
            self._connection.enqueue(HEADER.pack(0, WINDOW, FIN, self.stream_id, 0))
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
            self._connection.enqueue(HEADER.pack(0, WINDOW, RST, self.stream_id, 0))
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
        if not self._received:
            self.waiting_since = self._connection.last_received
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
