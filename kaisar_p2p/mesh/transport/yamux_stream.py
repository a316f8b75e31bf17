"""One stream of yamux: its windows, its buffers, its end. The connection it belongs to is in `yamux`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.failure_log import FailureLog
from kaisar_p2p.mesh.transport.yamux_frames import (
    DATA,
    FIN,
    FIRST_WINDOW,
    FRAME_BYTES,
    HEADER,
    HEADER_BYTES,
    LARGEST_WINDOW,
    RST,
    WINDOW,
    ConnectionOver,
    ProtocolViolation,
)

from libp2p.abc import IMuxedStream  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset  # isort: skip

if TYPE_CHECKING:
    from kaisar_p2p.mesh.transport.yamux import Muxer

failures = FailureLog(logging.getLogger(__name__))

__all__ = ["FRAME_BYTES", "ConnectionOver", "MuxedStream", "ProtocolViolation", "ReceivedBytes"]

_QUEUE_BYTES = 256 * 1024  # written to a stream and not sent: a writer waits above this
_WRITES_IN_A_ROW = 128  # that do not have to wait: then other tasks have their turn
_SMALL_QUEUE = 4 * 1024  # that a stream may have even when its connection is crowded
_NOWAIT_QUEUE = 64 * 1024  # above this, `write_nowait` leaves it to its caller what goes first
_SMALL_PIECE = 4 * 1024  # received pieces below this share memory: many tiny frames cost no more than their bytes
_SHARED_PIECE = 32 * 1024
_SMALL_BACKLOG = 64 * 1024  # a stream with less is not the one to blame when memory runs short
_SMALLEST_BACKLOG = 4 * 1024  # …unless it runs very short
_CONNECTIONS_SHARE = 3  # one connection may hold a third of what the node holds
_LINGER_S = 30.0  # a stream that we closed and the peer did not


@dataclass
class ReceivedBytes:
    """Bytes received and not read yet, of all connections of a node together."""

    most: int
    held: int = 0

    @property
    def too_many(self) -> bool:
        """More than the node wants to hold."""
        return self.held > self.most

    def to_blame(self, backlog: int, of_connection: int | None = None) -> bool:
        """A stream with so many of them has to go: at first only large ones, at twice the limit all but the smallest.

        Thousands of streams of many keys, each with a little, would otherwise hold several times the limit. Of a
        connection that holds more than its share all but the smallest go; one that holds next to nothing is spared
        for as long as memory does not run very short: others have filled it.
        """
        if of_connection is not None and of_connection > self.most // _CONNECTIONS_SHARE:
            return backlog > _SMALLEST_BACKLOG
        if self.held > 2 * self.most:
            return backlog > _SMALLEST_BACKLOG
        spared = of_connection is not None and of_connection <= FIRST_WINDOW
        return self.too_many and backlog > _SMALL_BACKLOG and not spared


class MuxedStream(IMuxedStream):
    """One stream. Reading and writing may happen in different tasks; each write is atomic."""

    def __init__(self, connection: Muxer, stream_id: int) -> None:
        self.muxed_conn = connection
        self.stream_id = stream_id
        self._connection = connection
        self._received: list[bytes | bytearray | memoryview] = []  # an empty deque takes ten times the memory of this
        self._received_bytes = 0
        self._outgoing: list[bytes | memoryview] = []
        self.outgoing_bytes = 0  # written, not sent yet
        self.scheduled = False  # waits for its turn to send
        self._window = FIRST_WINDOW  # size of the receive window
        self._credit = FIRST_WINDOW  # what the peer may still send
        self._allowance = FIRST_WINDOW  # what we may still send
        self._eof = self._was_reset = self._closed = False
        self._fin_due = False  # follows what is outgoing
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

    @property
    def unread_bytes(self) -> int:
        """Received and not read yet."""
        return self._received_bytes

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`; raises MuxedStreamEOF at the end and MuxedStreamReset after a reset."""
        if self._received:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._received:
            if self._was_reset:
                raise MuxedStreamReset("the stream was reset")
            if self._eof or self._discard_until is not None:
                raise MuxedStreamEOF("the stream has ended")
            if self._readable is None:
                self._readable = trio.Event()
            await self._readable.wait()
        data = self._take_received(n)
        self._uncount(len(data))
        self._reopen_window()
        return data

    def _take_received(self, n: int | None) -> bytes:
        pieces = self._received
        if n is None or n < 0 or n >= self._received_bytes:
            data = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
        elif n < len(pieces[0]):
            view = memoryview(pieces[0])
            data = bytes(view[:n])
            pieces[0] = view[n:]
        else:
            data = bytes(pieces.pop(0))  # a short read: the next piece is copied when its turn comes
        self._received_bytes -= len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Give back the end of what was read last."""
        self._received.insert(0, data)
        self._received_bytes += len(data)
        self._uncount(-len(data))

    def _reopen_window(self) -> None:
        if self._eof or self._was_reset or self._discard_until is not None:
            return
        used = self._window - self._credit - self._received_bytes
        if used >= self._window // 2:
            self._window += self._connection.grow(min(self._window, LARGEST_WINDOW - self._window))
            more = self._window - self._credit - self._received_bytes
            self._credit += more
            self._connection.enqueue(HEADER.pack(0, WINDOW, 0, self.stream_id, more))

    # -- writing ------------------------------------------------------------------------------------------------------

    async def write(self, data: bytes | bytearray | memoryview, *, head: bytes = b"") -> None:
        """Send `head` and all of `data`; raises MuxedStreamError when the stream is over.

        Returns when it is queued, and waits while the peer's window or our queue is full: what is written meanwhile
        leaves in one frame.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        size = len(head) + len(data)
        if 0 < size <= min(self._allowance, self._room()) and not self._closed and not self._write_lock.locked():
            self._queue(head + bytes(data))
            if not len(self._outgoing) % _WRITES_IN_A_ROW:
                await trio.lowlevel.checkpoint()
        else:
            await self._write_in_parts(memoryview(head), memoryview(bytes(data)))

    async def _write_in_parts(self, *views: memoryview) -> None:
        async with self._write_lock:
            for view in views:
                await self._write_view(view)
            self._check_writable()

    async def _write_view(self, view: memoryview) -> None:
        while view:
            self._check_writable()
            size = min(self._allowance, self._room(), FRAME_BYTES, len(view))
            if size <= 0:
                await self._wait_until_writable()
                continue
            self._queue(view[:size])
            view = view[size:]

    def write_nowait(self, data: bytes) -> bool:
        """Send all of `data` if that needs no waiting; False, and nothing sent, otherwise."""
        if (
            len(data) > min(self._allowance, self._room())
            or self._closed
            or self.outgoing_bytes > _NOWAIT_QUEUE
            or self._write_lock.locked()
        ):
            return False
        self._queue(data)
        return True

    def _room(self) -> int:
        """Bytes that may be queued: a peer that does not read must not make each of its streams hold an answer."""
        return (_SMALL_QUEUE if self._connection.crowded else _QUEUE_BYTES) - self.outgoing_bytes

    def _queue(self, data: bytes | memoryview) -> None:
        size = len(data)
        self._allowance -= size
        self._outgoing.append(data)
        self.outgoing_bytes += size
        self._connection.schedule(self, size)

    def take_outgoing(self, batch: list[bytes | memoryview], most: int) -> int:
        """Move up to `most` bytes, and the end of the stream, to what is sent next; the bytes added to `batch`."""
        size = min(most, self.outgoing_bytes)
        added = 0
        if size:
            batch.append(HEADER.pack(0, DATA, 0, self.stream_id, size))
            self._move_outgoing(batch, size)
            added = HEADER_BYTES + size
        if self._fin_due and not self._outgoing:
            self._fin_due = False
            batch.append(HEADER.pack(0, WINDOW, FIN, self.stream_id, 0))
            added += HEADER_BYTES
            if self._eof:
                self._connection.forget(self)
        if self._writable is not None and self.outgoing_bytes < _QUEUE_BYTES // 2:
            self._wake_writer()
        return added

    def _move_outgoing(self, batch: list[bytes | memoryview], size: int) -> None:
        outgoing = self._outgoing
        if size == self.outgoing_bytes:
            batch += outgoing
            outgoing.clear()
        else:
            left, whole = size, 0
            while len(outgoing[whole]) <= left:
                left -= len(outgoing[whole])
                whole += 1
            batch += outgoing[:whole]
            if left:
                view = memoryview(outgoing[whole])
                batch.append(view[:left])
                outgoing[whole] = view[left:]
            del outgoing[:whole]
        self.outgoing_bytes -= size

    def _send_at_once(self) -> None:
        self._fin_due = False
        self._connection.unschedule(self.outgoing_bytes)
        batch: list[bytes | memoryview] = []
        self.take_outgoing(batch, self.outgoing_bytes)
        self._connection.enqueue(b"".join(batch))

    def _drop_outgoing(self) -> None:
        self._connection.unschedule(self.outgoing_bytes)
        self._outgoing.clear()
        self.outgoing_bytes = 0
        self._fin_due = False

    @property
    def has_outgoing(self) -> bool:
        """There is something to send, if only the end."""
        return self.outgoing_bytes > 0 or self._fin_due

    def _check_writable(self) -> None:
        if self._was_reset:
            raise MuxedStreamReset("the stream was reset")
        if self._closed:
            raise MuxedStreamError("the stream is closed for sending")

    async def _wait_until_writable(self) -> None:
        if self._writable is None:
            self._writable = trio.Event()
        if self._connection.crowded:
            self._connection.wake_when_uncrowded(self)
        await self._writable.wait()

    def _wake_writer(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    # -- the end ------------------------------------------------------------------------------------------------------

    async def close_write(self) -> None:
        """Tell the peer that nothing more comes; reading goes on."""
        self._send_fin()
        await trio.lowlevel.checkpoint()

    def _send_fin(self) -> None:
        if not self._closed:
            self._closed = self._fin_due = True
            self._connection.schedule(self, 0)

    async def close(self) -> None:
        """Finish sending and read no more; the stream is gone when the peer has finished too, or `_LINGER_S` later."""
        self._send_fin()
        if not self._eof and not self._was_reset:
            self._discard_until = trio.current_time() + _LINGER_S
            self._connection.linger(self)
        self._drop_received()
        self.wake()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """End the stream at once in both directions."""
        self.reset_nowait()
        await trio.lowlevel.checkpoint()

    def reset_nowait(self) -> None:
        """`reset` without a checkpoint."""
        if not self._was_reset and not (self._closed and self._eof and not self._fin_due):
            if 0 < self.outgoing_bytes <= _SMALL_QUEUE:  # an answer that says why, say
                self._send_at_once()
            self._connection.enqueue(HEADER.pack(0, WINDOW, RST, self.stream_id, 0))
        self.end_reset()
        self._drop_received()

    def end_reset(self) -> None:
        """The stream was reset, by either side or with its connection."""
        self._was_reset = self._closed = True
        self._drop_outgoing()
        self._connection.forget(self)
        self.wake()

    def end_received(self) -> None:
        """The peer finished sending."""
        self._eof = True
        if self._closed and not self._fin_due:
            self._connection.forget(self)
        self.wake()

    def accept_data(self, data: memoryview) -> None:
        """Bytes from the peer, already counted against its window."""
        if self._discard_until is not None or self._was_reset:
            return
        if not self._received:
            self.waiting_since = self._connection.last_received
        self._keep(data)
        memory = self._connection.received
        memory.held += len(data)
        self._connection.unread_bytes += len(data)
        if memory.to_blame(self._received_bytes, self._connection.unread_bytes):
            failures.warning("stream of %s reset: too much is waiting to be read", self._connection.peer_id)
            self.reset_nowait()
        if self._readable is not None:
            self._readable.set()
            self._readable = None

    def _keep(self, data: memoryview) -> None:
        pieces, size = self._received, len(data)
        self._received_bytes += size
        if size >= _SMALL_PIECE:
            pieces.append(bytes(data))
            return
        last = pieces[-1] if pieces else None
        if type(last) is bytearray and len(last) < _SHARED_PIECE:
            last += data
            return
        pieces.append(bytearray(data))

    def spend_credit(self, size: int) -> None:
        """Count `size` bytes against what the peer may send."""
        self._credit -= size
        if self._credit < 0:
            raise ProtocolViolation("data beyond the receive window")

    def add_allowance(self, size: int) -> None:
        """The peer can take `size` bytes more."""
        self._allowance = min(self._allowance + size, 1 << 32)
        self._wake_writer()

    def expired(self, now: float) -> bool:
        """We closed, the peer did not, and it has had its time."""
        return self._discard_until is not None and now > self._discard_until

    def wake(self) -> None:
        """Let waiting readers and writers look at the state again."""
        self._wake_writer()
        if self._readable is not None:
            self._readable.set()
            self._readable = None

    def _drop_received(self) -> None:
        self._uncount(self._received_bytes)
        self._received.clear()
        self._received_bytes = 0

    def _uncount(self, size: int) -> None:
        if self._counted:
            self._connection.received.held -= size
            self._connection.unread_bytes -= size

    def end_with_connection(self) -> None:
        """The connection is over: what has arrived can be read, but nobody waits for memory because of it."""
        self._uncount(self._received_bytes)
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
