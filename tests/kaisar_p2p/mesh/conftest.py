from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import trio

from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, open_mesh
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.wire.verdict import Verdict

FAST = MeshLimits(heartbeat_s=0.1, keepalive_s=1.0, exchange_s=0.5)


def accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


async def eventually(condition: Callable[[], bool], within_s: float = 15.0) -> None:
    """Wait for a condition that other tasks bring about; fails the test when it never holds."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


class Lab:
    """Meshes on loopback, closed at the end of the test."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: dict[bytes, tuple[trio.CancelScope, trio.Event]] = {}

    async def mesh(
        self, seed: bytes | None = None, *, port: int = 0, key: bytes | None = None, **limits: object
    ) -> Mesh:
        config = MeshConfig(
            listen=(f"/ip4/127.0.0.1/tcp/{port}",),
            network="test",
            pre_shared_key=key,
            limits=replace(FAST, **limits),  # type: ignore[arg-type]
        )
        return await self._nursery.start(self._run, config, seed or os.urandom(32))

    async def _run(self, config: MeshConfig, seed: bytes, *, task_status: trio.TaskStatus[Mesh]) -> None:
        stopped = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with open_mesh(config, seed) as mesh:
                    self._scopes[mesh.key] = (scope, stopped)
                    task_status.started(mesh)
                    await trio.sleep_forever()
        finally:
            stopped.set()

    async def stop(self, mesh: Mesh) -> None:
        """End one mesh, as when its process ends."""
        scope, stopped = self._scopes[mesh.key]
        scope.cancel()
        await stopped.wait()

    async def pair(self, **limits: object) -> tuple[Mesh, Mesh]:
        """Two connected meshes."""
        first, second = await self.mesh(**limits), await self.mesh(**limits)
        second.keep_connected(first.key, first.addrs)
        with trio.fail_after(10):
            await first.wait_connected()
            await second.wait_connected()
        return first, second

    async def attacker(self, victim: Mesh) -> Connection:
        """A connection that completes the handshake and then says whatever the test wants."""
        network = Network(key_pair_of(os.urandom(32)), FAST)
        network.run_in(self._nursery)
        connection = await network.dial(victim.key, victim._own_addresses())
        await eventually(lambda: victim.is_connected(key_of(network)))
        return connection


def key_of(network: Network) -> bytes:
    return bytes(network.get_peer_id().to_bytes()[6:])


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with trio.open_nursery() as nursery:
        yield Lab(nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def internet() -> AsyncIterator[object]:
    """Meshes behind NATs and relays, see `relay_lab.Internet`."""
    from tests.kaisar_p2p.mesh.relay_lab import Internet

    async with trio.open_nursery() as nursery:
        yield Internet(nursery)
        nursery.cancel_scope.cancel()
