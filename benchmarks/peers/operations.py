"""The operations of a peer in Python: what it does on streams and with gossip, over any implementation's streams."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import trio

from benchmarks.peers.interface import (
    DIGEST,
    ECHO,
    FLOOD,
    FRAME,
    HEAD_BYTES,
    RESET,
    SINK,
    Message,
    Peer,
    PeerFailed,
    content,
)

_READ_BYTES = 256 * 1024
_OPEN_S = 10.0


class StreamWasReset(Exception):
    """The other side reset the stream."""


class ByteStream(Protocol):
    """A stream of any implementation. Every method raises StreamWasReset when the other side has reset it."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes; b"" when the other side has finished."""

    async def send_some(self, data: bytes | memoryview) -> None:
        """Send all of `data`."""

    async def send_eof(self) -> None:
        """Finish sending; receiving goes on."""

    async def aclose(self) -> None:
        """Finish."""

    async def reset(self) -> None:
        """End the stream in both directions, telling the other side."""


async def receive_exactly(stream: ByteStream, size: int) -> bytes:
    """`size` bytes; raises PeerFailed when the stream ends before."""
    data = b""
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise PeerFailed("the stream ended early")
        data += part
    return data


async def _receive_sized(stream: ByteStream, each: Callable[[bytes], Awaitable[object]]) -> None:
    left = int.from_bytes(await receive_exactly(stream, 8), "big")
    while left:
        data = await stream.receive_some(min(left, _READ_BYTES))
        if not data:
            raise PeerFailed("the stream ended early")
        left -= len(data)
        await each(data)


async def _receive_all(stream: ByteStream, consume: Callable[[bytes], object]) -> None:
    while data := await stream.receive_some(_READ_BYTES):
        consume(data)


async def _send_content(stream: ByteStream, size: int, chunk: int) -> None:
    for part in content(size, chunk):
        await stream.send_some(part)


# -- what is served ---------------------------------------------------------------------------------------------------


async def _echo(stream: ByteStream) -> None:
    await _receive_sized(stream, stream.send_some)


async def _sink(stream: ByteStream) -> None:
    left = size = int.from_bytes(await receive_exactly(stream, 8), "big")
    while left and (data := await stream.receive_some(_READ_BYTES)):
        left -= len(data)
    await stream.send_some((size - left).to_bytes(8, "big"))


async def _digest(stream: ByteStream) -> None:
    digest = hashlib.sha256()

    async def update(data: bytes) -> None:
        digest.update(data)

    await _receive_sized(stream, update)
    await stream.send_some(digest.digest())


async def _flood(stream: ByteStream) -> None:
    order = await receive_exactly(stream, 12)
    await _send_content(stream, int.from_bytes(order[:8], "big"), int.from_bytes(order[8:], "big"))


async def _frame(stream: ByteStream) -> None:
    head = await receive_exactly(stream, 4)
    await stream.send_some(head + await receive_exactly(stream, int.from_bytes(head, "big")))


async def _reset(stream: ByteStream) -> None:
    await receive_exactly(stream, 1)
    await stream.reset()


HANDLERS: dict[str, Callable[[ByteStream], Awaitable[None]]] = {
    ECHO: _echo,
    SINK: _sink,
    DIGEST: _digest,
    FLOOD: _flood,
    FRAME: _frame,
    RESET: _reset,
}
"""Servers of the stream protocols. Whoever runs one closes the stream after it, and resets it when it raises."""


# -- what is asked for ------------------------------------------------------------------------------------------------


@dataclass
class _Topic:
    report: bool
    count: int = 0
    latencies_ms: list[float] = field(default_factory=list)


