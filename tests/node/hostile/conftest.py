"""A small world in one state, a node in it made of the parts that `kaisar run` starts, and whoever attacks it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from immutables import Map

from kaisar_p2p.errors import ContainerError
from kaisar_p2p.identity import MachineKey, Scheme, Wallet
from kaisar_p2p.identity.keys import SecretKey
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, open_mesh
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.network import Connection, Network
from kaisar_p2p.runtime.interface import ContainerStatus
from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from node import boot
from node.clock import Clock
from node.config import Config
from node.inbox import Inbox, Lane
from node.node import Node
from node.store import NodeStore
from protocols import actions as do
from protocols.adverts import CPU_CLASS, Heartbeat, Spec, WorkerAdvert
from protocols.committees import check_committee
from protocols.deploy import DEPLOYING, OPEN, LeaseEvent, ticket_of
from protocols.digests import offer_hash, registry_root, spec_hash
from protocols.epoch_body import mix_input
from protocols.epoch_gossip import proposer_of
from protocols.epochs import EpochHeader, HeaderProposal, HeaderVote, MixReveal
from protocols.equivocation import DoubleVote
from protocols.interpreter.events import SlotStarted
from protocols.interpreter.state import (
    ACTIVE,
    REGISTERED,
    AccountState,
    MachineState,
    OrderState,
    State,
    WorkerState,
)
from protocols.machine import Machine
from protocols.offers import order_spec
from protocols.orders import Offer, Workload
from protocols.params import DEMO, KAI
from protocols.popw import PASS, Assignment
from protocols.quorum import QuorumCertificate, ReadyCore, VerdictCore

NETWORK = sha256(b"a hostile world").digest()
PARAMS = replace(DEMO, job_n=64, job_k=64, job_tile=32, job_rounds=1, standby_check_permille=0)
EPOCH, SLOT, NUMBER = 1, 7, 47
"""The last block of epoch 1: its epoch messages, slot 7's checks and open leases are all live."""
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")
ASKED = Spec(CPU_CLASS, 1, 512, 1_000, 0, 0, "")
WORKLOAD = Workload("", ("sleep", "1000"), (), (8080,))
PATIENCE_S = 20.0
NOW_S = time.time()
FLOOD = MeshLimits(heartbeat_s=0.1, messages_per_s=1e6, messages_burst=10**6, bytes_per_s=1e9, bytes_burst=10**9)


def keys_of(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(name.encode()).digest())


def account_of(name: str) -> bytes:
    return keys_of("account " + name).public_key


