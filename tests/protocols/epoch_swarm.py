"""Nodes with epoch machines in virtual time, over a bus with delays and the real rules of the ledger."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import open_signed
from kaisar_p2p.wire.verdict import Verdict
from protocols import actions as do
from protocols.adverts import CPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.epoch_gossip import proposers, validate_epoch
from protocols.epoch_machine import EpochMachine
from protocols.epochs import EpochBody, EpochHeader, HeaderProposal, HeaderVote, MixReveal
from protocols.genesis import Allocation, Genesis, genesis_state, write_genesis
from protocols.interpreter import calls
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import conservation
from protocols.interpreter.state import State
from protocols.params import KAI
from protocols.popw import PASS
from protocols.quorum import QuorumCertificate, VerdictCore
from tests.protocols.interpreter.conftest import OneBlock, OneCall

PARAMS = {"slot_blocks": 4, "epoch_slots": 4, "block_ms": 1000, "reveal_window_ms": 1000, "proposer_timeout_ms": 3000,
          "standby_check_permille": 1000}  # fmt: skip
DELAY_S = 0.05
START_S = 1_000.0
MESSAGES = (MixReveal, HeaderProposal, HeaderVote)
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")


def keys_of(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(b"machine " + name.encode()).digest())


def account_of(name: str) -> bytes:
    return sha256(b"account " + name.encode()).digest()


@dataclass
class Node:
    keys: KeyPair
    machine: EpochMachine
    up: bool = True
    duties: dict[str, bytes] = field(default_factory=dict)
    items: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    notes: list[do.Note] = field(default_factory=list)
    published: list[Any] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    state: State | None = None
    change: Callable[[do.Action], do.Action | None] = lambda action: action
    hears: Callable[[str, bytes], bool] = lambda topic, payload: True


class Swarm:
    """Nodes, a bus and a ledger; a block a second."""

    def __init__(self, count: int = 7, **overrides: int) -> None:
        names = [f"checker {index}" for index in range(count)]
        accounts = [*names, "provider"]
        genesis = Genesis(
            "tests",
            "demo",
            int(START_S * 1000),
            tuple(Allocation(account_of(name), 1_000 * KAI) for name in accounts),
            treasury_planck=KAI,
            overrides=tuple((PARAMS | overrides).items()),
        )
        self.state = genesis_state(write_genesis(genesis))
        self.network = self.state.network
        self.now = START_S
        self.nodes = {keys_of(name).public_key: self._node(keys_of(name)) for name in names}
        self.worker = keys_of("provider").public_key
        self.checked = True
        self.submitted: Counter[str] = Counter()
        self.outcomes: list[Any] = []
        self._pending: list[tuple[bytes, bytes]] = [*self._joining(names)]
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.at(0.0, self._next_block)

    @property
    def params(self):
        return self.state.params

    def _node(self, keys: KeyPair, **stored: Any) -> Node:
        return Node(keys, EpochMachine(keys, self.network, **stored))

    def _joining(self, names: list[str]):
        for index, name in enumerate(names):
            keys, owner = keys_of(name), account_of(name)
            signature = keys.sign(calls.BIND_DOMAIN, self.network, calls.bind_body(owner, calls.CHECKER))
            yield owner, calls.payload_of(calls.LicenceBuy(1, bytes(32)))
            yield owner, calls.payload_of(calls.StakeBond((100 + index) * KAI))
            yield owner, calls.payload_of(calls.MachineBind(keys.public_key, calls.CHECKER, signature))
        keys, owner = keys_of("provider"), account_of("provider")
        signature = keys.sign(calls.BIND_DOMAIN, self.network, calls.bind_body(owner, calls.PROVIDER))
        yield owner, calls.payload_of(calls.MachineBind(keys.public_key, calls.PROVIDER, signature))
        yield owner, calls.payload_of(calls.WorkerRegister(keys.public_key, SPEC, KAI))

    # time

    def at(self, delay_s: float, task: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, task))

    def run_until(self, done: Callable[[], bool], limit_s: float = 300.0) -> None:
        end = self.now + limit_s
        while not done():
            assert self.now < end, "it never happened"
            self._turn()

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap[0][0] < end:
            self._turn()

    def _turn(self) -> None:
        time, _, task = heapq.heappop(self._heap)
        deadlines = [(node.machine.deadline, node) for node in self.nodes.values() if node.up and node.machine.deadline]
        due = min(deadlines, key=lambda pair: pair[0], default=None)
        if due is not None and due[0] <= time:
            heapq.heappush(self._heap, (time, -self._count, task))
            self._count += 1
            self.now = max(self.now, due[0])
            self.step(due[1], do.Wake())
            assert due[1].machine.deadline is None or due[1].machine.deadline > self.now, "a busy loop"
            return
        self.now = time
        task()

    # ledger

    def _next_block(self) -> None:
        number = self.state.number + 1
        pairs, self._pending = self._pending, []
        one = tuple(
            OneCall(signer, payload, sha256(b"%d %d" % (number, index)).digest())
            for index, (signer, payload) in enumerate(pairs)
        )
        digest = sha256(b"block %d" % number).digest()
        block = OneBlock(number, digest, self.state.block_hash, int(self.now * 1000), one)
        self.state, events = apply(self.state, block)
        assert conservation(self.state) == 0
        self.outcomes += events
        state = self.state
        for index, node in enumerate(self.nodes.values()):
            self.at(0.02 * index, lambda node=node: self._apply(node, state, events))
        if number % self.params.slot_blocks == 0 and state.epoch >= 1 and self.checked:
            slot = state.slot
            self.at(1.5, lambda: self.broadcast(self.verdict(state, slot)))
        self.at(self.params.block_ms / 1000, self._next_block)

    def _apply(self, node: Node, state: State, events: Any) -> None:
        if node.up:
            node.state = state
            self.step(node, do.BlockApplied(state, events))

    def verdict(self, state: State, slot: int, verdict: int = PASS) -> QuorumCertificate:
        core = VerdictCore(self.params.epoch_of_slot(slot), slot, self.worker, bytes(32), verdict)
        committee = check_committee(state, slot, self.worker)
        seats = committee.seats[: committee.threshold]
        signatures = tuple(self.nodes[seat].keys.sign(core.DOMAIN, self.network, encode(core)) for seat in seats)
        if state.workers[self.worker].activated_block == 0:
            activate = calls.WorkerActivate(QuorumCertificate(core, (1 << len(signatures)) - 1, signatures))
            self._pending.append((account_of("provider"), calls.payload_of(activate)))
        return QuorumCertificate(core, (1 << len(signatures)) - 1, signatures)

    # bus

    def broadcast(self, certificate: QuorumCertificate, but: tuple[bytes, ...] = ()) -> None:
        for key, node in self.nodes.items():
            if key not in but:
                self._deliver(node, do.Gossip("certificate", certificate, bytes(32), self.now + DELAY_S))

    def _deliver(self, node: Node, event: do.Event) -> None:
        def arrive() -> None:
            if node.up:
                self.step(node, event)

        self.at(DELAY_S, arrive)

    def step(self, node: Node, event: do.Event) -> None:
        actions = node.machine.step(event, self.now)
        refused = set()
        for action in actions:
            duty = getattr(action, "duty", None)
            if duty is not None and node.duties.setdefault(duty.key, duty.digest) != duty.digest:
                refused.add(duty.key)
                node.refused.append(duty.key)
        for action in actions:
            duty = getattr(action, "duty", None)
            if duty is None or duty.key not in refused:
                changed = node.change(action)
                if changed is not None:
                    self.perform(node, changed)

    def perform(self, node: Node, action: do.Action) -> None:
        match action:
            case do.Publish():
                node.published.append(open_signed(MESSAGES, action.payload, self.network))
                assert action.duty is not None
                for other in self.nodes.values():
                    self.at(0.0 if other is node else DELAY_S, lambda other=other: self.gossip(other, action))
            case do.Request():
                self.at(DELAY_S, lambda: self._serve(node, action))
            case do.Submit():
                self.submitted[action.key] += 1
                self._pending.append((account_of("provider"), action.payload))
            case do.Store():
                node.items[action.kind, action.key] = action.value
            case do.Note():
                node.notes.append(action)
            case _:
                raise AssertionError(action)

    def gossip(self, node: Node, action: do.Publish) -> None:
        if not node.up or node.state is None or not node.hears(action.topic, action.payload):
            return
        verdict, reason, message = validate_epoch(action.payload, self.now, node.state)
        assert verdict is not Verdict.REJECT, reason
        if verdict is Verdict.ACCEPT:
            self.step(node, do.Gossip(action.topic, message, message.signer, self.now))

    def _serve(self, client: Node, request: do.Request) -> None:
        server = self.nodes[request.peer]
        replies: list[Any] = []
        if server.up:
            event = do.Incoming(1, client.keys.public_key, request.protocol, request.payload, self.now)
            replies = [each for reply in server.machine.step(event, self.now) if (each := server.change(reply))]
        for reply in replies:
            self._deliver(client, do.Answer(request.request_id, reply.payload, self.now))
        self._deliver(client, do.RequestEnded(request.request_id, "" if replies else "unreachable"))

    # questions

    def anchored(self, epoch: int) -> bool:
        return epoch in self.state.anchors

    def until_anchored(self, epoch: int, limit_s: float = 300.0) -> None:
        self.run_until(lambda: self.anchored(epoch), limit_s)
        self.run_for(0.5)

    def proposer(self, epoch: int, round_: int = 0) -> Node:
        order = proposers(self.state, epoch)
        return self.nodes[order[round_ % len(order)]]

    def body(self, epoch: int) -> EpochBody:
        digest = self.state.anchors[epoch].header_hash
        holder = next(node for node in self.nodes.values() if ("body", digest) in node.items)
        return decode(EpochBody, holder.items["body", digest])

    def until_end_of(self, epoch: int) -> None:
        """Up to the moment at which the epoch's last block exists and no node has seen it."""
        self.run_until(lambda: self.state.epoch == epoch and self.params.ends_epoch(self.state.number))

    def restart(self, node: Node) -> None:
        """A new process with what the old one had stored; it replays the blocks of the running epoch."""
        certificates, bodies = (
            [(key, value) for (each, key), value in node.items.items() if each == kind]
            for kind in ("certificate", "body")
        )
        node.machine = EpochMachine(node.keys, self.network, certificates=certificates, bodies=bodies)


def votes_of(node: Node, epoch: int) -> dict[int, bytes]:
    """Header hash by round of the node's published votes; two different ones in a round fail the test."""
    found: dict[int, bytes] = {}
    for verified in node.published:
        if isinstance(verified.message, HeaderVote) and verified.message.epoch == epoch:
            assert (
                found.setdefault(verified.message.round, verified.message.header_hash) == verified.message.header_hash
            )
    return found


def proposals_of(node: Node, epoch: int) -> dict[int, EpochHeader]:
    """Header by round of the node's published proposals; two different ones in a round fail the test."""
    found: dict[int, EpochHeader] = {}
    for verified in node.published:
        if isinstance(verified.message, HeaderProposal) and verified.message.header.epoch == epoch:
            header = verified.message.header
            assert found.setdefault(header.round, header) == header
    return found


def reasons(swarm: Swarm) -> set[str]:
    notes = [dict(note.data) for node in swarm.nodes.values() for note in node.notes]
    return {note["reason"] for note in notes if "reason" in note}
