"""A stand-in for a node, served by the real API on a real loopback port, for tests of the API and the commands."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from immutables import Map

from kaisar_p2p.errors import MeshError, OrderRefused, RequestFailed
from kaisar_p2p.identity import ss58_encode
from kaisar_p2p.mesh import MeshReport, Reachability
from kaisar_p2p.mesh.reach.relay import RelayStatistics
from node.api.address import ApiAddress
from node.config import Config
from node.index import Index
from node.ordering import PlacedOrder, PlaceOrder
from node.store import NodeEvent
from node.tunnels import Probed
from protocols.adverts import CPU_CLASS, Spec, WorkerAdvert
from protocols.deploy import DEPLOYING, OPEN, RUNNING, LeaseEvent, TunnelOpen
from protocols.epochs import EpochHeader
from protocols.genesis import Allocation, Genesis, genesis_state, write_genesis
from protocols.interpreter.calls import CallBody, OrderCancel
from protocols.interpreter.state import (
    ACTIVE,
    AccountState,
    Anchor,
    MachineState,
    OrderState,
    State,
    Unbonding,
    WorkerState,
)
from protocols.params import KAI
from protocols.quorum import QuorumCertificate, VerdictCore

OWNER, STRANGER, ORDER = b"\x01" * 32, b"\x07" * 32, b"\xab" * 32
KEY, WORKER = b"\x02" * 32, b"\x03" * 32
NOW_S = 1_800_000_000.0
SPEC = Spec(CPU_CLASS, 4, 8192, 100_000, 0, 0, "")


def sample_state() -> State:
    """One worker, one order of ours, one anchored epoch."""
    genesis = Genesis("demo-1", "demo", int(NOW_S * 1000) - 60_000, (Allocation(OWNER, 900 * KAI),))
    state = genesis_state(write_genesis(genesis))
    order = OrderState(
        client=OWNER, client_key=KEY, worker=WORKER, worker_owner=STRANGER, spec_hash=bytes(32),
        resources=replace(SPEC, cpu_cores=1, memory_mb=512), offer_hash=bytes(32), price_planck_per_hour=KAI,
        duration_s=3600, escrow_planck=KAI, locked_planck=KAI, points_planck=0, placed_block=20,
        placed_ms=int(NOW_S * 1000) - 5_000, seats=(b"\x11" * 32, b"\x12" * 32), threshold=2,
    )  # fmt: skip
    header = EpochHeader(
        epoch=0, round=0, first_slot=0, last_slot=3, **{name: bytes(32) for name in _ROOTS},
        verdicts=2, rewards=1, leases=0, evidence=0, minted_planck=100 * KAI,
    )  # fmt: skip
    account = AccountState(900 * KAI, 5 * KAI, 1, 100 * KAI, (Unbonding(KAI, 9),), 2 * KAI)
    return replace(
        state,
        number=30,
        block_hash=b"\x30" * 32,
        time_ms=int(NOW_S * 1000),
        accounts=Map({OWNER: account}),
        machines=Map({KEY: MachineState(OWNER, 6, 3), WORKER: MachineState(STRANGER, 1, 4)}),
        workers=Map({WORKER: WorkerState(STRANGER, SPEC, KAI, 50 * KAI, ACTIVE, 5, 12)}),
        orders=Map({ORDER: order}),
        anchors=Map({0: Anchor(header, b"\x40" * 32, 27, 70, 100, 900)}),
        last_anchor=0,
    )


def sample_report() -> MeshReport:
    """A node that can be dialed."""
    reached = Reachability(
        "public", ("/ip4/203.0.113.7/tcp/4001",), "3 of 3 peers that were asked to dial us back came through", 0.0,
        ("203.0.113.7",), True, 0.25,
    )  # fmt: skip
    listening = ("/ip4/192.168.1.20/tcp/4001",)
    return MeshReport(reached, listening, "not asked for", (), RelayStatistics(0, 0, 0, 0, {}), True, 0, None)


_ROOTS = (
    "previous", "mix", "registry_root", "state_root", "verdict_root", "reward_root", "lease_root", "evidence_root",
    "log_root",
)  # fmt: skip


def sample_index() -> Index:
    """An advert, three certificates of which two are of one check, two lease events."""
    index = Index()
    addrs = ("/ip4/127.0.0.1/tcp/4001",)
    issued = int(NOW_S * 1000) - 1_000
    index.adverts[WORKER] = WorkerAdvert(WORKER, STRANGER, issued, addrs, SPEC, SPEC, KAI, 0, 1, "process")
    for at, slot, verdict, mask in ((1.0, 3, 1, 3), (2.0, 4, 2, 3), (2.5, 4, 2, 7)):
        core = VerdictCore(0, slot, WORKER, b"\x05" * 32, verdict)
        index.certificates.append((NOW_S - 10 + at, QuorumCertificate(core, mask, (bytes(64),) * mask.bit_count())))
    index.lease_events[ORDER] = deque(
        [
            LeaseEvent(ORDER, WORKER, 1, DEPLOYING, OPEN, "deploying", "", issued, 0),
            LeaseEvent(ORDER, WORKER, 2, RUNNING, OPEN, "running", "", issued + 10, 8080),
        ]
    )
    return index


class StubStream:
    """A tunnel whose far end has said everything already, or never ends."""

    def __init__(self, frames: list[bytes], *, endless: bool = False) -> None:
        self.frames, self.endless = list(frames), endless
        self.sent: list[bytes] = []
        self.closed = False

    async def send_frame(self, frame: bytes) -> None:
        self.sent.append(frame)

    async def send_eof(self) -> None:
        self.sent.append(b"EOF")

    async def receive_frame(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.frames:
            return self.frames.pop(0)
        if self.endless:
            return b"x" * 60_000
        raise RequestFailed("the stream is closed")

    async def __aenter__(self) -> StubStream:
        return self

    async def __aexit__(self, *details: object) -> None:
        self.closed = True


@dataclass
class StubTunnels:
    """Answers every opening with one prepared stream."""

    stream: StubStream = field(default_factory=lambda: StubStream([b"first line\n", b"second line\n"]))
    opened: list[TunnelOpen] = field(default_factory=list)
    local_ports: list[Any] = field(default_factory=list)
    up: tuple[bool, str] = (True, "")
    refusal: str = ""
    closed: list[bytes] = field(default_factory=list)

    async def open(self, worker: bytes, opening: TunnelOpen) -> StubStream:
        self.opened.append(opening)
        if self.refusal:
            raise RequestFailed(f"the worker refused: {self.refusal}")
        return self.stream

    async def probe(self, order_id: bytes, worker: bytes, port: int, deadline_s: float) -> Probed:
        return Probed(*self.up, answered=True)

    async def listen(self, order_id: bytes, worker: bytes, port: int, host: str, local_port: int) -> Any:
        if local_port == 1:
            raise MeshError("port 1 is taken", hint="choose another")
        found = SimpleNamespace(order_id=order_id, port=port, host=host, local_port=local_port or 40_000)
        self.local_ports.append(found)
        return found

    def close_ports(self, order_id: bytes) -> None:
        self.closed.append(order_id)


@dataclass
class StubStore:
    """Events in memory."""

    kept: list[NodeEvent] = field(default_factory=list)

    def events(self, after: int, limit: int) -> list[NodeEvent]:
        return [event for event in self.kept if event.id > after][:limit]

    def add(self, kind: str, **data: str | int) -> None:
        self.kept.append(NodeEvent(len(self.kept) + 1, int(NOW_S * 1000), kind, data))


class StubEffects:
    """Somebody who can be woken."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    async def wait_for_note(self) -> None:
        await self._changed.wait()

    def notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class StubNode:
    """What the API uses of a node."""

    def __init__(self, data_directory: Path) -> None:
        state, index = sample_state(), sample_index()
        self.config = Config(data_directory)
        self.key, self.roles = KEY, ("client", "checker")
        self.wallet = SimpleNamespace(public_key=OWNER, address=ss58_encode(OWNER), name="main")
        self.chain = SimpleNamespace(state=state)
        peer = SimpleNamespace(
            key=WORKER,
            addresses=("/ip4/127.0.0.1/tcp/4001",),
            inbound=False,
            connected_since=0.0,
            score=1.0,
            rtt_s=0.002,
            relayed=False,
        )
        counters = SimpleNamespace(
            peers=1, connections=1, sent_bytes=10, received_bytes=20, refused={"rate": 2},
            messages={("advert", "accept"): 3, ("", "duplicate"): 4}, drops={}, pruned={},
        )  # fmt: skip
        self.mesh = SimpleNamespace(
            addrs=("/ip4/127.0.0.1/tcp/4002",), peers=lambda: [peer], statistics=lambda: counters,
            report=lambda: self.report, config=SimpleNamespace(pre_shared_key=None),
        )  # fmt: skip
        self.report = sample_report()
        self.store, self.index, self.effects = StubStore(), index, StubEffects()
        self.inbox = SimpleNamespace(depths=lambda: {"block": 0}, dropped={"effect-publish": 1})
        self.clock, self.started_at = SimpleNamespace(now=lambda: NOW_S), NOW_S - 90
        self.tunnels, self.runtime = StubTunnels(), None
        self.calls: list[CallBody] = []
        self.placed: list[PlaceOrder] = []
        self.call_reason = ""
        self.refuse_order: OrderRefused | None = None
        self.proof_text: str | None = None

    async def call(self, body: CallBody, timeout_s: float = 30) -> Any:
        self.calls.append(body)
        if isinstance(body, OrderCancel) and not self.call_reason:
            ended = replace(self.chain.state.orders[body.order_id], status=2)
            self.chain.state = replace(self.chain.state, orders=Map({body.order_id: ended}))
        return SimpleNamespace(call_hash=b"\xcc" * 32, reason=self.call_reason)

    async def place_order(self, request: PlaceOrder) -> PlacedOrder:
        if self.refuse_order is not None:
            raise self.refuse_order
        self.placed.append(request)
        return PlacedOrder(ORDER, WORKER, KAI, KAI, 0)

    def reward_proof(self) -> str:
        if self.proof_text is None:
            raise OrderRefused("nothing was earned yet", hint="wait for an epoch")
        return self.proof_text

    async def claim_reward(self) -> Any:
        return SimpleNamespace(call_hash=b"\xdd" * 32, amount_planck=3 * KAI)


@dataclass
class Served:
    """A stub behind the real API."""

    node: StubNode
    address: ApiAddress
    token: trio.lowlevel.TrioToken
    scope: trio.CancelScope
    directory: Path

    def soon(self, function: Any, *arguments: Any) -> None:
        """Call something in the node's thread; nothing happens when that has ended."""
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(function, *arguments)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A stub node whose API answers, in a thread of its own."""
    from node.api.server import serve_api

    directory = tmp_path / "home"
    directory.mkdir(mode=0o700)
    found: list[Served] = []
    started = threading.Event()

    async def main() -> None:
        node = StubNode(directory)
        async with trio.open_nursery() as nursery:
            address = await nursery.start(serve_api, node)
            token = trio.lowlevel.current_trio_token()
            found.append(Served(node, address, token, nursery.cancel_scope, directory))
            started.set()

    def run() -> None:
        try:
            trio.run(main)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    assert found, "the API did not start"
    yield found[0]
    found[0].soon(found[0].scope.cancel)
    thread.join(10)
    assert not thread.is_alive(), "the API did not stop"


@pytest.fixture
def sample() -> SimpleNamespace:
    """A state and an index to look at."""
    return SimpleNamespace(state=sample_state(), index=sample_index())
