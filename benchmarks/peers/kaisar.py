"""This project's mesh under control, in a process of its own; topics are called ``/kaisar/peers/<name>/1`` outside."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import trio

from benchmarks.peers import control
from benchmarks.peers.interface import CIRCUIT, NETWORK, PeerConfig, PeerFailed
from benchmarks.peers.operations import HANDLERS, ByteStream, Operations, StreamWasReset
from kaisar_p2p.errors import KaisarError, RequestFailed
from kaisar_p2p.mesh import GossipMessage, Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh, peer_of
from kaisar_p2p.mesh.discovery.addresses import parse_any
from kaisar_p2p.wire.verdict import Verdict

_MANY = 1_000_000
_LIMITS = MeshLimits(connections_per_address=160, opens_per_s=_MANY, opens_burst=_MANY)
_OPEN_S = 10.0
_FRAME_BYTES = 1 << 20
_T = TypeVar("_T")


def config_of(config: PeerConfig) -> MeshConfig:
    """The mesh's configuration."""
    return MeshConfig(
        listen=tuple(address for address in config.listen if not address.endswith(CIRCUIT)),
        network=NETWORK,
        pre_shared_key=config.pre_shared_key,
        relay=config.relay_server,
        upnp=False,
        mdns=False,
        limits=replace(_LIMITS, **config.limits),
    )


class _Stream:
    """A mesh stream, with the errors of `ByteStream`."""

    def __init__(self, stream: MeshStream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, b"" at the end."""
        return await _checked(self._stream.receive_some(max_bytes))

    async def send_some(self, data: bytes | memoryview) -> None:
        """All of `data`."""
        await _checked(self._stream.send_some(data))

    async def send_eof(self) -> None:
        """Finish sending."""
        await _checked(self._stream.send_eof())

    async def aclose(self) -> None:
        """Finish."""
        await self._stream.aclose()

    async def reset(self) -> None:
        """End it."""
        await self._stream.reset()


async def _checked(call: Awaitable[_T]) -> _T:
    try:
        return await call
    except RequestFailed:
        raise StreamWasReset from None


class KaisarPeer(Operations):
    """The operations of a mesh."""

    def __init__(self, mesh: Mesh, nursery: trio.Nursery) -> None:
        super().__init__()
        self.mesh, self._nursery = mesh, nursery
        self.key, self.addrs = mesh.key.hex(), mesh.addrs
        for protocol, handler in HANDLERS.items():
            mesh.serve(
                protocol, partial(self._serve, handler), max_frame_bytes=_FRAME_BYTES, per_peer=_MANY, rate_per_s=_MANY
            )

    async def _serve(self, handler: Callable[[ByteStream], Awaitable[None]], stream: MeshStream) -> None:
        try:
            await handler(_Stream(stream))
        except (StreamWasReset, PeerFailed):
            await stream.reset()

    async def open(self, key: str, protocol: str) -> ByteStream:
        """A stream to a peer."""
        peer = bytes.fromhex(key)
        try:
            stream = await self.mesh.open_stream(peer, protocol, timeout_s=_OPEN_S, max_frame_bytes=_FRAME_BYTES)
        except KaisarError as error:
            raise PeerFailed(str(error)) from None
        return _Stream(stream)

    async def connect(self, addr: str) -> None:
        """Connect with the peer at a multiaddr."""
        address, key = parse_any(addr)
        if key is None:
            raise PeerFailed(f"{addr} names no peer")
        try:
            await self.mesh._network.dial(key, [address])
        except KaisarError as error:
            raise PeerFailed(str(error)) from None

    async def do_hang_up(self, key: str) -> None:
        """Close the connections with a peer."""
        for connection in self.mesh._network.connections_with(bytes.fromhex(key)):
            await connection.close()
            await connection.event_closed.wait()

    async def do_peers(self) -> dict[str, Any]:
        """Connected peers."""
        return {"keys": [peer.key.hex() for peer in self.mesh.peers()]}

    async def do_subscribers(self, topic: str) -> dict[str, Any]:
        """Connected peers in a topic."""
        return {"keys": [key.hex() for key in self.mesh.subscribers(_short(topic))]}

    async def join(self, topic: str) -> None:
        """Subscribe."""
        self._nursery.start_soon(self._take, topic, self.mesh.subscribe(_short(topic), _accept, queue=4096))

    async def _take(self, topic: str, messages: trio.MemoryReceiveChannel[GossipMessage]) -> None:
        async for message in messages:
            self.arrived(topic, message.author.hex(), message.data)

    async def do_publish(self, topic: str, data: bytes) -> None:
        """Publish one message."""
        await self.mesh.publish(_short(topic), data)


def _accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


def _short(topic: str) -> str:
    return topic.removeprefix(f"/kaisar/{NETWORK}/").removesuffix("/1")


@asynccontextmanager
async def open_peer(config: PeerConfig) -> AsyncIterator[KaisarPeer]:
    """A mesh under control in this process; with reservations at the relays that it is to listen at."""
    async with (
        open_mesh(config_of(config), config.seed or secrets.token_bytes(32)) as mesh,
        trio.open_nursery() as tasks,
    ):
        for address in config.listen:
            if address.endswith(CIRCUIT):
                relay = address.removesuffix(CIRCUIT)
                mesh.keep_connected(peer_of(relay)[0], [relay], asked_for=True)
                mesh._relaying.client.want(True)
        yield KaisarPeer(mesh, tasks)
        tasks.cancel_scope.cancel()


async def main() -> None:
    """Run until stdin ends."""
    async with open_peer(control.config_of_command_line()) as peer:
        await control.serve(peer)


if __name__ == "__main__":
    trio.run(main)
