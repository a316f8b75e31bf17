"""multistream-select on a yamux stream (https://github.com/multiformats/multistream-select).

Own code instead of the library's because that one lets non-UTF-8 bytes escape as an exception that ends the whole
process, and needs two round trips where one is enough.
"""

from __future__ import annotations

from collections.abc import Callable

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.yamux_stream import MuxedStream

from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset  # isort: skip

_HEADER = "/multistream/1.0.0"
_REFUSED = "na"
_LINE_BYTES = 256
_ATTEMPTS = 4  # protocols that a peer may propose on one stream


def proposal(protocol: str) -> bytes:
    """What the opener of a stream sends: header and protocol at once."""
    return _line(_HEADER) + _line(protocol)


async def confirm(stream: MuxedStream, protocol: str) -> None:
    """Read the answer to `proposal`; raises RequestFailed when the peer does not speak the protocol."""
    if await _read_line(stream) != _HEADER:
        raise RequestFailed("the peer does not speak multistream-select")
    if await _read_line(stream) != protocol:
        raise RequestFailed(f"the peer does not speak {protocol}", hint="does it run the same version and role?")


async def respond(stream: MuxedStream, speaks: Callable[[str], bool]) -> str:
    """The accepting side: agree on the first proposed protocol that we speak."""
    await stream.write(_line(_HEADER))  # at once: some wait for it before they propose
    if await _read_line(stream) != _HEADER:
        raise RequestFailed("the peer does not speak multistream-select")
    for _ in range(_ATTEMPTS):
        protocol = await _read_line(stream)
        if speaks(protocol):
            await stream.write(_line(protocol))
            return protocol
        await stream.write(_line(_REFUSED))
    raise RequestFailed("the peer proposes only protocols that we do not speak")


def _line(text: str) -> bytes:
    data = text.encode() + b"\n"
    if len(data) >= 128:
        return bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    return bytes([len(data)]) + data


async def _read_line(stream: MuxedStream) -> str:
    length = (await read_exactly(stream, 1))[0]
    if length & 128:
        length = (length & 127) | (await read_exactly(stream, 1))[0] << 7
    if not 0 < length <= _LINE_BYTES:
        raise RequestFailed("a line of multistream-select is too long")
    line = await read_exactly(stream, length)
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError:
        raise RequestFailed("a line of multistream-select is not text") from None
    if not text.endswith("\n"):
        raise RequestFailed("a line of multistream-select does not end")
    return text[:-1]


async def read_exactly(stream: MuxedStream, count: int) -> bytes:
    """Exactly `count` bytes; raises RequestFailed when the stream ends or is reset before."""
    parts: list[bytes] = []
    while count:
        try:
            part = await stream.read(count)
        except MuxedStreamEOF:
            raise RequestFailed("the peer ended the stream early") from None
        except (MuxedStreamReset, MuxedStreamError):
            raise RequestFailed("the peer reset the stream") from None
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
