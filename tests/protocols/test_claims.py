"""Settlement is asked for once an epoch is anchored: by the provider at once, by the client when nobody else does."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from immutables import Map

from kaisar_p2p.wire.codec import encode
from protocols.actions import Action, BlockApplied, Submit, Wake
from protocols.adverts import CPU_CLASS, Spec
from protocols.claims import CLIENT_PATIENCE_BLOCKS, Claims
from protocols.deploy import COMPLETED, EXPIRED, FAILED, OPEN
from protocols.epochs import EpochBody, EpochHeader, LeaseLeaf
from protocols.genesis import Genesis, genesis_state, write_genesis
from protocols.interpreter.calls import LeaseSettle, parse_payload
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_CLOSED, Anchor, OrderState, State

CLIENT, OWNER, STRANGER = (bytes([n]) * 32 for n in range(1, 4))
ORDERS = tuple(sha256(b"order %d" % n).digest() for n in range(3))
EMPTY = genesis_state(write_genesis(Genesis("test", "demo", 0)))
ANCHORED_AT = 30


def order(**changes: Any) -> OrderState:
    resources = Spec(CPU_CLASS, 1, 512, 100, 0, 0, "")
    made = OrderState(
        client=CLIENT, client_key=b"\x11" * 32, worker=b"\x12" * 32, worker_owner=OWNER, spec_hash=bytes(32),
        resources=resources, offer_hash=bytes(32), price_planck_per_hour=1, duration_s=60, escrow_planck=1,
        locked_planck=1, points_planck=0, placed_block=1, placed_ms=1, seats=(), threshold=1,
    )  # fmt: skip
    return replace(made, **changes)


def body_of(*leaves: LeaseLeaf, epoch: int = 1) -> bytes:
    return encode(EpochBody(epoch, (), (), (), leaves, ()))


def state_with(body: bytes | None, block: int, epoch: int = 1, **orders: OrderState) -> State:
    """An anchor of the body at block 30, and orders o0, o1, o2."""
    state = replace(EMPTY, number=block, orders=Map({ORDERS[int(name[1:])]: each for name, each in orders.items()}))
    if body is None:
        return state
    roots = ("previous", "mix", "registry_root", "state_root", "verdict_root", "reward_root", "lease_root",
             "evidence_root", "log_root")  # fmt: skip
    header = EpochHeader(
        epoch=epoch, round=0, first_slot=0, last_slot=3, **{name: bytes(32) for name in roots},
        verdicts=0, rewards=0, leases=1, evidence=0, minted_planck=0,
    )  # fmt: skip
    anchor = Anchor(header, sha256(body).digest(), ANCHORED_AT, 1, 1, 1)
    return replace(state, anchors=Map({epoch: anchor}), last_anchor=epoch)


class Bodies:
    """What the node holds; counts how often it was asked."""

    def __init__(self, *bodies: bytes) -> None:
        self.held = {sha256(body).digest(): body for body in bodies}
        self.asked = 0

    def __call__(self, digest: bytes) -> bytes | None:
        self.asked += 1
        return self.held.get(digest)


def settled(actions: list[Action]) -> list[tuple[str, bytes]]:
    found = []
    for action in actions:
        assert isinstance(action, Submit)
        call = parse_payload(action.payload)
        assert isinstance(call, LeaseSettle)
        found.append((action.key, call.proof.leaf))
    return found


def leaf(index: int = 0, seconds: int = 30, outcome: int = OPEN) -> LeaseLeaf:
    return LeaseLeaf(ORDERS[index], seconds, 9, outcome, 1)


def run(owner: bytes, made: LeaseLeaf, block: int = ANCHORED_AT, live: bool = True, **changes: Any) -> list[Action]:
    body = body_of(made)
    return Claims(owner, Bodies(body)).step(BlockApplied(state_with(body, block, o0=order(**changes)), (), live), 0.0)


def test_the_provider_settles_as_soon_as_an_epoch_is_anchored() -> None:
    actions = run(OWNER, leaf())
    assert settled(actions) == [(f"settle/{ORDERS[0].hex()}/1", encode(leaf()))]


@pytest.mark.parametrize(
    ("made", "changes", "settles"),
    [
        (leaf(seconds=30), {"paid_seconds": 29}, True),
        (leaf(seconds=30), {"paid_seconds": 30}, False),
        (leaf(seconds=30), {"paid_seconds": 31}, False),
        (leaf(seconds=30, outcome=COMPLETED), {"paid_seconds": 30}, True),
        (leaf(seconds=0, outcome=FAILED), {}, True),
        (leaf(seconds=0), {}, False),
        (leaf(outcome=COMPLETED), {"status": ORDER_CANCELLED}, True),
        (leaf(outcome=COMPLETED), {"status": ORDER_CLOSED}, False),
    ],
)
def test_the_provider_settles_what_is_not_paid_yet(made: LeaseLeaf, changes: dict[str, Any], settles: bool) -> None:
    assert bool(run(OWNER, made, **changes)) is settles


@pytest.mark.parametrize(
    ("outcome", "waited", "settles"),
    [
        (OPEN, 0, False),
        (OPEN, 100, False),
        (EXPIRED, 0, False),
        (EXPIRED, CLIENT_PATIENCE_BLOCKS - 1, False),
        (EXPIRED, CLIENT_PATIENCE_BLOCKS, True),
        (FAILED, 100, True),
    ],
)
def test_the_client_settles_only_what_has_ended_and_nobody_settled(outcome: int, waited: int, settles: bool) -> None:
    assert bool(run(CLIENT, leaf(outcome=outcome), ANCHORED_AT + waited)) is settles
    assert run(CLIENT, leaf(outcome=outcome), ANCHORED_AT + waited, status=ORDER_CLOSED) == []


def test_who_is_both_does_not_wait() -> None:
    assert run(OWNER, leaf(), client=OWNER)


def test_others_settle_nothing() -> None:
    assert run(STRANGER, leaf(outcome=EXPIRED), ANCHORED_AT + 100) == []


def test_nothing_while_catching_up_or_on_other_events() -> None:
    assert run(OWNER, leaf(), live=False) == []
    assert Claims(OWNER, Bodies()).step(Wake(), 0.0) == []
    assert Claims(OWNER, Bodies()).deadline is None


def test_nothing_before_the_first_anchor() -> None:
    bodies = Bodies()
    assert Claims(OWNER, bodies).step(BlockApplied(state_with(None, 5, o0=order()), ()), 0.0) == []
    assert bodies.asked == 0


def test_the_same_claim_until_the_ledger_shows_it_then_none() -> None:
    """The key and the bytes are the same each time, so that it is handed in once."""
    body = body_of(leaf(outcome=COMPLETED))
    claims = Claims(OWNER, Bodies(body))
    first = claims.step(BlockApplied(state_with(body, ANCHORED_AT, o0=order()), ()), 0.0)
    second = claims.step(BlockApplied(state_with(body, ANCHORED_AT + 1, o0=order()), ()), 0.0)
    assert first == second != []
    closed = order(status=ORDER_CLOSED, paid_seconds=30)
    assert claims.step(BlockApplied(state_with(body, ANCHORED_AT + 2, o0=closed), ()), 0.0) == []


def test_a_new_anchor_is_a_new_claim() -> None:
    one, two = body_of(leaf()), body_of(leaf(seconds=60), epoch=2)
    claims = Claims(OWNER, Bodies(one, two))
    claims.step(BlockApplied(state_with(one, 30, o0=order()), ()), 0.0)
    actions = claims.step(BlockApplied(state_with(two, 54, epoch=2, o0=order(paid_seconds=30)), ()), 0.0)
    assert settled(actions) == [(f"settle/{ORDERS[0].hex()}/2", encode(leaf(seconds=60)))]


def test_only_own_orders_among_many() -> None:
    body = body_of(*(leaf(index) for index in range(3)))
    state = state_with(body, 30, o0=order(), o1=order(worker_owner=STRANGER), o2=order())
    actions = Claims(OWNER, Bodies(body)).step(BlockApplied(state, ()), 0.0)
    assert [key for key, _ in settled(actions)] == [f"settle/{ORDERS[n].hex()}/1" for n in (0, 2)]


def test_a_body_that_comes_late_is_used_then_and_read_once() -> None:
    body, bodies = body_of(leaf()), Bodies()
    claims, event = Claims(OWNER, bodies), BlockApplied(state_with(body, 30, o0=order()), ())
    assert claims.step(event, 0.0) == []
    bodies.held[sha256(body).digest()] = body
    assert claims.step(event, 0.0) == claims.step(event, 0.0) != []
    assert bodies.asked == 2


def test_a_damaged_body_is_as_if_it_were_not_there() -> None:
    body = body_of(leaf())
    bodies = Bodies()
    bodies.held[sha256(body).digest()] = body[:-1]
    assert Claims(OWNER, bodies).step(BlockApplied(state_with(body, 30, o0=order()), ()), 0.0) == []


def test_a_tree_too_large_for_a_proof_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from protocols import claims as module
    from protocols.proofs import NothingToProve

    real = module.prove_lease

    def prove(body: EpochBody, order_id: bytes, network: bytes) -> Any:
        if order_id == ORDERS[0]:
            raise NothingToProve("too large")
        return real(body, order_id, network)

    monkeypatch.setattr(module, "prove_lease", prove)
    body = body_of(leaf(0), leaf(1))
    state = state_with(body, 30, o0=order(), o1=order())
    actions = Claims(OWNER, Bodies(body)).step(BlockApplied(state, ()), 0.0)
    assert [key for key, _ in settled(actions)] == [f"settle/{ORDERS[1].hex()}/1"]