class World:
    """Five checkers, of which the first is the victim and a worker too, another worker, a client, open orders."""

    network = NETWORK
    victim, worker, client = keys_of("checker 0"), keys_of("worker"), keys_of("client")
    checkers = tuple(keys_of(f"checker {number}") for number in range(5))
    nobody, bound = keys_of("nobody"), keys_of("bound")

    def __init__(self, now: float = NOW_S) -> None:
        self.now = now
        names = [*(f"checker {number}" for number in range(5)), "worker", "client", "bound"]
        owners = {keys_of(name).public_key: account_of(name) for name in names}
        worker = WorkerState(account_of("worker"), SPEC, KAI, KAI, ACTIVE, 1)
        state = State(
            NETWORK,
            PARAMS,
            number=NUMBER,
            block_hash=sha256(b"block").digest(),
            time_ms=int(self.now * 1000),
            accounts=Map({account: AccountState(1000 * KAI, stake_planck=200 * KAI) for account in owners.values()}),
            machines=Map({key: MachineState(owner, 7, 0) for key, owner in owners.items()}),
            workers=Map(
                {
                    self.worker.public_key: replace(worker, status=REGISTERED, registered_block=NUMBER - 12),
                    self.victim.public_key: replace(worker, owner=account_of("checker 0")),
                }
            ),
            registries=Map({epoch: self._registry() for epoch in (EPOCH - 1, EPOCH)}),
            mixes=Map({epoch: sha256(b"mix %d" % epoch).digest() for epoch in (EPOCH - 1, EPOCH)}),
            beacons=Map({slot: sha256(b"beacon %d" % slot).digest() for slot in range(SLOT - 4, SLOT + 1)}),
        )
        self.order_id, self.own_order_id = sha256(b"order").digest(), sha256(b"own order").digest()
        orders = {
            self.order_id: self._order(self.worker.public_key, 1),
            self.own_order_id: self._order(self.victim.public_key, 2),
        }
        self.state = replace(
            state,
            orders=Map(orders),
            open_orders=Map({order.worker: (order_id,) for order_id, order in orders.items()}),
        )

    def __repr__(self) -> str:
        return "World()"

    def _registry(self) -> tuple[tuple[bytes, int], ...]:
        return tuple(sorted((each.public_key, 200 * KAI) for each in self.checkers))

    def _order(self, worker: bytes, number: int) -> OrderState:
        spec = order_spec(ASKED, 3600, WORKLOAD, NETWORK)
        client, now_ms = self.client.public_key, int(self.now * 1000)
        offer = Offer(worker, client, spec_hash(spec, NETWORK), KAI, now_ms, number.to_bytes(32, "big"))
        return OrderState(
            client=account_of("client"), client_key=client, worker=worker, worker_owner=account_of("worker"),
            spec_hash=offer.spec_hash, resources=ASKED, offer_hash=offer_hash(offer, NETWORK),
            price_planck_per_hour=KAI, duration_s=3600, escrow_planck=KAI, locked_planck=KAI, points_planck=0,
            placed_block=NUMBER - 1, placed_ms=now_ms, seats=tuple(each.public_key for each in self.checkers),
            threshold=4,
        )  # fmt: skip

    def by_key(self, key: bytes) -> KeyPair:
        return next(each for each in self.checkers if each.public_key == key)

    # ── what honest peers say ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def now_ms(self) -> int:
        return int(self.now * 1000)

    def advert(self) -> WorkerAdvert:
        key, owner = self.worker.public_key, account_of("worker")
        addrs = ("/ip4/127.0.0.1/tcp/4001",)
        return WorkerAdvert(key, owner, self.now_ms, addrs, SPEC, SPEC, KAI, 0, 1, "process")

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(self.checkers[1].public_key, self.now_ms, 2, 0, 0)

    def assignment(self) -> Assignment:
        committee = check_committee(self.state, SLOT, self.worker.public_key)
        assert committee is not None
        return Assignment(EPOCH, SLOT, self.worker.public_key, committee.seats)

    def lease_event(self) -> LeaseEvent:
        key = self.worker.public_key
        return LeaseEvent(self.order_id, key, 0, DEPLOYING, OPEN, "deploying", "", self.now_ms, 8080)

    def vote(self) -> HeaderVote:
        return HeaderVote(EPOCH, 0, bytes(32))

    def reveal(self, signer: KeyPair) -> MixReveal:
        return MixReveal(EPOCH, vrf.prove(signer.seed, mix_input(self.state, EPOCH)))

    def header(self) -> EpochHeader:
        zero = {
            name: bytes(32)
            for name in ("previous", "mix", "state_root", "verdict_root", "reward_root", "lease_root", "evidence_root",
                         "log_root")
        }  # fmt: skip
        root = registry_root(self.state.registries[EPOCH])
        return EpochHeader(
            epoch=EPOCH, round=0, first_slot=4, last_slot=7, registry_root=root, **zero, verdicts=0, rewards=0,
            leases=0, evidence=0, minted_planck=0,
        )  # fmt: skip

    def proposal(self) -> tuple[HeaderProposal, KeyPair]:
        proposer = proposer_of(self.state, EPOCH, 0)
        assert proposer is not None
        return HeaderProposal(self.header()), self.by_key(proposer)

    def certify(self, core: Any, seats: tuple[bytes, ...], count: int, network: bytes = NETWORK) -> QuorumCertificate:
        """A certificate by the first `count` seats."""
        body = encode(core)
        signatures = tuple(self.by_key(key).sign(core.DOMAIN, network, body) for key in seats[:count])
        return QuorumCertificate(core, (1 << count) - 1, signatures)

    def verdict(self, **changes: Any) -> VerdictCore:
        return replace(VerdictCore(EPOCH, SLOT, self.worker.public_key, sha256(b"commit").digest(), PASS), **changes)

    def certificate(self, network: bytes = NETWORK, count: int = 4, **changes: Any) -> QuorumCertificate:
        core = self.verdict(**changes)
        committee = check_committee(self.state, SLOT, self.worker.public_key)
        assert committee is not None
        return self.certify(core, committee.seats, count, network)

    def ticket(self, order_id: bytes | None = None, network: bytes = NETWORK, count: int = 4) -> QuorumCertificate:
        order_id = order_id or self.order_id
        order = self.state.orders[order_id]
        return self.certify(ticket_of(order_id, order), order.seats, count, network)

    def ready(self) -> QuorumCertificate:
        order = self.state.orders[self.order_id]
        return self.certify(ReadyCore(self.order_id, order.worker), order.seats, 4)

    def double_vote(self, signer: KeyPair | None = None, network: bytes = NETWORK, slot: int = SLOT) -> DoubleVote:
        signer = signer or self.checkers[3]
        cores = [VerdictCore(EPOCH, slot, self.worker.public_key, bytes([n]) * 32, PASS) for n in (1, 2)]
        signed = [signer.sign(core.DOMAIN, network, encode(core)) for core in cores]
        return DoubleVote(signer.public_key, cores[0], signed[0], cores[1], signed[1])

    def gossip(self) -> dict[str, bytes]:
        """A valid message of every kind, as `topic/kind`."""
        proposal, proposer = self.proposal()
        return {
            "advert": seal(self.advert(), self.worker, NETWORK),
            "heartbeat": seal(self.heartbeat(), self.checkers[1], NETWORK),
            "assignment": seal(self.assignment(), self.checkers[1], NETWORK),
            "certificate": encode(self.certificate()),
            "evidence": encode(self.double_vote()),
            "epoch": seal(self.vote(), self.checkers[1], NETWORK),
            "epoch/reveal": seal(self.reveal(self.checkers[1]), self.checkers[1], NETWORK),
            "epoch/proposal": seal(proposal, proposer, NETWORK),
            "lease": seal(self.lease_event(), self.worker, NETWORK),
            "lease/ticket": encode(self.ticket()),
            "lease/ready": encode(self.ready()),
        }


