"""Parts of a running node: meshes on loopback, a ledger with short blocks, effects that record."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from nacl.signing import SigningKey

from kaisar_p2p.ledger import ED25519, ChainParameters, EmbeddedLedger, open_embedded
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, open_mesh
from kaisar_p2p.wire.crypto import KeyPair
from node.chain import Chain
from node.clock import Clock
from node.effects import NodeEffects
from node.inbox import Inbox
from protocols.actions import Event
from protocols.genesis import Allocation, Genesis, write_genesis
from protocols.params import KAI

PATIENCE_S = 20.0
"""How long a test waits for something that must come; it never passes in a green run."""


@dataclass
class SmallWallet:
    """An ed25519 wallet made of a small number."""

    number: int = 1
    scheme: int = ED25519
    key: SigningKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = SigningKey(bytes([self.number]) * 32)

    @property
    def public_key(self) -> bytes:
        return bytes(self.key.verify_key)

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message).signature


class Lab:
    """Meshes on loopback, closed at the end of the test."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self._scopes: dict[bytes, tuple[trio.CancelScope, trio.Event]] = {}

    async def mesh(self, seed: bytes | None = None, **limits: object) -> Mesh:
        limited = replace(MeshLimits(heartbeat_s=0.1), **limits)  # type: ignore[arg-type]
        return await self.nursery.start(self._run, MeshConfig(limits=limited, network="test"), seed or os.urandom(32))

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

    async def pair(self) -> tuple[Mesh, Mesh]:
        first, second = await self.mesh(), await self.mesh()
        second.keep_connected(first.key, first.addrs)
        with trio.fail_after(PATIENCE_S):
            await first.wait_connected()
            await second.wait_connected()
        return first, second

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        """Wait for what other tasks bring about."""
        with trio.fail_after(PATIENCE_S):
            while not condition():  # noqa: ASYNC110  (many conditions have no event)
                await trio.sleep(0.005)

    async def stop(self, mesh: Mesh) -> None:
        """End one mesh, as when its process ends."""
        scope, stopped = self._scopes[mesh.key]
        scope.cancel()
        await stopped.wait()


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with trio.open_nursery() as nursery:
        yield Lab(nursery)
        nursery.cancel_scope.cancel()


class FakeMesh:
    """Records what is published; streams come from `open_stream`, which a test replaces."""

    def __init__(self) -> None:
        self.key = b"\x01" * 32
        self.connected = [b"\x02" * 32]
        self.published: list[tuple[str, bytes]] = []
        self.done: list[str] = []

    def peers(self) -> list[bytes]:
        return self.connected

    async def publish(self, topic: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.published.append((topic, data))
        self.done.append("publish")

    async def open_stream(self, peer: bytes, protocol: str, *, timeout_s: float, max_frame_bytes: int) -> Any:
        raise AssertionError("not expected")


class FakeStore:
    """Takes everything, unless `broken`; `commits` is what was written."""

    def __init__(self, done: list[str] | None = None) -> None:
        self.broken: list[Exception] = []
        self.commits: list[tuple[list[Any], list[Any], list[Any]]] = []
        self.done = done if done is not None else []

    def commit(self, duties: list[Any], items: list[Any], notes: list[Any], now: float) -> frozenset[str]:
        if self.broken:
            raise self.broken.pop()
        self.commits.append((duties, items, notes))
        self.done.append("commit")
        return frozenset()


class Echoes:
    """A switchboard that records."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    def echo(self, name: str, data: bytes) -> None:
        self.heard.append((name, data))


class VirtualClock:
    """Trio's clock, so that `autojump_clock` moves it."""

    def now(self) -> float:
        return trio.current_time()


@pytest.fixture
def make_effects() -> Callable[..., NodeEffects]:
    """Effects with fakes for whatever a test does not give."""

    def make(**parts: Any) -> NodeEffects:
        mesh = parts.pop("mesh", None) or FakeMesh()
        defaults: dict[str, Any] = {
            "store": FakeStore(getattr(mesh, "done", None)),
            "inbox": Inbox(),
            "clock": VirtualClock(),
            "computer": None,
            "submitter": None,
            "containers": None,
            "prober": None,
            "switchboard": Echoes(),
        }
        return NodeEffects(mesh=mesh, **(defaults | parts))

    return make


async def take(inbox: Inbox, count: int = 1) -> list[Event]:
    """The next events, as the driver gets them."""
    with trio.fail_after(PATIENCE_S):
        return [await inbox.get() for _ in range(count)]


@pytest.fixture
def events_of() -> Callable[..., Any]:
    return take


class Net:
    """A demo network on an embedded ledger with blocks of 20 ms."""

    def __init__(self, path: Path, *, accounts: dict[bytes, int], **overrides: int) -> None:
        self.path = path
        numbers = {"block_ms": 20, "finality_lag_blocks": 1, "slot_blocks": 5, "epoch_slots": 2} | overrides
        self.time_ms = time.time_ns() // 1_000_000
        allocations = tuple(Allocation(account, planck) for account, planck in accounts.items())
        self.document = write_genesis(
            Genesis("test", "demo", self.time_ms, allocations, 1_000 * KAI, tuple(sorted(numbers.items())))
        )
        rules = ChainParameters(block_time_ms=numbers["block_ms"], finality_lag=numbers["finality_lag_blocks"])
        self.network = EmbeddedLedger.create(path, self.document, time_ms=self.time_ms, parameters=rules)


class Follower:
    """One node's side of the ledger."""

    def __init__(self, chain: Chain, inbox: Inbox) -> None:
        self.chain, self.inbox = chain, inbox


@pytest.fixture
async def follow() -> AsyncIterator[Callable[..., Any]]:
    """Start to follow a ledger file; stops with the test."""
    async with trio.open_nursery() as nursery:

        async def run(path: Path, seal: bool, drain: bool, *, task_status: trio.TaskStatus[Follower]) -> None:
            async with open_embedded(path, poll_s=0.01, seal=seal) as ledger, trio.open_nursery() as inner:
                inbox = Inbox()
                chain = Chain(ledger, inbox, Clock())
                inner.start_soon(chain.run)
                if drain:
                    inner.start_soon(_drain, inbox)
                task_status.started(Follower(chain, inbox))

        async def start(net: Net, *, seal: bool = True, drain: bool = True) -> Follower:
            return await nursery.start(run, net.path, seal, drain)

        yield start
        nursery.cancel_scope.cancel()


async def _drain(inbox: Inbox) -> None:
    while True:
        await inbox.get()


@pytest.fixture
def make_net(tmp_path: Path) -> Callable[..., Net]:
    count = itertools.count()

    def make(accounts: dict[bytes, int] | None = None, **overrides: int) -> Net:
        return Net(tmp_path / f"ledger{next(count)}.sqlite", accounts=accounts or {}, **overrides)

    return make


@pytest.fixture
def make_wallet() -> type[SmallWallet]:
    return SmallWallet


@pytest.fixture
def make_keys() -> Callable[[int], KeyPair]:
    return lambda number: KeyPair.from_seed(bytes([number]) * 32)
