"""A small network in memory: every block that a test applies is checked for conservation of money."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import pytest

from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from protocols.adverts import CPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.digests import header_hash, registry_root, spec_hash
from protocols.epochs import (
    LEASES,
    REWARDS,
    EpochCertificate,
    EpochHeader,
    HeaderVote,
    LeafProof,
    LeaseLeaf,
    RewardLeaf,
)
from protocols.genesis import Allocation, Genesis, genesis_state, write_genesis
from protocols.interpreter import calls
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import conservation
from protocols.interpreter.events import CallApplied, CallIgnored, LedgerEvent
from protocols.interpreter.state import OrderState, State
from protocols.orders import Offer, OrderSpec
from protocols.params import KAI
from protocols.popw import PASS
from protocols.quorum import QuorumCertificate, VerdictCore

NAMES = ("alice", "bob", "carol", "provider", "checker0", "checker1", "checker2", "checker3")
PARTS = ("accounts", "machines", "workers", "orders", "open_orders", "bootstrap", "anchors", "totals", "last_anchor",
         "licences_sold")  # fmt: skip
"""What only calls change."""
PARAMS = {"slot_blocks": 2, "epoch_slots": 2, "block_ms": 1000, "unbonding_epochs": 2, "deploy_timeout_ms": 4_000}
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")
RESOURCES = Spec(CPU_CLASS, 3, 4_000, 10_000, 0, 0, "")
HOUR_PLANCK = 36 * KAI


def account(name: str) -> bytes:
    return sha256(b"account " + name.encode()).digest()


def keys(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(b"machine " + name.encode()).digest())


@dataclass(frozen=True)
class OneCall:
    signer: bytes
    payload: bytes
    call_hash: bytes


@dataclass(frozen=True)
class OneBlock:
    number: int
    hash: bytes
    parent: bytes
    time_ms: int
    calls: tuple[OneCall, ...]


class Chain:
    """Blocks on demand. `run` puts one call into a block of its own and returns what became of it."""

    def __init__(self, balance_planck: int = 10_000 * KAI, points_planck: int = 0, **overrides: int) -> None:
        genesis = Genesis(
            "tests",
            "demo",
            1_000_000,
            tuple(Allocation(account(name), balance_planck, points_planck) for name in NAMES),
            treasury_planck=1_000 * KAI + len(NAMES) * points_planck,
            overrides=tuple((PARAMS | overrides).items()),
        )
        self.document = write_genesis(genesis)
        self.state: State = genesis_state(self.document)
        self.blocks: list[OneBlock] = []
        self.events: tuple[LedgerEvent, ...] = ()
        self._calls = 0
        self.keys_of = {keys(name).public_key: keys(name) for name in NAMES}
        self.anchored: dict[int, tuple[EpochHeader, tuple[bytes, ...], tuple[bytes, ...]]] = {}

    @property
    def params(self):
        return self.state.params

    @staticmethod
    def owner(name: str) -> bytes:
        """The account of a name."""
        return account(name)

    @staticmethod
    def machine(name: str) -> bytes:
        """The machine key of a name."""
        return keys(name).public_key

    # blocks

    def block(self, *pairs: tuple[bytes, bytes]) -> tuple[LedgerEvent, ...]:
        """Apply a block with (signer, payload) pairs."""
        number = self.state.number + 1
        one = []
        for signer, payload in pairs:
            self._calls += 1
            one.append(OneCall(signer, payload, sha256(b"call %d" % self._calls).digest()))
        block = OneBlock(
            number, sha256(b"block %d" % number).digest(), self.state.block_hash, 1_000_000 + 1000 * number, tuple(one)
        )
        self.blocks.append(block)
        self.state, self.events = apply(self.state, block)
        assert conservation(self.state) == 0
        points = sum(each.points_planck for each in self.state.accounts.values())
        assert points <= self.state.totals.treasury_planck, "points are backed by the treasury"
        return self.events

    def run(self, name: str, body: Any) -> CallApplied | CallIgnored:
        """One call by a named account in a block of its own."""
        events = self.block((account(name), body if isinstance(body, bytes) else calls.payload_of(body)))
        (outcome,) = [event for event in events if isinstance(event, CallApplied | CallIgnored)]
        return outcome

    def do(self, name: str, body: Any) -> CallApplied:
        """As `run`, for a call that must have an effect."""
        outcome = self.run(name, body)
        assert isinstance(outcome, CallApplied), outcome
        return outcome

    def blocks_until(self, done: Callable[[State], bool]) -> None:
        while not done(self.state):
            self.block()

    def until_epoch(self, epoch: int) -> None:
        """Blocks up to the first one of the epoch."""
        self.blocks_until(lambda state: state.epoch >= epoch)

    def account(self, name: str):
        return self.state.accounts[account(name)]

    # machines

    def bind_call(self, name: str, roles: int, machine: str = "") -> calls.MachineBind:
        pair = keys(machine or name)
        signature = pair.sign(calls.BIND_DOMAIN, self.state.network, calls.bind_body(account(name), roles))
        return calls.MachineBind(pair.public_key, roles, signature)

    def add_checkers(self, count: int = 4) -> None:
        """Licensed, staked and bound checkers, in the registry of the epoch that then begins."""
        together = []
        for index in range(count):
            name = f"checker{index}"
            steps = (
                calls.LicenceBuy(1, bytes(32)),
                calls.StakeBond((100 + index) * KAI),
                self.bind_call(name, calls.CHECKER),
            )
            together += [(account(name), calls.payload_of(step)) for step in steps]
        self.block(*together)
        self.until_epoch(self.state.epoch + 1)

    def register_call(self, spec: Spec = SPEC, worker: str = "provider") -> calls.WorkerRegister:
        return calls.WorkerRegister(keys(worker).public_key, spec, HOUR_PLANCK)

    def register(self) -> None:
        self.do("provider", self.bind_call("provider", calls.PROVIDER))
        self.do("provider", self.register_call())

    def verdict(self, slot: int, verdict: int = PASS, signers: int = 64, **changes: Any) -> QuorumCertificate:
        """A certificate about the provider by its committee of a slot; by fewer with `signers`."""
        worker = keys("provider").public_key
        core = VerdictCore(self.params.epoch_of_slot(slot), slot, worker, bytes(32), verdict)
        core = replace(core, **changes)
        committee = check_committee(self.state, slot, worker)
        seats = committee.seats[:signers] if committee else ()
        body = encode(core)
        signatures = tuple(self.keys_of[seat].sign(core.DOMAIN, self.state.network, body) for seat in seats)
        return QuorumCertificate(core, (1 << len(seats)) - 1, signatures)

    def add_worker(self) -> None:
        """Four checkers and an active worker."""
        self.add_checkers()
        self.register()
        slot = self.state.slot + 1
        self.blocks_until(lambda state: state.slot >= slot)
        self.do("bob", calls.WorkerActivate(self.verdict(slot)))
        if keys("alice").public_key not in self.state.machines:
            self.do("alice", self.bind_call("alice", calls.CLIENT))

    # orders

    def place_call(
        self,
        nonce: int = 1,
        spec: OrderSpec | None = None,
        points_planck: int = 0,
        escrow_planck: int = -1,
        signer: str = "provider",
        **changes: Any,
    ) -> calls.OrderPlace:
        """An order of alice for a minute."""
        spec = spec or OrderSpec(RESOURCES, 60, bytes(32))
        offer = Offer(
            keys("provider").public_key,
            keys("alice").public_key,
            spec_hash(spec, self.state.network),
            HOUR_PLANCK,
            self.state.time_ms + 10_000,
            nonce.to_bytes(32, "big"),
        )
        offer = replace(offer, **changes)
        if escrow_planck < 0:
            escrow_planck = max(0, -(-offer.price_planck_per_hour * spec.duration_s // 3600) - points_planck)
        envelope = seal(offer, keys(signer), self.state.network)
        return calls.OrderPlace(spec, envelope, escrow_planck, points_planck)

    def place(self, nonce: int = 1, **arguments: Any) -> bytes:
        """Place alice's order; returns its id."""
        return self.do("alice", self.place_call(nonce, **arguments)).subject

    def order(self, order_id: bytes) -> OrderState:
        return self.state.orders[order_id]

    # anchors

    def header(self, leases: tuple = (), rewards: tuple = (), epoch: int | None = None, **changes: Any) -> EpochHeader:
        """A header that may be anchored now, for the epoch before the newest block's."""
        epoch = self.state.epoch - 1 if epoch is None else epoch
        last = self.state.anchors.get(self.state.last_anchor)
        slots, empty = self.params.epoch_slots, merkle.EMPTY_ROOT
        header = EpochHeader(
            epoch=epoch,
            round=0,
            first_slot=epoch * slots,
            last_slot=(epoch + 1) * slots - 1,
            previous=last.header_hash if last else bytes(32),
            mix=sha256(b"mix %d" % epoch).digest(),
            registry_root=registry_root(self.state.registries.get(epoch, ())),
            state_root=bytes(32),
            verdict_root=empty,
            reward_root=merkle.root(encode(leaf) for leaf in rewards),
            lease_root=merkle.root(encode(leaf) for leaf in leases),
            evidence_root=empty,
            log_root=empty,
            verdicts=0,
            rewards=len(rewards),
            leases=len(leases),
            evidence=0,
            minted_planck=0,
        )
        return replace(header, **changes)

    def certify(self, header: EpochHeader, signers: int = 256) -> EpochCertificate:
        """By the first `signers` members of the epoch's registry."""
        registry = self.state.registries.get(header.epoch, ())[:signers]
        vote = encode(HeaderVote(header.epoch, header.round, header_hash(header, self.state.network)))
        signatures = tuple(self.keys_of[key].sign(HeaderVote.DOMAIN, self.state.network, vote) for key, _ in registry)
        bits = (1 << len(registry)) - 1
        return EpochCertificate(bits.to_bytes((len(registry) + 7) // 8, "little"), signatures)

    def anchor(self, leases: tuple = (), rewards: tuple = (), **changes: Any) -> int:
        """Anchor the epoch that is over when the next one starts; returns its number."""
        if self.state.last_anchor >= self.state.epoch - 1 or not self.state.registries.get(self.state.epoch - 1):
            self.until_epoch(self.state.epoch + 1)
        header = self.header(leases, rewards, **changes)
        self.do("carol", calls.AnchorPost(header, self.certify(header)))
        trees = tuple(tuple(encode(leaf) for leaf in leaves) for leaves in (leases, rewards))
        self.anchored[header.epoch] = (header, *trees)
        return header.epoch

    def proof(self, epoch: int, tree: int, index: int = 0) -> LeafProof:
        leaves = self.anchored[epoch][1 if tree == LEASES else 2]
        return LeafProof(epoch, tree, index, leaves[index], merkle.Tree(leaves).path(index))

    def settle(self, order_id: bytes, seconds: int, outcome: int, fault: int = 1) -> CallApplied | CallIgnored:
        """Anchor an epoch with one lease leaf, and settle it; `fault` counts with FAILED only."""
        epoch = self.anchor(leases=(LeaseLeaf(order_id, seconds, self.state.slot, outcome, 0, fault),))
        return self.run("bob", calls.LeaseSettle(self.proof(epoch, LEASES)))

    def claim(self, name: str, cumulative_planck: int, minted_planck: int = 0) -> CallApplied | CallIgnored:
        """Anchor an epoch with one reward leaf, and claim it."""
        leaf = RewardLeaf(account(name), cumulative_planck)
        epoch = self.anchor(rewards=(leaf,), minted_planck=minted_planck)
        return self.run("bob", calls.RewardClaim(self.proof(epoch, REWARDS)))


@pytest.fixture
def new_chain() -> type[Chain]:
    """Makes a `Chain`; numbers of the protocol are keyword arguments."""
    return Chain


@pytest.fixture
def chain() -> Chain:
    """A network with accounts only."""
    return Chain()


@pytest.fixture
def working() -> Chain:
    """A network with four checkers, an active worker (provider's), and a client (alice)."""
    chain = Chain()
    chain.add_worker()
    return chain


@pytest.fixture
def check_refusal() -> Callable[[str, Callable], None]:
    """Run a case, `case(chain)` or `case(new_chain)`: its call is refused for that reason and changes nothing."""

    def check(reason: str, case: Callable) -> None:
        makes_its_chain = "new_chain" in inspect.signature(case).parameters
        chain, name, body = case(Chain) if makes_its_chain else (chain := Chain(), *case(chain))
        before = {part: getattr(chain.state, part) for part in PARTS}
        outcome = chain.run(name, body)
        call_hash = chain.blocks[-1].calls[0].call_hash
        assert outcome == CallIgnored(call_hash, account(name), type(body).__name__, reason)
        assert {part: getattr(chain.state, part) for part in PARTS} == before

    return check


@pytest.fixture
def written_reasons() -> Callable[..., set[str]]:
    """The reasons for which modules of the interpreter refuse."""

    def collect(*modules: Any) -> set[str]:
        trees = [ast.parse(inspect.getsource(module)) for module in modules]
        nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
        return {node.args[0].value for node in nodes if getattr(node.func, "id", "") == "Refused"}

    return collect
