"""py-libp2p as it is published, under control, with settings under which it works at all.

Nothing of this project's mesh is imported, so nothing is patched; the one exception is ``fastecdsa``, a package for
P-256 keys that needs a C compiler to install, which is replaced by a mock where it is absent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from importlib import util
from typing import Any
from unittest.mock import MagicMock

import trio

if util.find_spec("fastecdsa") is None:
    for _name in ("fastecdsa", "fastecdsa.encoding", "fastecdsa.encoding.sec1"):
        sys.modules[_name] = MagicMock()
logging.basicConfig = lambda **_options: None  # the library configures the root logger, which then prints everything

from libp2p import new_host  # noqa: E402
from libp2p.abc import IHost, INetStream  # noqa: E402
from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: E402
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519  # noqa: E402
from libp2p.custom_types import TProtocol  # noqa: E402
from libp2p.network.config import ConnectionConfig  # noqa: E402
from libp2p.network.stream.exceptions import StreamEOF, StreamError, StreamReset  # noqa: E402
from libp2p.peer.id import ID  # noqa: E402
from libp2p.peer.peerinfo import info_from_p2p_addr  # noqa: E402
from libp2p.pubsub.gossipsub import GossipSub  # noqa: E402
from libp2p.pubsub.pubsub import Pubsub  # noqa: E402
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE  # noqa: E402
from libp2p.security.noise.transport import Transport  # noqa: E402
from libp2p.stream_muxer.exceptions import MuxedStreamError  # noqa: E402
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX  # noqa: E402
from libp2p.stream_muxer.yamux.yamux import Yamux  # noqa: E402
from libp2p.tools.anyio_service import background_trio_service  # noqa: E402
from multiaddr import Multiaddr  # noqa: E402

from benchmarks.peers import control  # noqa: E402
from benchmarks.peers.interface import PeerFailed  # noqa: E402
from benchmarks.peers.operations import HANDLERS, ByteStream, Operations, StreamWasReset, peer_id_of_key  # noqa: E402

_READ_BYTES = 256 * 1024


class _Stream:
    """The library's stream, with the errors of `ByteStream`."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, b"" at the end."""
        try:
            return bytes(await self._stream.read(max_bytes or _READ_BYTES))
        except StreamEOF:
            return b""
        except (StreamReset, StreamError, MuxedStreamError):
            raise StreamWasReset from None

    async def send_some(self, data: bytes | memoryview) -> None:
        """All of `data`."""
        try:
            await self._stream.write(bytes(data))
        except (StreamReset, StreamError, MuxedStreamError):
            raise StreamWasReset from None

    async def send_eof(self) -> None:
        """Finish sending."""
        await self._stream.close_write()  # type: ignore[attr-defined]

    async def aclose(self) -> None:
        """Finish."""
        await self._stream.close()

    async def reset(self) -> None:
        """End it."""
        await self._stream.reset()


class StockPeer(Operations):
    """The operations of the library's host."""

    def __init__(self, host: IHost, pubsub: Pubsub, nursery: trio.Nursery) -> None:
        super().__init__()
        self._host, self._pubsub, self._nursery = host, pubsub, nursery
        self.key = host.get_public_key().to_bytes().hex()
        self.addrs = tuple(map(str, host.get_addrs()))
        for protocol, handler in HANDLERS.items():
            host.set_stream_handler(TProtocol(protocol), self._server(handler))

    def _server(self, handler: Callable[[ByteStream], Awaitable[None]]) -> Callable[[INetStream], Awaitable[None]]:
        async def serve(stream: INetStream) -> None:
            try:
                await handler(_Stream(stream))
                await stream.close()
            except (StreamWasReset, PeerFailed):
                await stream.reset()

        return serve

    async def open(self, key: str, protocol: str) -> ByteStream:
        """A stream to a peer."""
        return _Stream(await self._host.new_stream(ID(peer_id_of_key(key)), [TProtocol(protocol)]))

    async def connect(self, addr: str) -> None:
        """Connect with the peer at a multiaddr."""
        await self._host.connect(info_from_p2p_addr(Multiaddr(addr)))

    async def do_hang_up(self, key: str) -> None:
        """Close the connections with a peer."""
        await self._host.disconnect(ID(peer_id_of_key(key)))

    async def do_peers(self) -> dict[str, Any]:
        """Connected peers."""
        return {"keys": [peer.to_bytes()[6:].hex() for peer in self._host.get_connected_peers()]}

    async def do_subscribers(self, topic: str) -> dict[str, Any]:
        """Connected peers in a topic."""
        return {"keys": [peer.to_bytes()[6:].hex() for peer in self._pubsub.peer_topics.get(topic, ())]}

    async def join(self, topic: str) -> None:
        """Subscribe."""
        self._nursery.start_soon(self._take, topic, await self._pubsub.subscribe(topic))

    async def _take(self, topic: str, subscription: Any) -> None:
        while True:
            message = await subscription.get()
            author = message.from_id[6:].hex()
            if author != self.key:
                self.arrived(topic, author, message.data)

    async def do_publish(self, topic: str, data: bytes) -> None:
        """Publish one message."""
        await self._pubsub.publish(topic, data)


async def main() -> None:
    """Run until stdin ends."""
    config = control.config_of_command_line()
    pair = create_new_key_pair(config.seed)
    host = new_host(
        key_pair=pair,
        sec_opt={NOISE: Transport(pair, noise_privkey=create_x25519().private_key)},
        muxer_opt={TProtocol(YAMUX): Yamux},
        connection_config=ConnectionConfig(
            max_connections=300, min_connections=50, low_watermark=50, high_watermark=200
        ),
    )
    gossip = GossipSub(
        [TProtocol("/meshsub/1.1.0")],
        6,
        4,
        12,
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
        **config.gossipsub,
    )
    pubsub = Pubsub(host, gossip, strict_signing=True)
    async with (
        host.run([Multiaddr(address) for address in config.listen]),
        background_trio_service(pubsub),
        background_trio_service(gossip),
        trio.open_nursery() as nursery,
    ):
        await pubsub.wait_until_ready()
        await control.serve(StockPeer(host, pubsub, nursery))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
