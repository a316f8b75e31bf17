"""A stream that a relay connects with a peer, in the place of a TCP connection."""

from __future__ import annotations

from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.io.abc import ReadWriteCloser  # isort: skip
from libp2p.io.exceptions import ConnectionClosedError  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError  # isort: skip


class RelayedStream(ReadWriteCloser):
    """A raw connection over a stream of a relay."""

    def __init__(self, stream: MuxedStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, b"" at the end; raises ConnectionClosedError when the relay or the peer is gone."""
        try:
            return await self._stream.read(n)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise ConnectionClosedError(f"the relayed connection broke: {error}") from None

    async def write(self, data: bytes) -> None:
        """Send all of `data`; raises ConnectionClosedError."""
        try:
            await self._stream.write(data)
        except MuxedStreamError as error:
            raise ConnectionClosedError(f"the relayed connection broke: {error}") from None

    async def close(self) -> None:
        """Finish sending and read no more."""
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the relay's address is not the peer's."""
        return None
