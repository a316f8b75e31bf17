"""Streams as the rest of the program sees them: frames with a limit, or raw bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import trio

from kaisar_p2p.errors import LimitExceeded, RequestFailed
from kaisar_p2p.mesh.limits import SharedBytes
from kaisar_p2p.mesh.transport.negotiation import confirm, read_exactly
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset  # isort: skip

_SMALL_FRAME = 4096  # not counted: bounded by the number of streams
_CHUNK_BYTES = 256 * 1024
_LARGEST_FRAME = 64 * 1024 * 1024  # sent


class MeshStream:
    """A stream to one peer. Frames are a length of 4 bytes, big-endian, and so many bytes.

    `peer` is the peer's machine key, `protocol` what was agreed on. Every method raises RequestFailed when the peer
    ends or resets the stream or breaks a limit. Leaving the context ends the stream; leaving it with an exception
    resets it.
    """

    def __init__(
        self,
        stream: MuxedStream,
        peer: bytes,
        protocol: str,
        max_frame_bytes: int,
        *,
        held: SharedBytes | None = None,
        holder: bytes = b"",
    ) -> None:
        self.peer = peer
        self.protocol = protocol
        self.max_frame_bytes = max_frame_bytes
        self.sent_bytes = self.received_bytes = 0
        self._stream = stream
        self._unconfirmed = False
        self._held, self._holder = held, holder
        self._request_bytes = 0  # counted
        self.on_used: Callable[[], None] = lambda: None  # a whole frame has come, or something is answered

    def _take_part(self, size: int) -> None:
        self._request_bytes += self._take(size)

    def _take(self, size: int) -> int:
        """Count bytes that a peer makes us hold; what is to be given back."""
        if self._held is None:
            return 0
        if not self._held.try_take(self._holder, size, self._request_bytes):
            self._stream.reset_nowait()
            raise RequestFailed("too much is being received and answered already")
        return size

    def _give_back(self, size: int) -> None:
        if size and self._held is not None:
            self._held.give_back(self._holder, size)

    def _end_request(self) -> None:
        """What was received last is counted until something else is, or the stream ends: its handler has it."""
        size, self._request_bytes = self._request_bytes, 0
        self._give_back(size)

    def expect_confirmation(self) -> None:
        """The peer's agreement to the protocol has not been read yet: do it before the first read."""
        self._unconfirmed = True

    async def _confirmed(self) -> None:
        if self._unconfirmed:
            self._unconfirmed = False
            await confirm(self._stream, self.protocol)

    async def send_frame(self, frame: bytes) -> None:
        """Send one frame; `max_frame_bytes` is about what we receive, the peer has its own limit. LimitExceeded."""
        if len(frame) > _LARGEST_FRAME:
            raise LimitExceeded(f"a frame of {len(frame)} bytes exceeds {_LARGEST_FRAME}", hint="send it in parts")
        taken = self._take(len(frame)) if len(frame) > _SMALL_FRAME else 0
        try:
            await self._send(frame, len(frame).to_bytes(4, "big"))  # a copy with both would take as much again
        finally:
            self._give_back(taken)

    async def receive_frame(self) -> bytes:
        """The next frame. Its announced length is checked before anything is kept."""
        await self._confirmed()
        size = int.from_bytes(await read_exactly(self._stream, 4), "big")
        if size > self.max_frame_bytes:
            self._stream.reset_nowait()
            raise RequestFailed(f"the peer announced a frame of {size} bytes, over the limit of {self.max_frame_bytes}")
        self._end_request()
        # What has come counts, not what was announced: a few bytes cannot take the place of others.
        frame = await read_exactly(self._stream, size, self._take_part if size > _SMALL_FRAME else None)
        self.received_bytes += 4 + size
        self.on_used()
        return frame

    async def send_some(self, data: bytes | bytearray | memoryview) -> None:
        """Send raw bytes, all of them; waits while the peer does not read."""
        await self._send(data, b"")

    async def _send(self, data: bytes | bytearray | memoryview, head: bytes) -> None:
        try:
            await self._stream.write(data, head=head)
        except MuxedStreamError:  # MuxedStreamReset is one
            raise RequestFailed("the stream is closed") from None
        self.sent_bytes += len(head) + len(data)
        self.on_used()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some raw bytes; b"" when the peer has finished sending."""
        await self._confirmed()
        self._end_request()
        try:
            data = await self._stream.read(max_bytes or _CHUNK_BYTES)
        except MuxedStreamEOF:
            return b""
        except (MuxedStreamReset, MuxedStreamError):
            raise RequestFailed("the peer reset the stream") from None
        self.received_bytes += len(data)
        return data

    async def send_eof(self) -> None:
        """Nothing more will be sent; receiving goes on."""
        await self._stream.close_write()

    async def aclose(self) -> None:
        """Finish: what was sent still arrives, what the peer sends from now on is dropped."""
        self._end_request()
        await self._stream.close()

    async def reset(self) -> None:
        """End the stream at once, in both directions."""
        self._end_request()
        self._stream.reset_nowait()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> MeshStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.aclose()
        else:
            self._end_request()
            self._stream.reset_nowait()
