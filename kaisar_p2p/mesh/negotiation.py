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
    answer = proposal(protocol)
    start = await _some(channel, _READ_BYTES)
    if start.startswith(answer):  # as it nearly always comes
        if len(start) > len(answer):
            channel.unread(start[len(answer) :])
        return
    channel.unread(start)
    if await _read_line(channel) != _HEADER:
        raise BrokenNegotiation("the peer does not speak multistream-select")
    if await _read_line(channel) != protocol:
        raise RequestFailed(f"the peer does not speak {protocol}", hint="does it run the same version and role?")


async def respond(channel: Channel, speaks: Callable[[str], bool]) -> str:
    """The accepting side: agree on the first proposed protocol that we speak."""
    if await _read_line(channel) != _HEADER:
        raise BrokenNegotiation("the peer does not speak multistream-select")
    start = await _some(channel, _READ_BYTES, waits=False)
    channel.unread(start)
    answer = _line(_HEADER)
    if not _parse_line(start):  # the peer waits for our header before it proposes
        await channel.write(answer)
        answer = b""
    for _ in range(_ATTEMPTS):
        protocol = await _read_line(channel)
        if speaks(protocol):
            await channel.write(answer + _line(protocol))
            return protocol
        await channel.write(answer + _line(_REFUSED))
        answer = b""
    raise RequestFailed("the peer proposes only protocols that we do not speak")