@pytest.fixture
def world() -> World:
    return World()


# ── a node ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class NoRuntime:
    """A runtime that only counts what it was asked to start."""

    name, for_development = "process", True

    def __init__(self) -> None:
        self.started: list[str] = []
        self.running: dict[str, tuple[str, int]] = {}

    async def start(self, spec: Any) -> Any:
        self.started.append(spec.lease)
        raise ContainerError("start-failed: nothing runs here")

    async def status(self, lease: str) -> ContainerStatus | None:
        address = self.running.get(lease)
        return ContainerStatus(lease, "running", None, ((8080, address),)) if address is not None else None

    async def containers(self) -> list[Any]:
        return []

    async def stop(self, lease: str, grace_s: float) -> None:
        return None


@dataclass
class Victim:
    """A node of all roles in the world's state, without a ledger behind it."""

    world: World
    node: Node
    machines: list[Machine]
    runtime: NoRuntime
    submitted: list[bytes] = field(default_factory=list)

    @property
    def mesh(self) -> Mesh:
        return self.node.mesh

    def apply(self, *events: Any) -> None:
        """Every machine sees the world's state as the newest block."""
        self.node.inbox.put(Lane.BLOCK, do.BlockApplied(self.world.state, tuple(events), live=True))

    def judged(self, topic: str, verdict: str) -> int:
        return self.mesh.statistics().messages.get((topic, verdict), 0)

    def sizes(self) -> dict[str, int]:
        """Items in all containers of every machine and of the node's own tables."""
        switchboard = self.node.effects.switchboard
        parts = [*self.machines, switchboard, self.node.inbox, self.node.effects._served]
        return {f"{number} {type(part).__name__}": items_in(part) for number, part in enumerate(parts)}


def items_in(value: Any, seen: set[int] | None = None) -> int:
    """How many items a machine holds, counted through its own classes; the ledger's state is not its own."""
    seen = seen if seen is not None else set()
    if id(value) in seen or isinstance(value, State | Map | Mesh | bytes | str | int | float | type):
        return 0
    seen.add(id(value))
    if isinstance(value, dict):
        return len(value) + sum(items_in(each, seen) for each in value.values())
    if isinstance(value, list | set | frozenset | deque | tuple):
        return len(value) + sum(items_in(each, seen) for each in value)
    module = type(value).__module__.partition(".")[0]
    if module not in ("node", "protocols", "kaisar_p2p"):
        return 0
    inner = getattr(value, "__dict__", None)
    if inner is None and is_dataclass(value):
        inner = {each.name: getattr(value, each.name) for each in fields(value)}
    return sum(items_in(each, seen) for each in (inner or {}).values())


