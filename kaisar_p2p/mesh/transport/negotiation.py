"""multistream-select (https://github.com/multiformats/multistream-select), on yamux streams and below them.

Own code instead of the library's because that one lets non-UTF-8 bytes escape as an exception that ends the whole
process, and needs two round trips where one is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kaisar_p2p.errors import RequestFailed

from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset  # isort: skip


class BrokenNegotiation(RequestFailed):
    """What the peer sends on a new stream is not multistream-select."""


class Channel(Protocol):
    """What is negotiated on: a yamux stream, or a connection before it has any."""

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`; at the end b"" or MuxedStreamEOF."""

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""

    def unread(self, data: bytes) -> None:
        """Give back the end of what was read last."""


_HEADER = "/multistream/1.0.0"
_REFUSED = "na"
_LINE_BYTES = 256
_READ_BYTES = 512
_ATTEMPTS = 4  # protocols that a peer may propose on one stream


def proposal(protocol: str) -> bytes:
    """What the opener of a stream sends: header and protocol at once."""
    return _line(_HEADER) + _line(protocol)


async def confirm(channel: Channel, protocol: str) -> None:
    """Read the answer to `proposal`; raises RequestFailed when the peer does not speak the protocol."""
    lines = _Lines(channel)
    if await lines.next() != _HEADER:
        raise BrokenNegotiation("the peer does not speak multistream-select")
    if await lines.next() != protocol:
        raise RequestFailed(f"the peer does not speak {protocol}", hint="does it run the same version and role?")
    lines.give_back()


async def respond(channel: Channel, speaks: Callable[[str], bool]) -> str:
    """The accepting side: agree on the first proposed protocol that we speak."""
    lines = _Lines(channel)
    if await lines.next() != _HEADER:
        raise BrokenNegotiation("the peer does not speak multistream-select")
    answer = _line(_HEADER)
    for _ in range(_ATTEMPTS):
        if answer and not lines.has_next:  # some wait for our header before they propose
            await channel.write(answer)
            answer = b""
        protocol = await lines.next()
        if speaks(protocol):
            await channel.write(answer + _line(protocol))
            lines.give_back()
            return protocol
        await channel.write(answer + _line(_REFUSED))
        answer = b""
    raise RequestFailed("the peer proposes only protocols that we do not speak")


class _Lines:
    """Reads lines, with as few reads as possible; what comes after the last one has to be given back."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffer = b""

    @property
    def has_next(self) -> bool:
        """Another line has arrived already."""
        return parse_line(self._buffer) is not None

    async def next(self) -> str:
        while (found := parse_line(self._buffer)) is None:
            self._buffer += await _some(self._channel, _READ_BYTES)
        line, used = found
        self._buffer = self._buffer[used:]
        return line

    def give_back(self) -> None:
        if self._buffer:
            self._channel.unread(self._buffer)
            self._buffer = b""


def parse_line(data: bytes) -> tuple[str, int] | None:
    """The first line and the bytes that it takes, None when more has to come; raises BrokenNegotiation."""
    if not data:
        return None
    length, start = data[0], 1
    if length & 128:
        if len(data) < 2:
            return None
        length, start = (length & 127) | data[1] << 7, 2
    if not 0 < length <= _LINE_BYTES:
        raise BrokenNegotiation("a line of multistream-select is too long")
    end = start + length
    if len(data) < end:
        return None
    try:
        text = data[start:end].decode("ascii")
    except UnicodeDecodeError:
        raise BrokenNegotiation("a line of multistream-select is not text") from None
    if not text.endswith("\n"):
        raise BrokenNegotiation("a line of multistream-select does not end")
    return text[:-1], end


def _line(text: str) -> bytes:
    data = text.encode() + b"\n"
    if len(data) >= 128:
        return bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    return bytes([len(data)]) + data


async def _some(channel: Channel, count: int) -> bytes:
    try:
        part = await channel.read(count)
    except MuxedStreamEOF:
        part = b""
    except (MuxedStreamReset, MuxedStreamError):
        raise RequestFailed("the peer reset the stream") from None
    if not part:
        raise RequestFailed("the peer ended the stream early")
    return part


async def read_exactly(channel: Channel, count: int, on_part: Callable[[int], None] | None = None) -> bytes:
    """Exactly `count` bytes; raises RequestFailed when the stream ends or is reset before.

    `on_part` is called with the size of each piece, and may raise.
    """
    parts: list[bytes] = []
    while count:
        part = await _some(channel, count)
        if on_part is not None:
            on_part(len(part))
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
