"""Meshes on loopback some of which nobody can dial, as behind a NAT, with relays between them."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import trio

from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh
from kaisar_p2p.mesh.connection import TcpStream
from kaisar_p2p.mesh.discovery.addresses import Address
from tests.kaisar_p2p.mesh.conftest import eventually

LIMITS = MeshLimits(heartbeat_s=0.1, keepalive_s=1.0, exchange_s=0.5, target_peers=0)


async def _echo(stream: MeshStream) -> None:
    while data := await stream.receive_some():
        await stream.send_some(data)
    await stream.send_eof()


class Internet:
    """Meshes on loopback; the hidden ones cannot be dialed by any other."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: dict[bytes, tuple[trio.CancelScope, trio.Event]] = {}
        self.hidden: set[int] = set()  # ports
        self.punchable = False  # a NAT lets in what its node dials at the same time
        self.dialed: list[tuple[int, Address]] = []  # from which node's port

    async def relay(self, **limits: object) -> Mesh:
        return await self._mesh(relay=True, limits=limits)

    async def node(self, *relays: Mesh, hidden: bool = True, reserve: bool = True, **limits: object) -> Mesh:
        """A node that is connected with the relays; a hidden one wants to have reservations at them."""
        mesh = await self._mesh(relay=False, limits=limits)
        if hidden:
            self.hidden.add(mesh._network.bound[0].port)
            mesh._relaying.client.want(reserve)
        for relay in relays:
            mesh.keep_connected(relay.key, relay.addrs)
        with trio.fail_after(10):
            await mesh.wait_connected(len(relays))
        return mesh

    async def hidden_node(self, *relays: Mesh, **limits: object) -> Mesh:
        """As `node`, with its reservations."""
        mesh = await self.node(*relays, **limits)
        await eventually(lambda: len(circuits(mesh)) == len(relays))
        return mesh

    async def _mesh(self, *, relay: bool, limits: dict[str, object]) -> Mesh:
        config = MeshConfig(relay=relay, network="test", limits=replace(LIMITS, **limits), mdns=False)  # type: ignore[arg-type]
        mesh = await self._nursery.start(self._run, config)
        dial = mesh._network.open_raw

        async def open_raw(address: Address, *, fresh_port: bool = False) -> TcpStream:
            own = mesh._network.bound[0].port
            self.dialed.append((own, address))
            if address.port in self.hidden and not await self._hole(own, address.port):
                raise OSError(errno.EHOSTUNREACH, "behind a NAT")
            return await dial(address, fresh_port=fresh_port)

        mesh._network.open_raw = open_raw  # type: ignore[method-assign]
        mesh.serve("/echo", _echo, max_frame_bytes=1 << 20, per_peer=64, rate_per_s=1000)
        return mesh

    async def _hole(self, source: int, target: int) -> bool:
        """Whether the other dials us while we dial it."""
        if not self.punchable:
            return False
        with trio.move_on_after(0.5):
            while not any(own == target and to.port == source for own, to in self.dialed):  # noqa: ASYNC110
                await trio.sleep(0.01)
            return True
        return False

    async def _run(self, config: MeshConfig, *, task_status: trio.TaskStatus[Mesh]) -> None:
        stopped = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with open_mesh(config, os.urandom(32)) as mesh:
                    self._scopes[mesh.key] = (scope, stopped)
                    task_status.started(mesh)
                    await trio.sleep_forever()
        finally:
            stopped.set()

    async def stop(self, mesh: Mesh) -> None:
        scope, stopped = self._scopes[mesh.key]
        scope.cancel()
        await stopped.wait()


async def echoed(mesh: Mesh, peer: Mesh, data: bytes = b"hello", deadline_s: float = 10) -> bytes:
    """What a peer sends back to these bytes, over a new stream."""
    with trio.fail_after(deadline_s):
        async with await mesh.open_stream(peer.key, "/echo", timeout_s=deadline_s, max_frame_bytes=1024) as stream:
            received = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_all, stream, data)
                while part := await stream.receive_some():
                    received += part
            return received


async def _send_all(stream: MeshStream, data: bytes) -> None:
    await stream.send_some(data)
    await stream.send_eof()


def relayed(mesh: Mesh, peer: Mesh) -> list[bool]:
    """Whether a mesh is connected with a peer over a relay, as it says itself."""
    return [info.relayed for info in mesh.peers() if info.key == peer.key]


def introduce(asker: Mesh, hidden: Mesh) -> None:
    """Tell a mesh the addresses of a hidden one over its relays."""
    asker.add_addresses(hidden.key, circuits(hidden))


def circuits(mesh: Mesh) -> list[str]:
    """Those of its addresses that lead over relays."""
    return [address for address in mesh.addrs if "p2p-circuit" in address]
