"""The ledger's side of a node: the same state on every node, outcomes of calls, and calls that are handed in once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import CallRejected, LedgerError
from kaisar_p2p.ledger import Block, Receipt
from kaisar_p2p.ledger.interface import Call, Checkpoint
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair, sha256
from kaisar_p2p.wire.merkle import EMPTY_ROOT
from node.chain import ANCHOR_PROOFS, RESUBMIT_BLOCKS, CallSubmitter, Chain
from node.inbox import Inbox
from protocols.actions import BlockApplied
from protocols.digests import header_hash, registry_root
from protocols.epochs import EpochCertificate, EpochHeader, HeaderVote
from protocols.genesis import Allocation, Genesis, write_genesis
from protocols.interpreter import calls
from protocols.params import KAI

OTHER = b"\x77" * 32
GENESIS_MS = 1_000_000_000


def transfer(planck: int = KAI) -> bytes:
    return calls.payload_of(calls.Transfer(OTHER, planck))


# ── a real ledger ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_two_nodes_derive_the_same_state(make_net: Any, make_wallet: Any, follow: Any) -> None:
    """One seals and submits, the other only reads; a third joins late."""
    wallet = make_wallet()
    net = make_net({wallet.public_key: 1_000 * KAI})
    first, second = await follow(net), await follow(net, seal=False)
    with trio.fail_after(20):
        for amount in (KAI, 2 * KAI, 10_000 * KAI):
            receipt = await first.chain.ledger.submit(transfer(amount), wallet)
            outcomes = [await each.chain.outcome(receipt, 10) for each in (first, second)]
            assert outcomes[0] == outcomes[1]
            assert bool(outcomes[0]) is (amount > 1_000 * KAI)
        third = await follow(net)
        number = (await third.chain.caught_up()).number
        states = []
        for each in (first, second, third):
            while each.chain.state.number < number + 3:
                await each.chain.advanced()
            states.append(each.chain.state)
    assert all(each.accounts[OTHER].balance_planck == 3 * KAI for each in states)
    assert {(each.network, each.accounts, each.totals) for each in states} == {
        (states[0].network, states[0].accounts, states[0].totals)
    }
    assert third.chain.call_outcomes == first.chain.call_outcomes


async def test_an_outcome_that_does_not_come_is_an_error(
    make_net: Any, follow: Any, autojump_clock: trio.testing.MockClock
) -> None:
    follower = await follow(make_net(), seal=False)
    with pytest.raises(LedgerError, match="not final after 3 s"):
        await follower.chain.outcome(Receipt(b"\x01" * 32, 0), 3.0)


# ── a ledger in memory ───────────────────────────────────────────────────────────────────────────────────────────────


class SetClock:
    """Stands still until it is moved."""

    def __init__(self, now: float) -> None:
        self.at = now

    def now(self) -> float:
        return self.at


class MemoryLedger:
    """Blocks that a test makes; calls that are submitted are only recorded."""

    def __init__(self, *accounts: bytes, **overrides: int) -> None:
        numbers = {"block_ms": 1000, "slot_blocks": 2, "epoch_slots": 2} | overrides
        allocations = tuple(Allocation(account, 10_000 * KAI) for account in accounts)
        self.genesis = write_genesis(
            Genesis("test", "demo", GENESIS_MS, allocations, 0, tuple(sorted(numbers.items())))
        )
        self.network = sha256(self.genesis)
        self.blocks: list[Block] = []
        self.submitted: list[bytes] = []
        self.error: Exception | None = None
        self._grown = trio.Event()

    def seal(self, *payloads: bytes, signer: bytes = bytes(32)) -> tuple[bytes, ...]:
        number, parent = len(self.blocks), self.blocks[-1].hash if self.blocks else bytes(32)
        made = tuple(
            Call(signer, payload, (index,), sha256(b"%d %d" % (number, index)))
            for index, payload in enumerate(payloads)
        )
        self.blocks.append(Block(number, sha256(b"%d" % number), parent, GENESIS_MS + 1000 * number, made))
        self._grown.set()
        self._grown = trio.Event()
        return tuple(call.call_hash for call in made)

    async def follow(self, checkpoint: Checkpoint | None) -> AsyncIterator[Block]:
        at = 0
        while True:
            while at >= len(self.blocks):
                await self._grown.wait()
            yield self.blocks[at]
            at += 1

    async def finalized(self) -> Checkpoint:
        await trio.lowlevel.checkpoint()
        return self.blocks[-1].checkpoint

    async def submit(self, payload: bytes, signer: object) -> Receipt:
        if self.error is not None:
            raise self.error
        self.submitted.append(payload)
        return Receipt(sha256(payload), 0)


@dataclass
class Bench:
    ledger: MemoryLedger
    chain: Chain
    inbox: Inbox
    clock: SetClock
    nursery: trio.Nursery

    async def run(self) -> None:
        self.nursery.start_soon(self.chain.run)
        await trio.testing.wait_all_tasks_blocked()

    def applied(self) -> list[BlockApplied]:
        events = []
        while (event := self.inbox.get_nowait()) is not None:
            assert isinstance(event, BlockApplied)
            events.append(event)
        return events


@pytest.fixture
async def bench() -> AsyncIterator[Callable[..., Bench]]:
    async with trio.open_nursery() as nursery:

        def make(*accounts: bytes, now: float = GENESIS_MS / 1000, **overrides: int) -> Bench:
            ledger, inbox, clock = MemoryLedger(*accounts, **overrides), Inbox(), SetClock(now)
            return Bench(ledger, Chain(ledger, inbox, clock), inbox, clock, nursery)  # type: ignore[arg-type]

        yield make
        nursery.cancel_scope.cancel()


async def test_old_blocks_are_applied_but_only_the_last_epochs_are_told(bench: Callable[..., Bench]) -> None:
    made = bench(now=GENESIS_MS / 1000 + 10_000)
    for _ in range(50):
        made.ledger.seal()
    await made.run()
    told = made.applied()
    assert made.chain.state.number == 49
    assert [event.state.number for event in told] == list(range(42, 50))
    assert not any(event.live for event in told)
    made.clock.at = GENESIS_MS / 1000 + 50
    made.ledger.seal()
    await trio.testing.wait_all_tasks_blocked()
    (event,) = made.applied()
    assert event.live
    assert event.state is made.chain.state


async def test_what_was_final_before_the_start_is_not_live_however_young(bench: Callable[..., Bench]) -> None:
    made = bench()
    for _ in range(5):
        made.ledger.seal()
    await made.run()
    for _ in range(2):
        made.ledger.seal()
    await trio.testing.wait_all_tasks_blocked()
    assert [event.live for event in made.applied()] == [False, False, False, False, True, True, True]


async def test_catching_up_means_all_that_was_final(bench: Callable[..., Bench]) -> None:
    made = bench()
    for _ in range(8):
        made.ledger.seal()
    made.nursery.start_soon(made.chain.run)
    with trio.fail_after(5):
        assert (await made.chain.caught_up()).number == 7


async def test_outcomes_are_remembered_within_bounds(bench: Callable[..., Bench]) -> None:
    account = b"\x05" * 32
    made = bench(account)
    made.ledger.seal()
    good, bad, garbage = made.ledger.seal(transfer(), transfer(10**30), b"garbage", signer=account)
    await made.run()
    assert await made.chain.outcome(Receipt(good, 0), 1.0) == ""
    assert await made.chain.outcome(Receipt(bad, 0), 1.0) != ""
    assert await made.chain.outcome(Receipt(garbage, 0), 1.0) != ""
    for _ in range(10):
        made.ledger.seal(*([b"garbage"] * 1000), signer=account)
    newest = made.ledger.blocks[-1].calls[-1].call_hash
    await trio.testing.wait_all_tasks_blocked()
    assert made.chain.call_outcomes[newest]
    assert len(made.chain.call_outcomes) <= 4096


async def test_who_waits_for_an_outcome_is_told(bench: Callable[..., Bench]) -> None:
    made = bench(b"\x05" * 32)
    made.ledger.seal()
    await made.run()
    outcomes: list[str] = []

    async def wait() -> None:
        outcomes.append(await made.chain.outcome(Receipt(sha256(b"2 0"), 0), 60.0))

    made.nursery.start_soon(wait)
    made.ledger.seal()
    await trio.testing.wait_all_tasks_blocked()
    assert outcomes == []
    made.ledger.seal(transfer(), signer=b"\x05" * 32)
    await trio.testing.wait_all_tasks_blocked()
    assert outcomes == [""]


# ── anchors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_anchor_is_kept_with_what_proves_it(bench: Callable[..., Bench]) -> None:
    owner, keys = b"\x05" * 32, KeyPair.from_seed(b"\x06" * 32)
    made = bench(owner, min_stake_planck=KAI)
    network = made.chain.state.network
    bind = calls.MachineBind(
        keys.public_key, calls.CHECKER, keys.sign(calls.BIND_DOMAIN, network, calls.bind_body(owner, calls.CHECKER))
    )
    made.ledger.seal()
    joining = (calls.LicenceBuy(1, bytes(32)), calls.StakeBond(200 * KAI), bind)
    made.ledger.seal(*map(calls.payload_of, joining), signer=owner)
    for _ in range(7):
        made.ledger.seal()
    await made.run()
    state = made.chain.state
    registry = state.registries[1]
    assert registry == ((keys.public_key, 200 * KAI),)
    header = EpochHeader(
        epoch=1, round=0, first_slot=2, last_slot=3, previous=bytes(32), mix=b"\x01" * 32,
        registry_root=registry_root(registry), state_root=bytes(32), verdict_root=EMPTY_ROOT, reward_root=EMPTY_ROOT,
        lease_root=EMPTY_ROOT, evidence_root=EMPTY_ROOT, log_root=EMPTY_ROOT, verdicts=0, rewards=0, leases=0,
        evidence=0, minted_planck=0,
    )  # fmt: skip
    vote = encode(HeaderVote(1, 0, header_hash(header, network)))
    certificate = EpochCertificate(b"\x01", (keys.sign(HeaderVote.DOMAIN, network, vote),))
    forged = calls.AnchorPost(replace(header, mix=b"\x02" * 32), certificate)
    post = calls.AnchorPost(header, certificate)
    made.ledger.seal(*map(calls.payload_of, (forged, post)), signer=owner)
    await trio.testing.wait_all_tasks_blocked()
    assert made.chain.state.last_anchor == 1
    proof = made.chain.anchor_proofs[1]
    assert (proof.header, proof.certificate, proof.registry) == (header, certificate, registry)
    assert list(made.chain.anchor_proofs) == [1]
    assert ANCHOR_PROOFS >= 2


# ── handing in ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_is_handed_in_once_in_a_while(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.ledger.seal()
    await made.run()
    submitter = CallSubmitter(made.chain, object())  # type: ignore[arg-type]
    for _ in range(3):
        await submitter.submit_once("a", b"call")
    await submitter.submit_once("b", b"call")
    await submitter.submit_once("a", b"changed")
    assert made.ledger.submitted == [b"call", b"call", b"changed"]
    for _ in range(RESUBMIT_BLOCKS):
        made.ledger.seal()
        await trio.testing.wait_all_tasks_blocked()
        await submitter.submit_once("b", b"call")
    assert made.ledger.submitted == [b"call", b"call", b"changed", b"call"]


@pytest.mark.parametrize("error", [CallRejected("the pool is full"), LedgerError("the disk is full")])
async def test_a_call_that_was_refused_is_tried_again(
    bench: Callable[..., Bench], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    made = bench()
    submitter = CallSubmitter(made.chain, object())  # type: ignore[arg-type]
    made.ledger.error = error
    await submitter.submit_once("a", b"call")
    made.ledger.error = None
    await submitter.submit_once("a", b"call")
    assert made.ledger.submitted == [b"call"]
    assert str(error) in caplog.text


async def test_what_was_handed_in_is_remembered_within_bounds(bench: Callable[..., Bench]) -> None:
    made = bench()
    submitter = CallSubmitter(made.chain, object())  # type: ignore[arg-type]
    for n in range(3_000):
        await submitter.submit_once(str(n), b"call")
    assert len(submitter._sent) <= 1024