class Operations(ABC):
    """A peer's operations, by name: `operate("dial", addr=...)`. An implementation adds those that are abstract."""

    key: str
    addrs: tuple[str, ...]

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}
        self.report: Callable[[str, str, bytes], None] = lambda _topic, _author, _data: None

    async def operate(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Do one operation; raises PeerFailed."""
        method = getattr(self, f"do_{operation}", None)
        if method is None:
            raise PeerFailed(f"no such operation: {operation}")
        result: dict[str, Any] = await method(**arguments) or {}
        return result

    @abstractmethod
    async def open(self, key: str, protocol: str) -> ByteStream:
        """A stream to a connected peer."""

    @abstractmethod
    async def connect(self, addr: str) -> None:
        """Connect with the peer at a multiaddr."""

    @abstractmethod
    async def do_hang_up(self, key: str) -> None:
        """Close the connections with a peer."""

    @abstractmethod
    async def do_peers(self) -> dict[str, Any]:
        """Connected peers."""

    @abstractmethod
    async def join(self, topic: str) -> None:
        """Subscribe, and have `arrived` called with each message."""

    @abstractmethod
    async def do_subscribers(self, topic: str) -> dict[str, Any]:
        """Connected peers in a topic."""

    @abstractmethod
    async def do_publish(self, topic: str, data: bytes) -> None:
        """Publish one message."""

    def pid(self) -> int | None:
        """The process that does the work; None: this one."""
        return None

    async def do_info(self) -> dict[str, Any]:
        """Key and addresses."""
        return {"key": self.key, "addrs": list(self.addrs)}

    async def do_dial(self, addr: str) -> dict[str, Any]:
        """Connect, and how long that took."""
        start = time.perf_counter()
        with trio.fail_after(_OPEN_S):
            await self.connect(addr)
        return {"seconds": time.perf_counter() - start}

    async def do_redial(self, addr: str, count: int) -> dict[str, Any]:
        """Connect and hang up, again and again."""
        from multiaddr import Multiaddr

        key, times = key_of_peer_id(Multiaddr(addr).get_peer_id()), []
        for _ in range(count):
            times.append((await self.do_dial(addr))["seconds"] * 1000)
            await self.do_hang_up(key)
        return {"ms": times}

    async def do_cpu(self) -> dict[str, Any]:
        """CPU time and memory."""
        process = psutil.Process(self.pid())
        used = process.cpu_times()
        return {"seconds": used.user + used.system, "rss_bytes": process.memory_info().rss}

    # -- gossip

    async def do_subscribe(self, topic: str, report: bool = False) -> None:
        """Receive a topic."""
        self._topics[topic] = _Topic(report)
        await self.join(topic)

    def arrived(self, topic: str, author: str, data: bytes) -> None:
        """An implementation received a message."""
        known = self._topics[topic]
        known.count += 1
        if known.report:
            self.report(topic, author, data)
        elif len(data) >= HEAD_BYTES:
            known.latencies_ms.append((time.monotonic_ns() - int.from_bytes(data[:8], "big")) / 1e6)

    async def do_received(self, topic: str, clear: bool = False) -> dict[str, Any]:
        """What has arrived on a topic."""
        known = self._topics[topic]
        result = {"count": known.count, "latencies_ms": known.latencies_ms}
        if clear:
            known.count, known.latencies_ms = 0, []
        return result

    async def do_publish_many(self, topic: str, count: int, size: int, rate_per_s: float = 0.0) -> dict[str, Any]:
        """Messages with a time stamp, evenly."""
        start, filler = time.perf_counter(), bytes(max(0, size - HEAD_BYTES))
        for number in range(count):
            if rate_per_s:
                await trio.sleep(max(0.0, start + number / rate_per_s - time.perf_counter()))
            head = time.monotonic_ns().to_bytes(8, "big") + number.to_bytes(4, "big")
            await self.do_publish(topic, head + filler)
        return {"seconds": time.perf_counter() - start}

    # -- streams

    async def do_ping(self, key: str) -> dict[str, Any]:
        """Round trip of 32 bytes."""
        stream = await self._open(key, "/ipfs/ping/1.0.0")
        start, data = time.perf_counter(), bytes(range(32))
        await stream.send_some(data)
        if await receive_exactly(stream, 32) != data:
            raise PeerFailed("the ping came back changed")
        elapsed = time.perf_counter() - start
        await stream.aclose()
        return {"ms": elapsed * 1000}

    async def do_identify(self, key: str) -> dict[str, Any]:
        """Ask the peer who it is, and read the answer (https://github.com/libp2p/specs/tree/master/identify)."""
        from benchmarks.peers import protobuf

        stream = await self._open(key, "/ipfs/id/1.0.0")
        parts: list[bytes] = []
        await _receive_all(stream, parts.append)
        await stream.aclose()
        told = protobuf.decode(protobuf.undelimited(b"".join(parts)))
        return {"key": told[1][0][4:].hex(), **protobuf.identified(told)}

    async def do_send(self, key: str, size: int, chunk: int, half_close: bool = True) -> dict[str, Any]:
        """To the sink."""
        start, answer = time.perf_counter(), bytearray()
        await self._converse(key, SINK, size, chunk, half_close, answer.extend)
        return {"seconds": time.perf_counter() - start, "count": int.from_bytes(answer, "big")}

    async def do_digest(self, key: str, size: int, chunk: int, half_close: bool = True) -> dict[str, Any]:
        """To the digest."""
        answer = bytearray()
        await self._converse(key, DIGEST, size, chunk, half_close, answer.extend)
        return {"digest": answer.hex()}

    async def do_echo(self, key: str, size: int, chunk: int, half_close: bool = True) -> dict[str, Any]:
        """There and back."""
        digest = hashlib.sha256()
        await self._converse(key, ECHO, size, chunk, half_close, digest.update)
        return {"digest": digest.hexdigest()}

    async def _converse(
        self, key: str, protocol: str, size: int, chunk: int, half_close: bool, consume: Callable[[bytes], object]
    ) -> None:
        stream = await self._open(key, protocol)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_receive_all, stream, consume)
            await stream.send_some(size.to_bytes(8, "big"))
            await _send_content(stream, size, chunk)
            if half_close:
                await stream.send_eof()
        await stream.aclose()

    async def do_fetch(
        self, key: str, size: int, chunk: int, digest: bool = False, half_close: bool = True
    ) -> dict[str, Any]:
        """From the flood."""
        start, received, hashed = time.perf_counter(), 0, hashlib.sha256()
        stream = await self._open(key, FLOOD)
        await stream.send_some(size.to_bytes(8, "big") + chunk.to_bytes(4, "big"))
        if half_close:
            await stream.send_eof()
        while data := await stream.receive_some(_READ_BYTES):
            received += len(data)
            if digest:
                hashed.update(data)
        await stream.aclose()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "count": received, "digest": hashed.hexdigest() if digest else ""}

    async def do_request(self, key: str, count: int, size: int, half_close: bool = True) -> dict[str, Any]:
        """Frames, each on a stream of its own."""
        times, frame = [], size.to_bytes(4, "big") + b"".join(content(size, max(size, 1)))
        for _ in range(count):
            start = time.perf_counter()
            await self.exchange(key, frame, half_close)
            times.append((time.perf_counter() - start) * 1000)
        return {"ms": times}

    async def exchange(self, key: str, frame: bytes, half_close: bool) -> None:
        """One frame there and back on a new stream."""
        stream = await self._open(key, FRAME)
        await stream.send_some(frame)
        if half_close:
            await stream.send_eof()
        if await receive_exactly(stream, len(frame)) != frame:
            raise PeerFailed("another frame came back")
        await stream.aclose()

    async def do_provoke_reset(self, key: str) -> None:
        """A stream that the peer resets."""
        stream = await self._open(key, RESET)
        try:
            await stream.send_some(bytes(1000))
            data = await stream.receive_some(1)
        except StreamWasReset:
            return
        raise PeerFailed(f"the stream went on with {data!r} instead of a reset")

    async def do_send_and_reset(self, key: str, size: int) -> None:
        """A stream that we reset after `size` of the bytes that we announced."""
        stream = await self._open(key, ECHO)
        await stream.send_some((2 * size).to_bytes(8, "big"))
        await _send_content(stream, size, 65536)
        await receive_exactly(stream, 1)
        await stream.reset()

    async def _open(self, key: str, protocol: str) -> ByteStream:
        with trio.fail_after(_OPEN_S):
            return await self.open(key, protocol)


class LocalPeer(Peer):
    """A peer in this process."""

    def __init__(self, name: str, operations: Operations) -> None:
        super().__init__()
        self.name, self.key, self.addrs = name, operations.key, operations.addrs
        self._operations = operations
        operations.report = lambda *message: self._report.send_nowait(Message(*message))

    async def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Do an operation; raises PeerFailed."""
        try:
            return await self._operations.operate(operation, **arguments)
        except (StreamWasReset, trio.TooSlowError) as error:
            raise PeerFailed(f"{self.name}, {operation}: {error!r}") from None


def key_of_peer_id(peer_id: str) -> str:
    """The hex of the ed25519 key in a peer id (base58 text)."""
    import base58

    return base58.b58decode(peer_id)[6:].hex()


def peer_id_of_key(key: str) -> bytes:
    """The bytes of the peer id of a key given as hex: identity multihash of its protobuf encoding."""
    return bytes.fromhex("002408011220" + key)
