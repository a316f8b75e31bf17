"""A stream of yamux that is not there: it gives an input, and then ends."""

from __future__ import annotations

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from tests.fuzz.engine import chunks

from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset  # isort: skip

_ANSWER_BYTES = 1 << 20


class FakeStream:
    """Reads are short, as on a network. Whether it ends or is reset depends on the input."""

    stream_id = 1
    waiting_since = 0.0
    muxed_conn: object = None

    def __init__(self, data: bytes) -> None:
        self._parts = list(chunks(data))[::-1]
        self._ends = len(data) % 4 != 0
        self.written = 0
        self.is_reset = False

    async def read(self, n: int | None = None) -> bytes:
        if not self._parts:
            raise MuxedStreamEOF("the end") if self._ends else MuxedStreamReset("reset")
        part = self._parts.pop()
        if n is not None and 0 <= n < len(part):
            self._parts.append(part[n:])
            part = part[:n]
        return part

    def unread(self, data: bytes) -> None:
        if data:
            self._parts.append(data)

    async def write(self, data: bytes | bytearray | memoryview, *, head: bytes = b"") -> None:
        self.written += len(head) + len(data)
        assert self.written < _ANSWER_BYTES, "it answers without end"

    def write_nowait(self, data: bytes) -> bool:
        self.written += len(data)
        return True

    async def close_write(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def reset(self) -> None:
        self.is_reset = True

    def reset_nowait(self) -> None:
        self.is_reset = True

    def get_remote_address(self) -> tuple[str, int]:
        return "192.0.2.1", 1
