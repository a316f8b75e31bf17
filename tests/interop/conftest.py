"""This project's mesh and a foreign libp2p implementation in one test; `just test-interop` runs them.

They are installed on first use (`benchmarks/peers/install.py`). Where that cannot be, the tests are skipped, but in CI
they fail.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from benchmarks.peers import install
from benchmarks.peers.interface import Peer, PeerConfig, topic
from benchmarks.peers.kaisar import open_peer
from benchmarks.peers.operations import LocalPeer
from benchmarks.peers.p2pd import go_peer
from benchmarks.peers.process import js_peer, stock_peer
from kaisar_p2p.mesh import Mesh

PATIENCE_S = 60.0
TOPIC = topic("advert")

MAKERS: dict[str, Callable[[PeerConfig], AbstractAsyncContextManager[Peer]]] = {
    "js": js_peer,
    "go": go_peer,
    "stock": stock_peer,
}


class OurPeer(LocalPeer):
    """Our mesh, in this process."""

    mesh: Mesh


@asynccontextmanager
async def _our_peer(config: PeerConfig) -> AsyncIterator[OurPeer]:
    async with open_peer(config) as operations:
        peer = OurPeer("ours", operations)
        peer.mesh = operations.mesh
        yield peer


class Lab:
    """Starts peers; all of them are gone at the end of the test."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[Peer, tuple[trio.CancelScope, trio.Event]] = {}

    async def ours(self, **config: object) -> OurPeer:
        """A node of this project."""
        return await self._nursery.start(self._run, _our_peer(PeerConfig(**config)))

    async def foreign(self, kind: str, **config: object) -> Peer:
        """A node of another implementation: "js" or "go"."""
        return await self._nursery.start(self._run, MAKERS[kind](PeerConfig(**config)))

    async def start(self, kind: str, **config: object) -> Peer:
        """A node of any kind: "ours", "js" or "go"."""
        return await (self.ours(**config) if kind == "ours" else self.foreign(kind, **config))

    async def _run(self, manager: AbstractAsyncContextManager[Peer], *, task_status: trio.TaskStatus[Peer]) -> None:
        stopped = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with manager as peer:
                    self._running[peer] = scope, stopped
                    task_status.started(peer)
                    await trio.sleep_forever()
        finally:
            stopped.set()

    async def stop(self, peer: Peer) -> None:
        """End one peer, as when its process is killed."""
        scope, stopped = self._running[peer]
        scope.cancel()
        await stopped.wait()


@pytest.fixture(scope="session")
def _installed() -> dict[str, str]:
    """Why an implementation cannot be had, by its name."""
    reasons = {}
    for kind, fetch in {"js": install.js, "go": install.p2pd}.items():
        try:
            fetch()
        except install.Unavailable as error:
            reasons[kind] = str(error)
    return reasons


def _need(kind: str, installed: dict[str, str]) -> None:
    if kind in installed:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(installed[kind])


@pytest.fixture(params=["js", "go"])
def kind(request: pytest.FixtureRequest, _installed: dict[str, str]) -> str:
    """A foreign implementation; a test that asks for it is run with each of them."""
    _need(request.param, _installed)
    return str(request.param)


@pytest.fixture
def js(_installed: dict[str, str]) -> str:
    """js-libp2p, for tests of what only it can do."""
    _need("js", _installed)
    return "js"


@pytest.fixture
def go(_installed: dict[str, str]) -> str:
    """go-libp2p, for tests of what only it can do."""
    _need("go", _installed)
    return "go"


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            yield Lab(nursery)
            nursery.cancel_scope.cancel()


@pytest.fixture
async def pair(lab: Lab, kind: str) -> tuple[OurPeer, Peer]:
    """Our node and a foreign one, connected by us."""
    ours, foreign = await lab.ours(), await lab.foreign(kind)
    await ours.dial(foreign.addrs[0])
    await eventually(lambda: _sees(foreign, ours))
    return ours, foreign


async def _sees(peer: Peer, other: Peer) -> bool:
    return other.key in await peer.peers()


async def eventually(condition: Callable[[], Awaitable[object]], within_s: float = 15.0) -> None:
    """Wait for a condition, which has to ask a peer; fails the test when it never holds."""
    with trio.fail_after(within_s):
        while not await condition():  # noqa: ASYNC110  (a foreign peer tells when it is asked)
            await trio.sleep(0.02)


def both_half_close(*peers: Peer) -> bool:
    """Streams between these peers can be finished in one direction and go on in the other."""
    return all(peer.half_closes for peer in peers)


async def subscribed(*peers: Peer) -> None:
    """All of them receive `TOPIC`, from each of the others."""
    for peer in peers:
        await peer.subscribe(TOPIC, report=True)
    for sender in peers:
        for receiver in peers:
            if receiver is not sender:
                await heard(sender, receiver)


async def heard(sender: Peer, receiver: Peer) -> None:
    """Until a message of `sender` reaches `receiver`: a mesh takes a heartbeat or two."""
    with trio.fail_after(20):
        while True:
            await sender.publish(TOPIC, b"hello")
            with trio.move_on_after(0.3):
                while (await receiver.messages.receive()).author != sender.key:
                    pass
                return
