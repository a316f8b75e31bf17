"""Gossip on the topic `lease`, and any bytes on every stream of a lease."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.envelope import seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.actions import (
    Answer,
    Incoming,
    ProbeReport,
    Publish,
    Reply,
    RequestEnded,
)
from protocols.deploy import (
    CANCELLED,
    COMPLETED,
    DEPLOY_PROTOCOL,
    DEPLOYING,
    ENDED,
    EXPIRED,
    FAILED,
    OPEN,
    OUTCOME_NAMES,
    PLACED,
    REASONS,
    RUNNING,
    STATE_NAMES,
    UP,
    LeaseEvent,
    validate_lease,
)
from protocols.interpreter.state import (
    ORDER_CLOSED,
    State,
)
from protocols.popw import VOTE_PROTOCOL, validate_certificate
from protocols.quorum import ReadyCore, WitnessCore
from tests.protocols.leases.conftest import NETWORK, SEATS, STRANGER, WORKER

# ── gossip on the topic `lease` ──────────────────────────────────────────────────────────────────────────────────────


def lease_event(ready_world: Any, **changes: Any) -> bytes:
    keys = changes.pop("keys", WORKER)
    event = LeaseEvent(
        ready_world.order, WORKER.public_key, 9, RUNNING, OPEN, "ready", "", int(ready_world.now * 1000), 8080
    )
    return seal(replace(event, **changes), keys, NETWORK)


def judge(ready_world: Any, data: bytes, state: State | None = None) -> tuple[Verdict, str]:
    return validate_lease(data, ready_world.now, state or ready_world.state)[:2]


def test_gossip_lease__accept_event(ready_world: Any) -> None:
    assert judge(ready_world, lease_event(ready_world)) == (Verdict.ACCEPT, "")
    assert (
        judge(ready_world, lease_event(ready_world, state=ENDED, outcome=FAILED, reason="exited"))[0] is Verdict.ACCEPT
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keys": STRANGER}, "impossible"),
        ({"worker": STRANGER.public_key, "keys": STRANGER}, "another worker"),
        ({"state": PLACED}, "impossible"),
        ({"state": 7}, "impossible"),
        ({"state": ENDED}, "impossible"),
        ({"outcome": FAILED}, "impossible"),
        ({"reason": "because"}, "impossible"),
        ({"sequence": 5000}, "impossible"),
    ],
)
def test_gossip_lease__reject_event(ready_world: Any, changes: dict[str, Any], reason: str) -> None:
    verdict, why = judge(ready_world, lease_event(ready_world, **changes))
    assert verdict is Verdict.REJECT
    assert reason in why


def test_gossip_lease__ignore_what_may_be_honest(ready_world: Any) -> None:
    assert judge(ready_world, lease_event(ready_world, order_id=bytes(32)))[0] is Verdict.IGNORE
    assert (
        judge(ready_world, lease_event(ready_world, at_ms=int(ready_world.now * 1000) + 3_600_000))[0] is Verdict.IGNORE
    )
    closed = replace(ready_world.state.orders[ready_world.order], status=ORDER_CLOSED)
    state = replace(ready_world.state, orders=ready_world.state.orders.set(ready_world.order, closed))
    assert judge(ready_world, lease_event(ready_world), state)[0] is Verdict.IGNORE
    assert (
        judge(ready_world, lease_event(ready_world, state=ENDED, outcome=COMPLETED, reason="settled"), state)[0]
        is Verdict.ACCEPT
    )
    ready = encode(ready_world.signed_by(SEATS[:5], ReadyCore(ready_world.order, WORKER.public_key)))
    assert judge(ready_world, ready)[0] is Verdict.ACCEPT
    assert judge(ready_world, ready, state)[0] is Verdict.IGNORE
    assert (
        judge(ready_world, encode(ready_world.signed_by(SEATS[:5], ReadyCore(bytes(32), WORKER.public_key))))[0]
        is Verdict.IGNORE
    )


def test_gossip_lease__reject_certificates(ready_world: Any) -> None:
    ready = ReadyCore(ready_world.order, WORKER.public_key)
    assert judge(ready_world, encode(ready_world.signed_by(SEATS[:4], ready)))[0] is Verdict.REJECT
    assert (
        judge(ready_world, encode(ready_world.signed_by(SEATS[:5], replace(ready, worker=STRANGER.public_key))))[0]
        is Verdict.REJECT
    )
    window = WitnessCore(ready_world.order, WORKER.public_key, 1, UP)
    assert judge(ready_world, encode(ready_world.signed_by(SEATS[:5], window)))[0] is Verdict.REJECT
    assert judge(ready_world, bytes(10_000))[0] is Verdict.REJECT


def test_witness_certificates_are_valid_on_the_topic_certificate(ready_world: Any) -> None:
    window = WitnessCore(ready_world.order, WORKER.public_key, ready_world.state.slot, UP)
    good = encode(ready_world.signed_by(SEATS[1:6], window))
    assert validate_certificate(good, ready_world.now, ready_world.state)[0] is Verdict.ACCEPT
    bad = encode(ready_world.signed_by(SEATS[:4], window))
    assert validate_certificate(bad, ready_world.now, ready_world.state)[0] is Verdict.REJECT


def test_names_are_complete() -> None:
    assert set(OUTCOME_NAMES) == {OPEN, COMPLETED, CANCELLED, FAILED, EXPIRED}
    assert all(len(reason) <= 64 for reason in REASONS)
    assert DEPLOYING in STATE_NAMES


# ── any bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=200))
def test_any_bytes_are_judged_and_never_raise(ready_world: Any, data: bytes) -> None:
    verdict, reason, message = validate_lease(data, ready_world.now, ready_world.state)
    assert verdict is not Verdict.ACCEPT
    assert reason
    assert message is None


@given(st.integers(0, 1000), st.integers(0, 2000), st.integers(1, 255))
def test_a_changed_byte_is_never_accepted(ready_world: Any, which: int, at: int, change: int) -> None:
    topic, payload = ready_world.published[which % len(ready_world.published)]
    changed = bytearray(payload)
    changed[at % len(changed)] ^= change
    verdict, _, _ = ready_world.validate[topic](bytes(changed), ready_world.now, ready_world.state)
    assert verdict is not Verdict.ACCEPT


@given(
    st.sampled_from([DEPLOY_PROTOCOL, VOTE_PROTOCOL, "/kaisar/offer/1"]),
    st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: b"\x94\x1f\x95\x46" + tail)),
)
def test_any_request_is_answered_or_ignored(ready_world: Any, protocol: str, payload: bytes) -> None:
    for peer in (ready_world.worker, ready_world.seats[0], ready_world.client):
        for machine in peer.machines:
            actions = machine.step(Incoming(1, STRANGER.public_key, protocol, payload, ready_world.now), 0.0)
            assert all(isinstance(action, Reply) for action in actions)


@given(
    st.text(max_size=40),
    st.binary(max_size=40),
    st.sampled_from(["deliver/", "ticket/", "probe/", "handover/", "witness/", ""]),
)
def test_any_answer_is_ignored(ready_world: Any, request_id: str, payload: bytes, kind: str) -> None:
    for peer in ready_world.peers:
        for machine in peer.machines:
            for event in (
                Answer(kind + request_id, payload, 0.0),
                RequestEnded(kind + request_id, "x"),
                ProbeReport(kind + request_id, True, ""),
            ):
                assert not [a for a in machine.step(event, ready_world.now) if isinstance(a, Publish)]
