"""Gossip RPCs of which only a part has arrived: what all peers together may make us hold, and for how long."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

log = logging.getLogger(__name__)

_SMALL_BYTES = 16 * 1024  # not counted: bounded by the number of streams
_PROGRESS_BYTES = 16 * 1024  # less is none: who sends a byte now and then stands still


@dataclass(slots=True, eq=False)
class Unfinished:
    """The part of an RPC that has arrived on one stream."""

    sender: bytes
    stream: MuxedStream
    size: int = 0  # counted
    _moved_bytes: int = 0
    moved_at: float = 0.0  # trio time of the last progress

    def grow_to(self, size: int, now: float) -> None:
        """So much has arrived now; less than before: of another RPC."""
        if size < self.size or size >= self._moved_bytes + _PROGRESS_BYTES:
            self._moved_bytes, self.moved_at = size, now
        self.size = size


class UnfinishedRpcs:
    """What is unfinished on all streams. Above `most_bytes`, what has stood still for longest gives way, its stream
    is reset; a peer may have `of_one_bytes` on all of its streams.
    """

    def __init__(self, most_bytes: int, of_one_bytes: int, stall_s: float) -> None:
        self.bytes = 0
        self._most_bytes, self._of_one_bytes, self._stall_s = most_bytes, of_one_bytes, stall_s
        self._parts: dict[Unfinished, None] = {}

    def update(self, part: Unfinished, size: int, now: float) -> None:
        """So much of an RPC has arrived, and not its end."""
        self.discard(part)
        if size <= _SMALL_BYTES:
            part.grow_to(0, now)
            return
        part.grow_to(size, now)
        self._parts[part] = None
        self.bytes += size
        same = [each for each in self._parts if each.sender == part.sender]
        while len(same) > 1 and sum(each.size for each in same) > self._of_one_bytes:
            same.remove(self._give_way(same))
        while self.bytes > self._most_bytes and self._parts:
            self._give_way([*self._parts])

    def discard(self, part: Unfinished) -> None:
        """It is complete, or its stream is over."""
        if part in self._parts:
            del self._parts[part]
            self.bytes -= part.size

    def _give_way(self, parts: list[Unfinished]) -> Unfinished:
        stalest = min(parts, key=lambda each: each.moved_at)
        log.info("gossip stream of %s reset: too much has not arrived whole", stalest.sender.hex()[:12])
        self.discard(stalest)
        stalest.stream.reset_nowait()
        return stalest

    def stalled(self, now: float) -> list[bytes]:
        """Peers that have begun an RPC and not gone on for `stall_s`. What we have not read is not their fault."""
        for part in self._parts:
            if part.stream.unread_bytes:
                part.moved_at = now
        return [part.sender for part in self._parts if now - part.moved_at > self._stall_s]
