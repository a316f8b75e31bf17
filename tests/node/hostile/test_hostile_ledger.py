"""What a funded account may write into blocks: it changes nothing, raises nothing, and costs little to refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaisar_p2p.errors import CallRejected
from kaisar_p2p.identity import Scheme, Wallet
from kaisar_p2p.identity.keys import SecretKey
from kaisar_p2p.ledger import ChainParameters, EmbeddedLedger, open_embedded
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.envelope import seal
from node.chain import Chain
from node.clock import Clock
from node.inbox import Inbox
from protocols import committees
from protocols.digests import header_hash, spec_hash
from protocols.epochs import LEASES, REWARDS, EpochCertificate, HeaderVote, LeafProof, LeaseLeaf, RewardLeaf
from protocols.genesis import Allocation, Genesis, write_genesis
from protocols.interpreter import calls, draft
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import conservation
from protocols.interpreter.events import CallApplied, CallIgnored
from protocols.interpreter.state import ACTIVE, State
from protocols.orders import Offer, OrderSpec
from protocols.params import KAI
from protocols.quorum import QuorumCertificate

MOST = 2**128 - 1
CALLS_IN_A_BLOCK = 1_024
SIGNATURE = bytes(64)


@dataclass(frozen=True)
class Block:
    number: int
    hash: bytes
    parent: bytes
    time_ms: int
    calls: tuple[Any, ...]


def applied(state: State, signer: bytes, payloads: list[bytes]) -> tuple[State, list[str]]:
    """The state after one block with these calls, and why each was ignored ("" if it was not)."""
    made = tuple(
        SimpleNamespace(signer=signer, payload=payload, call_hash=sha256(b"call %d" % number).digest())
        for number, payload in enumerate(payloads)
    )
    block = Block(state.number + 1, sha256(b"next").digest(), state.block_hash, state.time_ms + 500, made)
    after, events = apply(state, block)
    assert conservation(after) == conservation(state)
    reasons = [getattr(each, "reason", "") for each in events if isinstance(each, CallApplied | CallIgnored)]
    assert len(reasons) == len(payloads)
    return after, reasons


def money(state: State) -> tuple[Any, ...]:
    return state.accounts, state.orders, state.workers, state.totals, state.machines


def attacker_of(world: Any) -> bytes:
    owner: bytes = world.state.machines[world.bound.public_key].owner
    return owner


JUNK = {
    "nothing": b"",
    "no magic": b"\xff" * 65_536,
    "only the magic": b"KSR\x01",
    "another version": b"KSR\x02\x50" + bytes(100),
    "an unknown call": b"KSR\x01\xff" + bytes(100),
    "a message that is no call": b"KSR\x01\x0b" + bytes(100),
    "another call's body": b"KSR\x01\x50" + calls.payload_of(calls.StakeWithdraw())[5:],
    "deep": b"KSR\x01\x50" + b"\x91" * 65_000,
    "wide": b"KSR\x01\x50\xdc\xff\x00" + b"\x01" * 0xFF00,
    "huge lengths": b"KSR\x01\x50\xdd\xff\xff\xff\xff",
    "not minimal": b"KSR\x01\x54\x91\xcc\x54",
    "something after it": calls.payload_of(calls.StakeWithdraw()) + b"\x00",
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_ignored(name: str, world: Any) -> None:
    after, reasons = applied(world.state, attacker_of(world), [JUNK[name]] * 3)
    assert all(reasons)
    assert money(after) == money(world.state)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tag=st.sampled_from(sorted(calls.CALLS)),
    noise=st.binary(max_size=200),
    plain=st.lists(st.integers() | st.binary(max_size=70) | st.text(max_size=9), max_size=6),
)
def test_any_body_of_any_call(tag: int, noise: bytes, plain: list[Any], world: Any) -> None:
    try:
        packed = msgpack.packb([tag, *plain], use_bin_type=True)
    except OverflowError:
        packed = noise
    head = b"KSR\x01" + bytes([tag])
    after, _ = applied(world.state, attacker_of(world), [head + noise, head + packed])
    assert conservation(after) == conservation(world.state)


def amounts() -> list[Any]:
    """Calls that would overflow, go below nothing or take what is not theirs, if anything could."""
    to = bytes([9]) * 32
    return [
        calls.Transfer(to, MOST),
        calls.Transfer(to, 2**80),
        calls.Transfer(to, 0),
        calls.StakeBond(MOST),
        calls.StakeUnbond(MOST),
        calls.StakeUnbond(201 * KAI),
        calls.StakeWithdraw(),
        calls.LicenceBuy(2**16 - 1, bytes(32)),
        calls.LicenceBuy(2**16 - 1, to),
        calls.LeaseSettle(LeafProof(0, LEASES, 0, encode(LeaseLeaf(bytes(32), 2**32 - 1, 0, 1)), ())),
        calls.RewardClaim(LeafProof(2**32 - 1, REWARDS, 2**32 - 1, encode(RewardLeaf(to, MOST)), (bytes(32),) * 13)),
        calls.OrderCancel(bytes(32)),
    ]


@pytest.mark.parametrize("number", range(len(amounts())))
def test_amounts_that_are_too_large(number: int, world: Any) -> None:
    after, reasons = applied(world.state, attacker_of(world), [calls.payload_of(amounts()[number])])
    assert all(reasons)
    assert money(after) == money(world.state)


@pytest.mark.parametrize(
    ("escrow", "points", "price", "duration"),
    [
        (MOST, 0, KAI, 60),
        (0, MOST, KAI, 60),
        (MOST, MOST, KAI, 60),
        (1, MOST - 1, KAI, 60),
        (MOST, 0, MOST, 90 * 86_400),
        (0, 0, MOST, 60),
        (0, 0, 1, 60),
        (0, 0, 0, 60),
        (1, 0, 1, 2**32 - 1),
    ],
)
def test_escrow_and_points_that_do_not_add_up(escrow: int, points: int, price: int, duration: int, world: Any) -> None:
    resources = world.state.orders[world.order_id].resources
    spec = OrderSpec(resources, duration, bytes(32))
    now_ms = world.state.time_ms + 10_000
    digest = spec_hash(spec, world.network)
    offer = Offer(world.victim.public_key, world.bound.public_key, digest, price, now_ms, bytes(32))
    call = calls.OrderPlace(spec, seal(offer, world.victim, world.network), escrow, points)
    after, reasons = applied(world.state, attacker_of(world), [calls.payload_of(call)])
    assert all(reasons)
    assert money(after) == money(world.state)


# ── what refusing costs ──────────────────────────────────────────────────────────────────────────────────────────────


class Count:
    """Counts calls of a function."""

    def __init__(self, real: Any) -> None:
        self.real, self.count = real, 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.real(*arguments)


def test_a_block_full_of_garbage_signatures_is_refused_at_the_first_of_each(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, drawn = Count(committees.verify), Count(draft.check_committee)
    monkeypatch.setattr(committees, "verify", checked)
    monkeypatch.setattr(draft, "check_committee", drawn)
    full = QuorumCertificate(world.verdict(), 2**64 - 1, (SIGNATURE,) * 64)
    seats = QuorumCertificate(world.verdict(), 2**5 - 1, (SIGNATURE,) * 5)
    payloads = [calls.payload_of(calls.WorkerActivate(each)) for each in (full, seats)]
    after, reasons = applied(world.state, attacker_of(world), payloads * (CALLS_IN_A_BLOCK // 2))
    assert set(reasons) == {"the certificate is not by a quorum of the committee"}
    assert checked.count == CALLS_IN_A_BLOCK // 2
    assert drawn.count == 1
    assert money(after) == money(world.state)


def test_headers_of_too_little_stake_cost_no_signature(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Count(committees.verify)
    monkeypatch.setattr(committees, "verify", checked)
    header = replace(world.header(), epoch=0, first_slot=0, last_slot=3)
    state = replace(world.state, number=world.state.number)
    lies = [
        EpochCertificate(b"", ()),
        EpochCertificate(b"\xff" * 32, (SIGNATURE,) * 256),
        EpochCertificate(b"\x03", (SIGNATURE,) * 2),
        EpochCertificate(b"\x1f", (SIGNATURE,) * 4),
    ]
    payloads = [calls.payload_of(calls.AnchorPost(header, each)) for each in lies]
    after, reasons = applied(state, attacker_of(world), payloads)
    assert set(reasons) == {"signed by less than two thirds of the stake"}
    assert checked.count == 0
    vote = HeaderVote(0, 0, header_hash(header, world.network))
    one = world.checkers[0].sign(HeaderVote.DOMAIN, world.network, encode(vote))
    claimed = calls.AnchorPost(header, EpochCertificate(b"\x1f", (one,) * 5))
    assert applied(after, attacker_of(world), [])[0].last_anchor == -1
    _, reasons = applied(state, attacker_of(world), [calls.payload_of(claimed)])
    assert reasons == ["a signature of the certificate is wrong"]
    assert checked.count <= 2


def test_a_worker_that_is_active_is_not_activated_again(world: Any) -> None:
    """The first true certificate counts; repeating it is refused before any signature is looked at."""
    call = calls.payload_of(calls.WorkerActivate(world.certificate()))
    after, reasons = applied(world.state, attacker_of(world), [call] * 50)
    assert reasons[0] == ""
    assert set(reasons[1:]) == {"the worker does not wait for activation"}
    assert after.workers[world.worker.public_key].status == ACTIVE


# ── the same over a real ledger ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_follows_a_ledger_full_of_junk(tmp_path: Any) -> None:
    secret = SecretKey.from_seed(Scheme.ED25519, bytes([5]) * 32)
    wallet = Wallet("attacker", Scheme.ED25519, secret.public_key, secret)
    now_ms = int(Clock().now() * 1000)
    numbers = (("block_ms", 50),)
    genesis = Genesis("hostile", "demo", now_ms, (Allocation(wallet.public_key, 100 * KAI),), 0, numbers)
    path = tmp_path / "ledger.sqlite"
    rules = ChainParameters(block_time_ms=50, finality_lag=1)
    EmbeddedLedger.create(path, write_genesis(genesis), time_ms=now_ms, parameters=rules)
    async with open_embedded(path, poll_s=0.02) as ledger, trio.open_nursery() as nursery:
        inbox = Inbox()
        chain = Chain(ledger, inbox, Clock())
        nursery.start_soon(chain.run)
        for payload in [*JUNK.values(), *(calls.payload_of(body) for body in amounts())]:
            await ledger.submit(payload, wallet)
        with pytest.raises(CallRejected):
            await ledger.submit(bytes(65_537), wallet)
        receipt = await ledger.submit(calls.payload_of(calls.Transfer(bytes([9]) * 32, KAI)), wallet)
        assert await chain.outcome(receipt, 20) == ""
        assert chain.state.accounts[wallet.public_key].balance_planck == 99 * KAI
        assert conservation(chain.state) == 0
        nursery.cancel_scope.cancel()
