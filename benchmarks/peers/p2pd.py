"""go-libp2p under control: its daemon `p2pd`, driven over a Unix socket
(https://github.com/libp2p/go-libp2p-daemon/blob/master/specs/CONTROL.md).

Every request is a connection of its own, a length-delimited protobuf message there and one back; a stream is such a
connection that goes on as the stream's bytes.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import base58
import trio
from multiaddr import Multiaddr
from nacl.signing import SigningKey

from benchmarks.peers import install
from benchmarks.peers.interface import CIRCUIT, RESET, Message, Peer, PeerConfig, PeerFailed
from benchmarks.peers.operations import (
    HANDLERS,
    ByteStream,
    Operations,
    StreamWasReset,
    peer_id_of_key,
    receive_exactly,
)
from benchmarks.peers.protobuf import decode, encode, split, varint

log = logging.getLogger(__name__)

_START_S = 30.0
_READ_BYTES = 256 * 1024

# Request.Type and the number of the request's own message in Request
_IDENTIFY, _CONNECT, _STREAM_OPEN, _STREAM_HANDLER, _LIST_PEERS, _DISCONNECT, _PUBSUB = 0, 1, 2, 3, 5, 7, 8
_UNIX = bytes.fromhex("9003")  # the code of /unix in a multiaddr
_BODY = {_CONNECT: 2, _STREAM_OPEN: 3, _STREAM_HANDLER: 4, _DISCONNECT: 7, _PUBSUB: 8}
_PS_LIST_PEERS, _PS_PUBLISH, _PS_SUBSCRIBE = 1, 2, 3


class _GoStream:
    """A stream of the daemon, as its Unix socket.

    The daemon closes all of the socket when the other side finishes sending, and all of the stream when the socket's
    client does: no half-close. A reset by the other side looks like the end.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, b"" at the end."""
        try:
            return bytes(await self._stream.receive_some(max_bytes or _READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamWasReset from None

    async def send_some(self, data: bytes | memoryview) -> None:
        """All of `data`."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamWasReset from None

    async def send_eof(self) -> None:
        """Finish sending."""
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamWasReset from None

    async def aclose(self) -> None:
        """Finish."""
        await self._stream.aclose()

    async def reset(self) -> None:
        """The daemon has no request for it; it resets when the socket ends with bytes that nobody has read."""
        await trio.aclose_forcefully(self._stream)

    async def read_message(self) -> bytes:
        """A length-delimited message, and not a byte of what follows; raises PeerFailed at the end."""
        size = shift = 0
        while True:
            byte = (await receive_exactly(self, 1))[0]
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return await receive_exactly(self, size)


