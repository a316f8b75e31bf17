"""What gossip keeps for each peer that it writes to."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Container

import trio

from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.gossip.queues import PRIORITIES
from kaisar_p2p.mesh.limits import MeshLimits, TokenBucket
from kaisar_p2p.mesh.transport.yamux_stream import FRAME_BYTES, MuxedStream

_CONTROL_FRAMES = 128  # waiting for one peer
_CONTROL_BYTES = 64 * 1024  # the same in bytes
_LENGTH_BYTES = 3  # of a frame that fits a batch
_TURN_BYTES = 64 * 1024  # that the link with the most loses at a time


class QueuedBytes:
    """What the queues of all links hold in messages; one that waits for several peers is in memory once.

    When it is too much, the link that has the most loses first.
    """

    def __init__(self, most: int) -> None:
        self.held = 0
        self._most = most
        self._waits: dict[bytes, int] = {}  # for how many peers, by message id
        self._links: dict[Link, None] = {}  # with something queued

    def add(self, link: Link, message_id: bytes, size: int) -> None:
        """A message waits for one peer more."""
        waits = self._waits.get(message_id, 0)
        self._waits[message_id] = waits + 1
        self._links[link] = None
        if not waits:
            self.held += size
            if self.held > self._most:
                self._relieve()

    def remove(self, link: Link, message_id: bytes, size: int) -> None:
        """A message waits for one peer less."""
        waits = self._waits[message_id] - 1
        if waits:
            self._waits[message_id] = waits
        else:
            del self._waits[message_id]
            self.held -= size
        if not link.queued_bytes:
            self._links.pop(link, None)

    def _relieve(self) -> None:
        while self.held > self._most and self._links:
            worst = max(self._links, key=lambda link: link.queued_bytes)
            worst.drop_down_to(max(0, worst.queued_bytes - _TURN_BYTES))


class Link:
    """What waits to be sent to one peer. Control goes first, then the more important messages; when too much waits,
    the oldest of the least important give way.

    `flush` sends what it can at once; what has to wait for the peer is left in `unsent` for the peer's task.
    """

    def __init__(
        self, limits: MeshLimits, now: float, dropped: Counter[tuple[str, int]], everywhere: QueuedBytes
    ) -> None:
        self.messages_bucket = TokenBucket(limits.messages_per_s, limits.messages_burst, now)
        self.bytes_bucket = TokenBucket(limits.bytes_per_s, limits.bytes_burst, now)
        self.inbound: list[MuxedStream] = []  # that the peer has open
        self.sending: trio.CancelScope | None = None
        self.stream: MuxedStream | None = None  # open and announced
        self.unsent = b""
        self.flush_at: float | None = None  # when what the peer has probably got from others is sent at the latest
        self._stuck = trio.Event()  # there is something in `unsent`
        self._limits = limits
        self._dropped = dropped  # by topic and priority
        self._everywhere = everywhere
        self._control: deque[bytes] = deque()
        self._control_bytes = 0
        self._messages: list[OrderedDict[bytes, tuple[str, bytes]]] = [OrderedDict() for _ in range(PRIORITIES)]
        self._count = self._bytes = 0

    def __len__(self) -> int:
        """Frames and messages that wait."""
        return len(self._control) + self._count

    @property
    def queued_bytes(self) -> int:
        """Of messages."""
        return self._bytes

    def push(self, message_id: bytes, topic: str, entry: bytes, priority: int) -> None:
        """Queue a message, given as the field of an RPC."""
        queue = self._messages[priority]
        if message_id in queue:
            return
        queue[message_id] = (topic, entry)
        self._count += 1
        self._bytes += len(entry)
        self._everywhere.add(self, message_id, len(entry))
        while self._count > self._limits.outbound_frames or self._bytes > self._limits.outbound_bytes:
            self._drop_one()

    def _drop_one(self) -> None:
        priority = next(number for number in reversed(range(PRIORITIES)) if self._messages[number])
        message_id, (topic, entry) = self._messages[priority].popitem(last=False)
        self._gone(message_id, entry)
        self._dropped[topic, priority] += 1

    def _gone(self, message_id: bytes, entry: bytes) -> None:
        self._count -= 1
        self._bytes -= len(entry)
        self._everywhere.remove(self, message_id, len(entry))

    def shrink(self, most_bytes: int) -> None:
        """Keep no more than so many bytes of messages, and of control nothing."""
        self._control.clear()
        self._control_bytes = 0
        self.unsent = self.unsent if len(self.unsent) <= most_bytes else b""
        self.drop_down_to(most_bytes)

    def drop_down_to(self, most_bytes: int) -> None:
        """The oldest of the least important messages give way."""
        while self._bytes > most_bytes:
            self._drop_one()

    def withdraw(self, message_id: bytes) -> None:
        """The peer has this message."""
        for queue in self._messages:
            if (waiting := queue.pop(message_id, None)) is not None:
                self._gone(message_id, waiting[1])
                return

    def push_control(self, frame: bytes) -> None:
        """Queue a control frame, ahead of messages."""
        room = _CONTROL_BYTES - self._control_bytes
        if len(self._control) < _CONTROL_FRAMES and (len(frame) <= room or not (self._control or self.unsent)):
            self._control.append(frame)
            self._control_bytes += len(frame)

    def has_news(self, spread: Container[bytes]) -> bool:
        """Something waits that is not in `spread`: the peer may not have it from somebody else."""
        return bool(self._control) or any(message_id not in spread for queue in self._messages for message_id in queue)

    def flush(self) -> None:
        """Send what waits, as far as that needs no waiting."""
        self.flush_at = None
        while (self._control or self._count) and self.stream is not None and not self.unsent:
            batch = self._next_batch()
            if not self.stream.write_nowait(batch):
                self.unsent = batch
                self._stuck.set()

    async def next_unsent(self) -> bytes:
        """Wait for something that could not be sent at once."""
        if not self.unsent:
            self._stuck = trio.Event()
            await self._stuck.wait()
        return self.unsent

    def _next_batch(self) -> bytes:
        """Control frames, and as many messages as fit in one RPC."""
        parts: list[bytes] = []
        size = 0
        while self._control and size < FRAME_BYTES // 2:
            parts.append(self._control.popleft())
            size += len(parts[-1])
        self._control_bytes -= size
        entries: list[bytes] = []
        room = FRAME_BYTES - _LENGTH_BYTES - size
        for queue in self._messages:
            while queue and (len(queue[next(iter(queue))][1]) <= room or not (parts or entries)):
                message_id, (_, entry) = queue.popitem(last=False)
                self._gone(message_id, entry)
                entries.append(entry)
                room -= len(entry)
        if entries:
            parts.append(wire.frame(b"".join(entries)))
        return b"".join(parts)
