"""Yamux on the wire: headers, flags and a parser that needs no socket.

A frame is a header of 12 bytes and, for data, so many bytes as the header says
(https://github.com/hashicorp/yamux/blob/master/spec.md). The parser hands bodies on as they arrive: an announced length
allocates nothing.
"""

from __future__ import annotations

import struct
from typing import Protocol

from kaisar_p2p.errors import MeshError

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
HEADER_BYTES = HEADER.size
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
FIRST_WINDOW = 256 * 1024  # given to every stream by the specification
LARGEST_WINDOW = 1024 * 1024  # grown to while the reader keeps up
FRAME_BYTES = 64 * 1024  # body of one data frame that we send; js-libp2p and Go send no larger ones


class ProtocolViolation(MeshError):
    """The peer broke Noise or yamux; its connection ends, and its account is charged."""


class NotAuthentic(ProtocolViolation):
    """A frame that was not encrypted by the peer: it broke Noise, or somebody on the way changed what it sent."""


class ConnectionOver(MeshError):
    """The connection ends, and nobody is to blame."""


class FrameSink(Protocol):
    """What the parser tells about. Any of these may raise ProtocolViolation, which ends the connection."""

    def on_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """A header; of a data frame `length` bytes of body follow."""

    def on_body(self, body: memoryview) -> None:
        """Some bytes of the body of the last data frame; to be copied, the memory is used again."""

    def on_body_end(self) -> None:
        """The last data frame is complete."""


class FrameParser:
    """Cuts a byte stream into frames, whatever pieces it comes in."""

    def __init__(self, sink: FrameSink) -> None:
        self.frames = 0  # begun since the start
        self._sink = sink
        self._header = b""  # the beginning of a header that has not arrived whole
        self._body_left = 0

    def feed(self, data: memoryview) -> None:
        """Act on the next bytes; raises ProtocolViolation, and nothing else."""
        offset, size = 0, len(data)
        if self._header:
            offset = HEADER_BYTES - len(self._header)
            self._header += data[:offset]
            if len(self._header) < HEADER_BYTES:
                return
            self._start(*HEADER.unpack(self._header))
            self._header = b""
        unpack, start, sink = HEADER.unpack_from, self._start, self._sink
        while True:
            left = self._body_left
            if left:
                end = min(offset + left, size)
                if end > offset:
                    sink.on_body(data[offset:end])
                    self._body_left = left = left - (end - offset)
                    offset = end
                if left:
                    return
                sink.on_body_end()
            if size - offset < HEADER_BYTES:
                break
            start(*unpack(data, offset))
            offset += HEADER_BYTES
        self._header = bytes(data[offset:])

    def _start(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version != 0 or kind > GO_AWAY:
            raise ProtocolViolation(f"a frame of version {version} and type {kind}")
        self.frames += 1
        self._sink.on_frame(kind, flags, stream_id, length)
        if kind == DATA:
            if length:
                self._body_left = length
            else:
                self._sink.on_body_end()