class P2pd(Peer, Operations):
    """A running daemon; made by `go_peer`."""

    name = "go-libp2p"
    half_closes = False

    def __init__(self, process: trio.Process, place: Path, nursery: trio.Nursery) -> None:
        Peer.__init__(self)
        Operations.__init__(self)
        self.process = process
        self._place, self._nursery = place, nursery
        self.report = lambda topic, author, data: self._report.send_nowait(Message(topic, author, data))

    async def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Do an operation; raises PeerFailed."""
        try:
            return await self.operate(operation, **arguments)
        except (StreamWasReset, trio.TooSlowError, OSError) as error:
            raise PeerFailed(f"{self.name}, {operation}: {error!r}") from None

    def pid(self) -> int:
        """The daemon's."""
        return self.process.pid

    async def _ask(self, kind: int, *fields: tuple[int, Any]) -> tuple[dict[int, list[Any]], _GoStream]:
        """Send a request; the response, and the connection that goes on. Raises PeerFailed with its reason."""
        stream = _GoStream(await trio.open_unix_socket(str(self._place / "control")))
        body = ((_BODY[kind], encode(*fields)),) if kind in _BODY else ()
        request = encode((1, kind), *body)
        await stream.send_some(varint(len(request)) + request)
        response = decode(await stream.read_message())
        if response[1] != [0]:
            await stream.aclose()
            reason = decode(response[2][0])[1][0].decode() if response[2] else "no reason"
            raise PeerFailed(f"{self.name}: {reason}")
        return response, stream

    async def _request(self, kind: int, *fields: tuple[int, Any]) -> dict[int, list[Any]]:
        response, stream = await self._ask(kind, *fields)
        await stream.aclose()
        return response

    # -- start

    async def start(self) -> None:
        """Wait for the daemon, learn who it is, and serve the stream protocols."""
        identity = decode((await self._first_answer())[4][0])
        self.key = identity[1][0][6:].hex()
        peer_id = Multiaddr(b"\xa5\x03" + varint(len(identity[1][0])) + identity[1][0])
        self.addrs = tuple(f"{Multiaddr(address)}{peer_id}" for address in identity[2])
        await self._serve_streams()

    async def _first_answer(self) -> dict[int, list[Any]]:
        with trio.move_on_after(_START_S):
            while self.process.poll() is None:
                try:
                    return await self._request(_IDENTIFY)
                except OSError:  # not yet
                    await trio.sleep(0.02)
        raise PeerFailed("p2pd did not start; its stderr says why")

    async def _serve_streams(self) -> None:
        path = str(self._place / "streams")
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(path)
        listener.listen(1024)
        accept = partial(trio.serve_listeners, self._serve, [trio.SocketListener(listener)])
        self._nursery.start_soon(accept)
        address = _UNIX + varint(len(path)) + path.encode()  # multiaddr of Python loses the leading slash
        await self._request(_STREAM_HANDLER, (1, address), *((2, name) for name in HANDLERS), (3, 0))

    async def _serve(self, socket: trio.SocketStream) -> None:
        stream = _GoStream(socket)
        try:
            info = decode(await stream.read_message())
            await HANDLERS[info[3][0].decode()](stream)
            await stream.aclose()
        except (StreamWasReset, PeerFailed, OSError) as error:
            log.debug("a stream to p2pd ended: %r", error)
            await stream.reset()

    # -- operations

    async def connect(self, addr: str) -> None:
        """Connect with the peer at a multiaddr."""
        transport, _, peer = addr.rpartition("/p2p/")
        await self._request(_CONNECT, (1, base58.b58decode(peer)), (2, Multiaddr(transport).to_bytes()), (3, 10))

    async def do_hang_up(self, key: str) -> None:
        """Close the connections with a peer."""
        await self._request(_DISCONNECT, (1, peer_id_of_key(key)))

    async def do_peers(self) -> dict[str, Any]:
        """Connected peers."""
        response = await self._request(_LIST_PEERS)
        return {"keys": [decode(peer)[1][0][6:].hex() for peer in response[6]]}

    async def open(self, key: str, protocol: str) -> ByteStream:
        """A stream to a peer."""
        _response, stream = await self._ask(_STREAM_OPEN, (1, peer_id_of_key(key)), (2, protocol), (3, 10))
        return stream

    async def do_provoke_reset(self, key: str) -> None:
        """A stream that the peer resets; the daemon does not tell a reset from an end."""
        stream = await self.open(key, RESET)
        try:
            await stream.send_some(bytes(1000))
            if data := await stream.receive_some(1):
                raise PeerFailed(f"the stream went on with {data!r}")
        except StreamWasReset:
            pass

    async def join(self, topic: str) -> None:
        """Subscribe."""
        _response, stream = await self._ask(_PUBSUB, (1, _PS_SUBSCRIBE), (2, topic))
        self._nursery.start_soon(self._take, topic, stream)

    async def _take(self, topic: str, stream: _GoStream) -> None:
        """In large parts: the daemon drops what its subscriber has not read, beyond 32 messages."""
        received = b""
        try:
            while data := await stream.receive_some():
                messages, received = split(received + data)
                for message in map(decode, messages):
                    author = message[1][0][6:].hex()
                    if author != self.key:  # it hears itself
                        self.arrived(topic, author, (message[2] or [b""])[0])
        except StreamWasReset:
            log.debug("the subscription of %s ended", topic)

    async def do_subscribers(self, topic: str) -> dict[str, Any]:
        """Connected peers in a topic."""
        response = await self._request(_PUBSUB, (1, _PS_LIST_PEERS), (2, topic))
        return {"keys": [peer[6:].hex() for peer in decode((response[7] or [b""])[0])[2]]}

    async def do_publish(self, topic: str, data: bytes) -> None:
        """Publish one message."""
        await self._request(_PUBSUB, (1, _PS_PUBLISH), (2, topic), (3, data))


@asynccontextmanager
async def go_peer(config: PeerConfig | None = None) -> AsyncIterator[P2pd]:
    """``async with go_peer() as peer``: go-libp2p's daemon. Raises install.Unavailable and PeerFailed."""
    config = config or PeerConfig()
    daemon = install.p2pd()
    with tempfile.TemporaryDirectory(prefix="p2pd-") as scratch:
        place = Path(scratch)
        start = partial(
            trio.run_process, [str(daemon), *_options(config, place)], stdout=subprocess.DEVNULL, check=False
        )
        async with trio.open_nursery() as nursery:
            process = await nursery.start(start)
            peer = P2pd(process, place, nursery)
            try:
                await peer.start()
                yield peer
            finally:
                process.kill()
                nursery.cancel_scope.cancel()


def _options(config: PeerConfig, place: Path) -> list[str]:
    relays = [address.removesuffix(CIRCUIT) for address in config.listen if address.endswith(CIRCUIT)]
    options = {
        "listen": f"/unix{place / 'control'}",
        "hostAddrs": ",".join(address for address in config.listen if not address.endswith(CIRCUIT)),
        "pubsub": True,
        "pubsubRouter": "gossipsub",
        "tls": False,
        "relay": True,
        "relayService": config.relay_server,
        "forceReachabilityPublic": config.relay_server,  # offers relaying only when it thinks that it is reachable
        "connManager": False,
        **config.gossipsub,
    }
    if relays:
        options |= {"autoRelay": True, "relayDiscovery": False, "trustedRelays": ",".join(relays)}
        options |= {"forceReachabilityPrivate": True, "dhtClient": True}  # it insists on the DHT, which finds nobody
    if config.seed is not None:
        key = place / "key"
        public = bytes(SigningKey(config.seed).verify_key)
        key.write_bytes(encode((1, 1), (2, config.seed + public)))  # crypto.proto's PrivateKey, Ed25519
        options["id"] = str(key)
    return [f"-{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]
