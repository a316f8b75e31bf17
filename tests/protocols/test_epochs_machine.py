"""Seven epoch machines back to back in virtual time, over a bus with delays and the real rules of the ledger."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest

from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import open_signed, seal
from kaisar_p2p.wire.verdict import Verdict
from protocols import actions as do
from protocols.adverts import CPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.digests import header_hash
from protocols.epoch_body import leaves_of
from protocols.epoch_gossip import proposers, validate_epoch
from protocols.epoch_machine import EpochMachine
from protocols.epochs import REWARDS, VERDICTS, EpochBody, EpochHeader, HeaderProposal, HeaderVote, MixReveal
from protocols.equivocation import DoubleVote
from protocols.genesis import Allocation, Genesis, genesis_state, write_genesis
from protocols.interpreter import calls
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import conservation
from protocols.interpreter.events import Anchored
from protocols.interpreter.state import State
from protocols.params import KAI
from protocols.popw import PASS, WRONG
from protocols.proofs import prove_reward
from protocols.quorum import QuorumCertificate, TicketCore, VerdictCore

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


def test_all_agree_and_the_anchor_is_posted_once() -> None:
    swarm = Swarm()
    swarm.until_anchored(3)
    for epoch in (1, 2, 3):
        anchor = swarm.state.anchors[epoch]
        assert anchor.header.round == 0
        assert swarm.submitted[f"anchor/{epoch}"] == 1
        assert 3 * anchor.signed_stake >= 2 * anchor.total_stake
        assert {("body", anchor.header_hash) in node.items for node in swarm.nodes.values()} == {True}
    assert not reasons(swarm)
    assert swarm.state.anchors[2].header.verdicts >= 3
    assert swarm.state.anchors[2].header.first_slot == swarm.state.anchors[1].header.last_slot + 1
    assert len({swarm.state.anchors[epoch].header.mix for epoch in (1, 2, 3)}) == 3
    assert len(swarm.body(2).reveals) == 7


def test_rewards_can_be_claimed_from_the_anchored_body() -> None:
    swarm = Swarm()
    swarm.until_anchored(3)
    name = account_of("provider")
    before = swarm.state.accounts[name].balance_planck
    proof = prove_reward(swarm.body(3), name, swarm.network)
    swarm._pending.append((name, calls.payload_of(calls.RewardClaim(proof))))
    swarm.run_for(2.0)
    assert swarm.state.accounts[name].balance_planck > before
    assert swarm.state.accounts[name].claimed_planck > 0


def test_evidence_that_not_everybody_has_delays_an_epoch_by_a_round_only() -> None:
    """Whoever signs nonsense against itself can make more evidence than every node hears of."""
    swarm = Swarm()
    swarm.until_anchored(1)
    for index, node in enumerate(swarm.nodes.values()):
        cores = [TicketCore(bytes([index]) * 32, bytes(32), bytes(32), bytes([each]) * 32) for each in (1, 2)]
        evidence = DoubleVote(bytes([index]) * 32, cores[0], bytes(64), cores[1], bytes(64))
        swarm.step(node, do.Gossip("evidence", evidence, bytes(32), swarm.now))
    swarm.until_anchored(4)
    assert {swarm.state.anchors[epoch].header.round for epoch in (2, 3, 4)} == {1}
    assert "evidence that is not known here" in reasons(swarm)


def test_no_certificate_of_a_slot_is_lost_or_counted_twice() -> None:
    swarm = Swarm()
    swarm.until_anchored(5)
    slots = [certificate.core.slot for epoch in (1, 2, 3, 4, 5) for certificate in swarm.body(epoch).certificates]
    assert slots == sorted(set(slots))
    first = swarm.params.epoch_slots
    assert set(slots) >= set(range(first, 6 * first - 1))  # the very last may still be on its way


def test_a_dead_proposer_is_replaced_in_the_next_round() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    swarm.proposer(2).up = False
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 1


def test_a_proposer_that_dies_before_it_submits_is_stood_in_for() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    swarm.proposer(2).change = lambda action: None if isinstance(action, do.Submit) else action
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round in (0, 1)


def test_a_member_that_lacks_a_certificate_fetches_the_body_and_signs() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.checked = False
    swarm.run_until(lambda: swarm.state.epoch == 2)
    swarm.run_for(1.0)
    order = proposers_soon(swarm)
    lacking = swarm.nodes[order]
    swarm.broadcast(swarm.verdict(swarm.state, swarm.state.slot), but=(order,))
    swarm.until_end_of(2)
    if swarm.proposer(2) is lacking:
        pytest.fail("choose another node")
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 0
    assert votes_of(lacking, 2)


def proposers_soon(swarm: Swarm) -> bytes:
    """A node that is not among the first proposers of epoch 2, by looking at the future of a copy."""
    copy = Swarm()
    copy.until_anchored(1)
    copy.checked = False
    copy.until_end_of(2)
    return proposers(copy.state, 2)[-1]


def test_a_proposer_that_leaves_out_a_certificate_gets_no_signature() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.run_until(lambda: swarm.state.epoch == 2)
    swarm.until_end_of(2)
    liar = swarm.proposer(2)
    liar.machine._pool.forget(lambda subject: True)
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 1
    assert any("left out" in reason for reason in reasons(swarm))
    assert all(0 not in votes_of(node, 2) for node in swarm.nodes.values() if node is not liar)


def wrong_reward(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    richer = replace(body.rewards[0], cumulative_planck=body.rewards[0].cumulative_planck + 1)
    body = replace(body, rewards=(richer, *body.rewards[1:]))
    root = merkle.root(leaves_of(body, REWARDS, network))
    return replace(header, reward_root=root, minted_planck=header.minted_planck + 1), body


def wrong_verdict(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    first = body.certificates[0]
    body = replace(body, certificates=(replace(first, core=replace(first.core, verdict=WRONG)), *body.certificates[1:]))
    return replace(header, verdict_root=merkle.root(leaves_of(body, VERDICTS, network))), body


def another(header: EpochHeader) -> EpochHeader:
    """Members sign a header that they can rebuild without asking for its body; this one they cannot."""
    return replace(header, log_root=sha256(b"another").digest())


def wrong_reveal(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    return another(header), replace(body, reveals=(replace(body.reveals[0], proof=bytes(80)), *body.reveals[1:]))


def chosen_reveals(header: EpochHeader, body: EpochBody, network: bytes) -> tuple[EpochHeader, EpochBody]:
    return another(header), replace(body, reveals=body.reveals[1:])


LIES = {
    "wrong rewards": wrong_reward,
    "wrong state_root": lambda header, body, network: (replace(header, state_root=bytes(32)), body),
    "wrong minted_planck": lambda header, body, network: (replace(header, minted_planck=0), body),
    "wrong mix": lambda header, body, network: (replace(header, mix=bytes(32)), body),
    "wrong lease_root": lambda header, body, network: (replace(header, lease_root=bytes(32)), body),
    "an invalid certificate": wrong_verdict,
    "a false reveal": wrong_reveal,
    "a reveal that was published in time is left out": chosen_reveals,
    "evidence that is not known": lambda header, body, network: (another(header), replace(body, evidence=(bytes(32),))),
    "the body is of another epoch": lambda header, body, network: (another(header), replace(body, epoch=1)),
}


@pytest.mark.parametrize("reason", LIES)
def test_a_proposer_that_lies_gets_no_signature(reason: str) -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    liar = swarm.proposer(2)

    def lie(action: do.Action) -> do.Action:
        if not isinstance(action, do.Publish) or not isinstance(
            message := open_signed(MESSAGES, action.payload, swarm.network).message, HeaderProposal
        ):
            return action
        bodies = liar.machine._tallies[2].bodies
        body = decode(EpochBody, bodies[header_hash(message.header, swarm.network)])
        header, body = LIES[reason](message.header, body, swarm.network)
        bodies[header_hash(header, swarm.network)] = encode(body)
        return replace(action, payload=seal(HeaderProposal(header), liar.keys, swarm.network))

    liar.change = lie
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].header.round == 1
    assert reason in " ".join(reasons(swarm))
    assert all(0 not in votes_of(node, 2) for node in swarm.nodes.values())


def test_a_proposer_that_serves_nothing_or_rubbish_gets_no_signature() -> None:
    for answer in (lambda action: None, lambda action: replace(action, payload=b"rubbish")):
        swarm = Swarm()
        swarm.until_anchored(1)
        swarm.until_end_of(2)
        other = swarm.proposer(2)
        other.change = lambda action, answer=answer: answer(action) if isinstance(action, do.Reply) else action
        other.machine.step(do.Gossip("certificate", swarm.verdict(swarm.state, swarm.state.slot), b"", 0.0), swarm.now)
        swarm.checked = False
        swarm.until_anchored(2)
        assert swarm.state.anchors[2].header.round in (0, 1)


def test_without_a_quorum_the_next_epoch_covers_its_slots() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    down = list(swarm.nodes.values())[:4]
    for node in down:
        node.hears = lambda topic, payload: False
        node.change = lambda action: None if isinstance(action, do.Publish) else action
    swarm.until_end_of(3)
    assert not swarm.anchored(2)
    for node in down:
        node.hears = lambda topic, payload: True
        node.change = lambda action: action
    swarm.until_anchored(3)
    header = swarm.state.anchors[3].header
    assert header.first_slot == swarm.state.anchors[1].header.last_slot + 1
    assert header.first_slot // swarm.params.epoch_slots == 2
    slots = {certificate.core.slot for certificate in swarm.body(3).certificates}
    assert slots >= set(range(header.first_slot, header.last_slot - 1))
    assert header.minted_planck > swarm.params.epoch_reward_planck


@pytest.mark.parametrize("delay_s", [0.3, 1.0, 1.05, 1.15, 1.25, 2.0])
def test_a_restart_never_signs_twice_differently(delay_s: float) -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    swarm.until_end_of(2)
    ended = swarm.state
    swarm.run_for(delay_s)
    victims = list(dict.fromkeys(id(swarm.proposer(2, round_)) for round_ in range(3)))
    for node in [node for node in swarm.nodes.values() if id(node) in victims]:
        swarm.restart(node)
        node.machine._pool.forget(lambda subject: subject[0] % 2 == 0)  # it lost some, so it builds another body
        if not swarm.anchored(2):
            swarm.step(node, do.BlockApplied(ended, (), live=False))
    swarm.until_anchored(2)
    for node in swarm.nodes.values():
        votes_of(node, 2)
        proposals_of(node, 2)
    if delay_s == 1.25:
        assert swarm.nodes[swarm.proposer(2).keys.public_key].refused


def test_a_late_joiner_fetches_the_anchored_body_and_takes_part() -> None:
    swarm = Swarm()
    swarm.until_anchored(2)
    node = next(iter(swarm.nodes.values()))
    node.machine = EpochMachine(node.keys, swarm.network)
    node.items.clear()
    swarm.until_anchored(3)
    assert ("body", swarm.state.anchors[3].header_hash) in node.items
    swarm.until_anchored(4)
    assert votes_of(node, 4)


def test_a_node_that_was_away_gets_the_body_of_what_was_anchored() -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    node = list(swarm.nodes.values())[2]
    swarm.until_end_of(2)
    node.hears = lambda topic, payload: False
    swarm.until_anchored(2)
    swarm.run_for(1.0)
    assert ("body", swarm.state.anchors[2].header_hash) in node.items


@pytest.mark.parametrize("restarts", [False, True])
def test_an_anchor_that_comes_after_the_next_epoch_has_ended_is_built_upon(restarts: bool) -> None:
    swarm = Swarm()
    swarm.until_anchored(1)
    away = list(swarm.nodes.values())[3]
    held: list[bytes] = []

    def hold(action: do.Action) -> do.Action | None:
        if not isinstance(action, do.Submit) or action.key != "anchor/2":
            return action
        held.append(action.payload)
        return None

    for node in swarm.nodes.values():
        node.change = hold
    swarm.until_end_of(2)
    away.hears = lambda topic, payload: False
    swarm.until_end_of(3)
    away.hears = lambda topic, payload: True
    assert not swarm.anchored(2)
    for node in swarm.nodes.values() if restarts else ():
        swarm.restart(node)  # all at once: what they had signed for is on their disks only
    swarm._pending.append((account_of("provider"), held[0]))
    swarm.until_anchored(3)
    assert swarm.anchored(2)
    assert swarm.state.anchors[3].header.previous == swarm.state.anchors[2].header_hash
    swarm.run_for(2.0)
    bodies = {digest for kind, digest in away.items if kind == "body"}
    assert {swarm.state.anchors[epoch].header_hash for epoch in (2, 3)} <= bodies


def test_one_checker_alone_closes_epochs() -> None:
    swarm = Swarm(count=1)
    swarm.until_anchored(2)
    assert swarm.state.anchors[2].signed_stake == swarm.state.anchors[2].total_stake


def test_the_anchored_event_is_what_ends_an_epoch() -> None:
    swarm = Swarm()
    swarm.until_anchored(2)
    assert [event.epoch for event in swarm.outcomes if isinstance(event, Anchored)][:2] in ([0, 1], [1, 2])
    assert all(not node.machine._tallies or min(node.machine._tallies) > 2 for node in swarm.nodes.values())
