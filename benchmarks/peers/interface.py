"""What every peer under control can do, and what its streams carry.

Peers are named by the hex of their ed25519 public keys. Stream protocols, which all end with the server's half-close:

======================  ==================================================================
`/peers/echo/1`         is told a size (8 bytes, big-endian), sends so many bytes back
`/peers/sink/1`         is told a size, answers the number of bytes that came (8 bytes)
`/peers/digest/1`       is told a size, answers the SHA-256 of so many bytes
`/peers/flood/1`        is told size (8 bytes) and chunk (4 bytes), sends `content(size)`
`/peers/frame/1`        one frame (length of 4 bytes, big-endian) is answered by the same
`/peers/reset/1`        resets when the first byte comes
======================  ==================================================================
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import trio

ECHO, SINK, DIGEST = "/peers/echo/1", "/peers/sink/1", "/peers/digest/1"
FLOOD, FRAME, RESET = "/peers/flood/1", "/peers/frame/1", "/peers/reset/1"

CIRCUIT = "/p2p-circuit"  # behind a relay's address: where to listen, and with a peer id behind it, whom to dial
NETWORK = "peers"  # of this project's mesh when it is under control

PERIOD = 251  # of the content of streams: a prime, so that parts that swap places are noticed
LARGEST_CHUNK = 1 << 20
_PATTERN = memoryview(bytes(range(PERIOD)) * (LARGEST_CHUNK // PERIOD + 2))

HEAD_BYTES = 12  # of a message of `publish_many`: the machine's monotonic clock in ns (8 bytes), a counter (4 bytes)


class PeerFailed(Exception):
    """A foreign peer could not do what it was asked, in its own words."""


def topic(name: str) -> str:
    """The name of a topic as every implementation knows it."""
    return f"/kaisar/{NETWORK}/{name}/1"


def content(size: int, chunk: int) -> Iterator[memoryview]:
    """The bytes of a stream, `chunk` at a time."""
    for start in range(0, size, chunk):
        offset = start % PERIOD
        yield _PATTERN[offset : offset + min(chunk, size - start)]


def digest_of(size: int) -> str:
    """SHA-256 of `size` bytes of content, as hex."""
    digest = hashlib.sha256()
    for part in content(size, LARGEST_CHUNK):
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class PeerConfig:
    """How a peer is started. Not every implementation knows every setting; it ignores the others.

    `seed` (32 bytes) is that of its key; `announce` replaces the addresses that it tells; `relay_server` offers circuit
    relay v2, `relay_client` can dial and listen through relays (``<relay's address>/p2p-circuit`` in `listen`);
    `gossipsub` are options in the implementation's own words, `limits` those of this project's mesh that differ.
    """

    seed: bytes | None = None
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    pre_shared_key: bytes | None = None
    relay_server: bool = False
    relay_client: bool = False
    dcutr: bool = False
    gossipsub: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """With bytes as hex."""
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Message:
    """A gossip message that a peer reported; `author` is a key as hex."""

    topic: str
    author: str
    data: bytes


class Peer(ABC):
    """A running peer.

    `call` asks for any operation by its name; the methods below are the operations that all implementations have.
    They raise PeerFailed. Sizes are bytes. `half_close`: the opener finishes sending before the answer, for which both
    sides must be fit (`half_closes`).
    """

    name: str
    key: str
    half_closes = True  # it hears an answer after its half-close, and gives one after the other side's
    addrs: tuple[str, ...]

    def __init__(self) -> None:
        self._report, self.messages = trio.open_memory_channel[Message](100_000)

    @abstractmethod
    async def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Ask the peer for an operation and wait for its result; raises PeerFailed."""

    async def dial(self, addr: str) -> float:
        """Connect with the peer at a multiaddr that ends with its peer id; the seconds it took."""
        return float((await self.call("dial", addr=addr))["seconds"])

    async def redial(self, addr: str, count: int) -> list[float]:
        """Connect and hang up again `count` times; milliseconds of each connection."""
        return list((await self.call("redial", addr=addr, count=count))["ms"])

    async def hang_up(self, key: str) -> None:
        """Close the connections with a peer."""
        await self.call("hang_up", key=key)

    async def peers(self) -> list[str]:
        """Keys of the connected peers."""
        return list((await self.call("peers"))["keys"])

    async def identify(self, key: str) -> dict[str, Any]:
        """What identify tells of a peer: `agent`, `protocol_version`, `protocols`, `addresses`, `observed`."""
        return await self.call("identify", key=key)

    async def ping(self, key: str) -> float:
        """Round trip in milliseconds."""
        return float((await self.call("ping", key=key))["ms"])

    async def subscribe(self, topic: str, *, report: bool = False) -> None:
        """Receive a topic: `report` puts the messages into `messages`, else they are counted."""
        await self.call("subscribe", topic=topic, report=report)

    async def subscribers(self, topic: str) -> list[str]:
        """Keys of the connected peers that are subscribed."""
        return list((await self.call("subscribers", topic=topic))["keys"])

    async def publish(self, topic: str, data: bytes) -> None:
        """Sign and publish one message."""
        await self.call("publish", topic=topic, data=data)

    async def publish_many(self, topic: str, *, count: int, size: int, rate_per_s: float = 0.0) -> float:
        """Publish `count` messages with a time stamp, evenly (0: as fast as it can); the seconds it took."""
        result = await self.call("publish_many", topic=topic, count=count, size=size, rate_per_s=rate_per_s)
        return float(result["seconds"])

    async def received(self, topic: str, *, clear: bool = False) -> tuple[int, list[float]]:
        """Messages counted on a topic, and the latencies in milliseconds of those with a time stamp."""
        result = await self.call("received", topic=topic, clear=clear)
        return int(result["count"]), list(result["latencies_ms"])

    async def send(self, key: str, size: int, chunk: int, *, half_close: bool = True) -> float:
        """Write `size` bytes, `chunk` at a time, to the peer's sink; seconds until it has counted them."""
        result = await self.call("send", key=key, size=size, chunk=chunk, half_close=half_close)
        if result["count"] != size:
            raise PeerFailed(f"{result['count']} of {size} bytes arrived")
        return float(result["seconds"])

    async def digest(self, key: str, size: int, chunk: int, *, half_close: bool = True) -> str:
        """As `send`; SHA-256 of what the peer received."""
        return str((await self.call("digest", key=key, size=size, chunk=chunk, half_close=half_close))["digest"])

    async def fetch(
        self, key: str, size: int, chunk: int, *, digest: bool = False, half_close: bool = True
    ) -> dict[str, Any]:
        """Have the peer send `size` bytes: `count`, `seconds` and, if asked for, the `digest` of what came."""
        return await self.call("fetch", key=key, size=size, chunk=chunk, digest=digest, half_close=half_close)

    async def echo(self, key: str, size: int, chunk: int, *, half_close: bool = True) -> str:
        """Send and receive at once; SHA-256 of what came back."""
        return str((await self.call("echo", key=key, size=size, chunk=chunk, half_close=half_close))["digest"])

    async def request(self, key: str, *, count: int, size: int, half_close: bool = True) -> list[float]:
        """Frames of `size` bytes, one after the other, each on a stream of its own; milliseconds of each."""
        result = await self.call("request", key=key, count=count, size=size, half_close=half_close)
        return list(result["ms"])

    async def provoke_reset(self, key: str) -> None:
        """Open a stream that the peer resets; PeerFailed when that is not noticed."""
        await self.call("provoke_reset", key=key)

    async def send_and_reset(self, key: str, size: int) -> None:
        """Send `size` bytes on a stream and reset it."""
        await self.call("send_and_reset", key=key, size=size)

    async def cpu(self) -> tuple[float, int]:
        """CPU seconds that the peer's process has used, and its resident memory in bytes."""
        result = await self.call("cpu")
        return float(result["seconds"]), int(result["rss_bytes"])