async def eventually(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


class Arena:
    """Starts a victim, honest neighbours and attackers; all end with the test."""

    eventually = staticmethod(eventually)

    def __init__(self, nursery: trio.Nursery, world: World, path: Path) -> None:
        self._nursery = nursery
        self.world = world
        self._path = path

    async def victim(self, limits: MeshLimits = FLOOD, *, slot_started: bool = True) -> Victim:
        found: Victim = await self._nursery.start(self._run_victim, limits)
        found.apply(*([SlotStarted(SLOT)] if slot_started else []))
        await eventually(lambda: not any(found.node.inbox.depths().values()))
        return found

    async def _run_victim(self, limits: MeshLimits, *, task_status: trio.TaskStatus[Victim]) -> None:
        world, keys = self.world, MachineKey(self.world.victim)
        secret = SecretKey.from_seed(Scheme.ED25519, keys_of("account checker 0").seed)
        wallet = Wallet("main", Scheme.ED25519, secret.public_key, secret)
        config = Config(self._path).with_settings({"node.roles": ["provider", "checker", "client"]}, "the test")
        submitted: list[bytes] = []

        async def submit(payload: bytes, signer: Any) -> Any:
            submitted.append(payload)
            return SimpleNamespace(call_hash=sha256(payload).digest())

        ledger = SimpleNamespace(network=NETWORK, submit=submit)
        chain: Any = SimpleNamespace(state=world.state, ledger=ledger)
        runtime, store = NoRuntime(), NodeStore(self._path / "node.sqlite")
        async with trio.open_nursery() as nursery:
            async with open_mesh(self._config(limits), keys.seed) as mesh:
                parts = (config, keys, wallet, chain, store, Clock(), Inbox(), mesh, runtime)
                node = boot._assemble(*parts)  # type: ignore[arg-type]
                machines, _, _ = boot._machines(node, None)
                await boot._start(nursery, node, machines)
                task_status.started(Victim(world, node, machines, runtime, submitted))
                await trio.sleep_forever()

    @staticmethod
    def _config(limits: MeshLimits) -> MeshConfig:
        return MeshConfig(network=NETWORK.hex()[:16], limits=limits)

    async def peer(self, victim: Victim, keys: KeyPair | None = None, limits: MeshLimits = FLOOD) -> Mesh:
        """A mesh connected to the victim, in every topic: an honest neighbour or an attacker with a fresh key."""
        mesh: Mesh = await self._nursery.start(self._run_peer, limits, (keys or KeyPair.from_seed(_fresh())).seed)
        mesh.keep_connected(victim.mesh.key, victim.mesh.addrs)
        await eventually(lambda: mesh.is_connected(victim.mesh.key))
        await eventually(lambda: victim.mesh.key in mesh.subscribers("advert"))
        return mesh

    async def _run_peer(self, limits: MeshLimits, seed: bytes, *, task_status: trio.TaskStatus[Mesh]) -> None:
        async with open_mesh(self._config(limits), seed) as mesh:
            task_status.started(mesh)
            await trio.sleep_forever()

    async def connection(self, victim: Victim, keys: KeyPair | None = None) -> Connection:
        """A connection below the mesh, which says whatever the test wants."""
        network = Network(key_pair_of((keys or KeyPair.from_seed(_fresh())).seed), FLOOD)
        network.run_in(self._nursery)
        return await network.dial(victim.mesh.key, victim.mesh._own_addresses())


_counter = iter(range(10**9))


def _fresh() -> bytes:
    return sha256(b"fresh key %d" % next(_counter)).digest()


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[Arena]:
    async with trio.open_nursery() as nursery:
        yield Arena(nursery, World(time.time()), tmp_path)
        nursery.cancel_scope.cancel()


class Machines(list[Machine]):
    """A list that reports of failures do not spell out."""

    def __repr__(self) -> str:
        return "Machines()"


@pytest.fixture
def machines(world: World, tmp_path: Path) -> Iterator[list[Machine]]:
    """Every machine of a node that has all roles, in the world's state."""
    from node.index import Index
    from node.roles import RoleContext
    from node.roles.all import ROLES
    from protocols.lease_client import LeaseClientMachine
    from protocols.onboarding import Onboarding
    from protocols.presence import Presence

    store = NodeStore(tmp_path / "machines.sqlite")
    owner = account_of("checker 0")
    context = RoleContext(world.victim, owner, NETWORK, store, lambda n: bytes(n), "process", 8)
    built = Machines(
        [
            Index(),
            Presence(world.victim, owner, 7, lambda: (), "process"),
            Onboarding(world.victim, owner, 7, SPEC, KAI),
            LeaseClientMachine(world.victim, NETWORK),
        ]
    )
    for role in ("provider", "checker", "client", "everybody"):
        built += ROLES[role].machines(context)
    for machine in built:
        machine.step(do.BlockApplied(world.state, (SlotStarted(SLOT),), live=True), world.now)
    yield built
    store.close()
