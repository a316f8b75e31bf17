"""What one connection has to send, and in which order.

Control frames first; then streams that had nothing to send lately, a little of each; then the others in turns. A bulk
transfer thus never delays a request or a gossip message by more than what is being written at the moment, and the
amount written at once shrinks when the link is slow (the idea is that of FlowQueue-CoDel,
https://datatracker.ietf.org/doc/html/rfc8290, chapter 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

from kaisar_p2p.mesh.transport.noise import MAX_PLAINTEXT, WRITE_BYTES

if TYPE_CHECKING:
    from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

CROWDED_BYTES = 1024 * 1024  # written to all streams and not sent
FAIR_BYTES = 64 * 1024  # the same, of a connection that is left alone when all have too much
CONTROL_BYTES = 64 * 1024  # control frames not sent: nothing more is read above this
_TURN_BYTES = 64 * 1024
_FIRST_TURN_BYTES = 16 * 1024
_SMALLEST_BATCH = 16 * 1024
_LARGEST_BATCH = WRITE_BYTES - 64  # a turn may exceed it by two headers
_SLOW_S, _QUICK_S = 0.05, 0.01  # one write took so long: write less, or more, at once
_STUCK_S = 2.0  # one write takes so long: that connection gives way when memory is short
_RELIEVED_EVERY_S = 0.1


class Sender(Protocol):
    """A connection, as far as it makes us hold what it does not take."""

    @property
    def held_bytes(self) -> int:
        """Queued, and on the way to the system."""

    def stuck_s(self, now: float) -> float:
        """For how long the system has not taken what we write."""

    def give_way(self) -> None:
        """End: others need the memory."""


class SendingBytes:
    """Bytes written to streams and not taken by the system, of all connections of a node together.

    Above `most`, a connection may queue `FAIR_BYTES` and writes little at once, and those that hold the most and
    have not moved for `_STUCK_S` end.
    """

    def __init__(self, most: int) -> None:
        self.held = 0
        self.senders: set[Sender] = set()
        self._most = most
        self._relieved = 0.0

    @property
    def too_many(self) -> bool:
        """More than the node wants to hold."""
        return self.held > self._most

    def relieve(self, now: float) -> None:
        """End as many stuck connections as it takes."""
        if now < self._relieved + _RELIEVED_EVERY_S:
            return
        self._relieved, left = now, self.held
        stuck = [each for each in self.senders if each.held_bytes > FAIR_BYTES and each.stuck_s(now) > _STUCK_S]
        for each in sorted(stuck, key=lambda one: one.held_bytes, reverse=True):
            if left <= self._most:
                return
            left -= each.held_bytes
            each.give_way()


class Outbox:
    """The queue of the writer task."""

    def __init__(self, everywhere: SendingBytes) -> None:
        self._everywhere = everywhere
        self._on_way = 0  # bytes that what is being written takes
        self.waiting: set[MuxedStream] = set()  # whose writers wait until there is room
        self.unflushed = False
        self.answering = False
        self._control: list[bytes] = []
        self._control_bytes = 0
        self._pong: bytes | None = None  # only the last one: a flood of pings gets few answers
        self._newcomers: list[MuxedStream] = []
        self._others: list[MuxedStream] = []
        self._data_bytes = 0
        self._batch_bytes = 4 * _SMALLEST_BATCH
        self._writing = False
        self._closed = False
        self._filled: trio.Event | None = None
        self._emptied: trio.Event | None = None
        self._control_gone: trio.Event | None = None

    # -- filling ------------------------------------------------------------------------------------------------------

    def control(self, frame: bytes) -> None:
        """A control frame."""
        if not self._closed:
            self._control.append(frame)
            self._control_bytes += len(frame)
            self._wake()

    def control_later(self, frame: bytes) -> None:
        """A control frame that may wait for `flush`: an answer often follows and leaves with it."""
        if not self._closed:
            self._control.append(frame)
            self._control_bytes += len(frame)
            self.unflushed = True

    def flush(self) -> None:
        """What was queued by `control_later` leaves now."""
        self.unflushed = False
        self._wake()

    def pong(self, frame: bytes) -> None:
        """The answer to a ping, in place of an earlier one that has not left. It waits for `take_pong` or `flush`."""
        self._pong = frame
        self.answering = True

    def take_pong(self) -> bytes | None:
        """The answer that waits, for the caller to send while the writer is idle; None: the writer will send it."""
        self.answering = False
        if not self.idle:
            return None
        frame, self._pong = self._pong, None
        return frame

    @property
    def idle(self) -> bool:
        """The writer waits for something to send, and there is nothing but an answer to a ping."""
        return self._filled is not None and not (self._control or self._newcomers or self._others)

    def add(self, stream: MuxedStream, size: int) -> None:
        """`stream` has `size` bytes more to send, or its end."""
        if self._closed:
            return
        self._data_bytes += size
        everywhere = self._everywhere
        everywhere.held += size
        if everywhere.too_many:
            everywhere.relieve(trio.current_time())
        if not stream.scheduled:
            stream.scheduled = True
            self._newcomers.append(stream)
            self._wake()

    def remove(self, size: int) -> None:
        """A stream dropped what it had to send."""
        if not self._closed:
            self._data_bytes -= size
            self._everywhere.held -= size

    def _wake(self) -> None:
        if self._filled is not None:
            self._filled.set()
            self._filled = None

    @property
    def queued_bytes(self) -> int:
        """Control frames and data that have not been handed to the system."""
        return self._control_bytes + self._data_bytes

    @property
    def crowded(self) -> bool:
        """So much is queued that streams with something queued have to wait."""
        return self._data_bytes > (FAIR_BYTES if self._everywhere.too_many else CROWDED_BYTES)

    @property
    def held_bytes(self) -> int:
        """Queued data, and what is on the way to the system."""
        return self._data_bytes + self._on_way

    @property
    def control_congested(self) -> bool:
        """The peer makes us answer faster than it reads."""
        return self._control_bytes > CONTROL_BYTES

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def emptied(self) -> None:
        """Wait until all has been handed to the system, or the connection is over."""
        while not self._closed and (self._writing or self._has_something):
            self._emptied = trio.Event() if self._emptied is None else self._emptied
            await self._emptied.wait()

    async def control_sent(self) -> None:
        """Wait until few control frames are left."""
        while self.control_congested and not self._closed:
            self._control_gone = trio.Event() if self._control_gone is None else self._control_gone
            await self._control_gone.wait()

    @property
    def _has_something(self) -> bool:
        return bool(self._control or self._pong or self._newcomers or self._others)

    # -- emptying -----------------------------------------------------------------------------------------------------

    async def next_batch(self) -> bytes:
        """Wait for something to send, and take what is to be written next."""
        while True:
            if not self._has_something:
                self._notify(self._emptied)
                self._emptied = None
                self._filled = trio.Event()
                await self._filled.wait()
            data = self.take()
            if data:
                self._writing = True
                self._on_way = len(data) if len(data) <= MAX_PLAINTEXT else 2 * len(data)  # and its ciphertext
                self._everywhere.held += self._on_way
                return data
            self._wake_waiting()  # all that was scheduled has been reset

    def take(self) -> bytes:
        """What is to be written next, b"" when there is nothing."""
        batch: list[bytes | memoryview] = [*self._control]
        size = self._control_bytes
        self._control, self._control_bytes = [], 0
        if self._pong is not None:
            batch.append(self._pong)
            size += len(self._pong)
            self._pong = None
        self._take_turns(batch, size)
        return batch[0] if len(batch) == 1 and type(batch[0]) is bytes else b"".join(batch)

    def _take_turns(self, batch: list[bytes | memoryview], size: int) -> None:
        newcomers, others = self._newcomers, self._others
        batch_bytes = _SMALLEST_BATCH if self._everywhere.too_many else self._batch_bytes
        while size < batch_bytes and (newcomers or others):
            alone = len(newcomers) + len(others) == 1
            most = min(_FIRST_TURN_BYTES if newcomers and not alone else _TURN_BYTES, batch_bytes - size)
            stream = (newcomers or others).pop(0)
            before = stream.outgoing_bytes
            size += stream.take_outgoing(batch, most)
            taken = before - stream.outgoing_bytes
            self._data_bytes -= taken
            self._everywhere.held -= taken
            if stream.has_outgoing:
                others.append(stream)
            else:
                stream.scheduled = False

    def sent(self, size: int, took_s: float) -> None:
        """A batch has been handed to the system."""
        self._writing = False
        self._everywhere.held -= self._on_way
        self._on_way = 0
        if took_s > _SLOW_S:
            self._batch_bytes = max(_SMALLEST_BATCH, self._batch_bytes // 2)
        elif took_s < _QUICK_S and size >= self._batch_bytes:
            self._batch_bytes = min(_LARGEST_BATCH, 2 * self._batch_bytes)
        self._notify(self._control_gone)
        self._control_gone = None
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        if self.waiting and self._data_bytes < CROWDED_BYTES // 2:
            for stream in self.waiting:
                stream.wake()
            self.waiting.clear()

    def close(self) -> None:
        """The connection is over: nothing will be sent."""
        if not self._closed:
            self._closed = True
            self._everywhere.held -= self.held_bytes
            self._data_bytes = self._on_way = 0
        self._control.clear()
        self._newcomers.clear()
        self._others.clear()
        for event in (self._emptied, self._control_gone):
            self._notify(event)

    @staticmethod
    def _notify(event: trio.Event | None) -> None:
        if event is not None:
            event.set()
