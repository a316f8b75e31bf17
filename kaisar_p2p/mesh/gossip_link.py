"""What gossip keeps for each peer that it writes to, and which messages it has seen."""

from __future__ import annotations

from collections import OrderedDict, deque

import trio

from kaisar_p2p.mesh.limits import MeshLimits, TokenBucket
from kaisar_p2p.mesh.yamux_stream import MuxedStream

WRITE_BYTES = 64 * 1024  # written, and read, at once
_CONTROL_FRAMES = 128  # waiting for one peer


class Link:
    """What waits to be sent to one peer. Control goes first; of messages the oldest give way."""

    def __init__(self, limits: MeshLimits, now: float) -> None:
        self.messages_bucket = TokenBucket(limits.messages_per_s, limits.messages_burst, now)
        self.bytes_bucket = TokenBucket(limits.bytes_per_s, limits.bytes_burst, now)
        self.inbound_streams = 0
        self.sending: trio.CancelScope | None = None
        self.stream: MuxedStream | None = None  # open and announced
        self.dropped = 0
        self._limits = limits
        self._control: deque[bytes] = deque()
        self._messages: deque[bytes] = deque()
        self._message_bytes = 0
        self._filled = trio.Event()

    def push(self, frame: bytes) -> None:
        """Send a message, or queue it when that would have to wait."""
        if not self._messages and not self._control and self.stream is not None and self.stream.write_nowait(frame):
            return
        self._messages.append(frame)
        self._message_bytes += len(frame)
        while len(self._messages) > self._limits.outbound_frames or self._message_bytes > self._limits.outbound_bytes:
            self._message_bytes -= len(self._messages.popleft())
            self.dropped += 1
        self._filled.set()

    def push_control(self, frame: bytes) -> None:
        """Queue a control frame, ahead of messages."""
        if len(self._control) < _CONTROL_FRAMES:
            self._control.append(frame)
            self._filled.set()

    async def next_batch(self) -> bytes:
        """Wait for something to send; several frames in one piece."""
        while not self._control and not self._messages:
            self._filled = trio.Event()
            await self._filled.wait()
        batch: list[bytes] = []
        size = 0
        while size < WRITE_BYTES and (self._control or self._messages):
            if self._control:
                frame = self._control.popleft()
            else:
                frame = self._messages.popleft()
                self._message_bytes -= len(frame)
            size += len(frame)
            batch.append(frame)
        return b"".join(batch)


class SeenMessages:
    """Ids of messages seen lately; bounded by number and age."""

    def __init__(self, most: int, keep_s: float) -> None:
        self._most, self._keep_s = most, keep_s
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def __contains__(self, message_id: bytes) -> bool:
        return message_id in self._seen

    def add(self, message_id: bytes, now: float) -> None:
        """Remember an id."""
        self._seen[message_id] = now
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def expire(self, now: float) -> None:
        """Forget what is old."""
        while self._seen and next(iter(self._seen.values())) < now - self._keep_s:
            self._seen.popitem(last=False)
