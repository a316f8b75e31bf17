"""Forged tickets, votes and words: nobody is believed in a lease."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from protocols.actions import (
    Probe,
)
from protocols.deploy import (
    DEPLOY_PROTOCOL,
    DOWN,
    FAILED,
    UP,
    DeployOrder,
    DeployReply,
    ticket_of,
)
from protocols.equivocation import DoubleVote
from protocols.interpreter.state import (
    ORDER_CANCELLED,
)
from protocols.lease_client import RUNNING_TEXT
from protocols.popw import VOTE_PROTOCOL
from protocols.quorum import CoreVote, ReadyCore, WitnessCore
from tests.protocols.leases.conftest import CLIENT, NETWORK, PARAMS, SEATS, SLOT_S, STRANGER, WORKER, WORKLOAD, keys_of

# ── nobody is believed ───────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_quorum_nothing_runs_and_the_order_ends(world: Any) -> None:
    for seat in world.seats[:3]:
        world.kill(seat)
    order_id = world.place()
    world.run(PARAMS.deploy_timeout_ms / 1000 + 3 * SLOT_S)
    assert world.deploys == 0
    assert (world.events()[-1].outcome, world.events()[-1].reason) == (FAILED, "no-ticket")
    assert world.state.orders[order_id].status == ORDER_CANCELLED
    assert world.client_lease().reason == "no-ticket"


def test_forged_tickets_are_refused(world: Any) -> None:
    for seat in world.seats:
        world.kill(seat)
    order_id = world.place()
    order = world.state.orders[order_id]
    ticket = ticket_of(order_id, order)
    good = world.signed_by(SEATS[:5], ticket)
    other_network = tuple(keys.sign(ticket.DOMAIN, bytes(32), encode(ticket)) for keys in SEATS[:5])
    forged = [
        world.signed_by(SEATS[:4], ticket),
        world.signed_by(tuple(keys_of(f"nobody {number}") for number in range(5)), ticket),
        world.signed_by(SEATS[:5], replace(ticket, offer_hash=bytes(32))),
        world.signed_by(SEATS[:5], replace(ticket, client_key=STRANGER.public_key)),
        world.signed_by(SEATS[:5], replace(ticket, worker=STRANGER.public_key)),
        world.signed_by(SEATS[:5], replace(ticket, order_id=bytes(32))),
        world.signed_by(SEATS[:5], ReadyCore(order_id, order.worker)),
        replace(good, mask=0b1111110),
        replace(good, signatures=other_network),
        replace(good, signatures=good.signatures[:1] * 5),
    ]
    for certificate in forged:
        answer = world.ask(CLIENT, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(certificate, (WORKLOAD,))))
        assert answer is not None
        assert decode(DeployReply, answer).accepted == 0
    for payload in (b"", b"\x93", bytes(100_000), encode(good)):
        answer = world.ask(CLIENT, world.worker, DEPLOY_PROTOCOL, payload)
        assert answer is not None
        assert decode(DeployReply, answer).accepted == 0
    assert world.deploys == 0
    assert world.worker_state() == "PLACED"
    answer = world.ask(CLIENT, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(good, ())))
    assert answer is not None
    assert decode(DeployReply, answer).accepted == 1


def test_another_workload_than_ordered_is_refused(world: Any) -> None:
    for seat in world.seats:
        world.kill(seat)
    order_id = world.place(held=False)
    ticket = world.signed_by(SEATS[2:], ticket_of(order_id, world.state.orders[order_id]))
    other = replace(WORKLOAD, command=("mine",))
    answer = world.ask(STRANGER, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(ticket, (other,))))
    assert answer is not None
    assert "not the workload" in decode(DeployReply, answer).text
    answer = world.ask(STRANGER, world.worker, DEPLOY_PROTOCOL, encode(DeployOrder(ticket, ())))
    assert answer is not None
    assert "not known here" in decode(DeployReply, answer).text
    assert world.deploys == 0
    assert world.worker_state() == "AUTHORISED"


def test_votes_of_strangers_wrong_seats_and_wrong_cores_are_refused(world: Any) -> None:
    for seat in world.seats[1:]:
        world.kill(seat)
    order_id = world.place()
    ticket = ticket_of(order_id, world.state.orders[order_id])

    def vote(signer: KeyPair, seat: int, core: Any) -> bytes | None:
        signature = signer.sign(core.DOMAIN, NETWORK, encode(core))
        return world.ask(signer, world.seats[0], VOTE_PROTOCOL, encode(CoreVote(core, seat, signature)))

    assert vote(STRANGER, 1, ticket) == b"\0"
    assert vote(SEATS[1], 2, ticket) == b"\0"
    assert vote(SEATS[1], 1, replace(ticket, offer_hash=bytes(32))) == b"\0"
    assert vote(SEATS[1], 1, replace(ticket, order_id=bytes(32))) == b"\0"
    slot = world.state.slot
    assert vote(SEATS[1], 1, WitnessCore(order_id, ticket.worker, slot + 5, UP)) == b"\0"
    assert vote(SEATS[1], 1, WitnessCore(order_id, ticket.worker, slot, 4)) == b"\0"
    bad = encode(CoreVote(ticket, 1, bytes(64)))
    assert world.ask(SEATS[1], world.seats[0], VOTE_PROTOCOL, bad) == b"\0"
    assert vote(SEATS[1], 1, ticket) == b"\1"
    assert vote(SEATS[1], 1, ticket) == b"\1"
    # What is not a core vote is another machine's business.
    assert world.ask(SEATS[1], world.seats[0], VOTE_PROTOCOL, b"\x95\x19") is None


def test_two_statements_on_one_window_are_evidence(hostile_world: Any) -> None:
    world = hostile_world
    order_id = world.running()
    for status in (UP, DOWN):
        core = WitnessCore(order_id, WORKER.public_key, world.state.slot + 1, status)
        signature = SEATS[1].sign(core.DOMAIN, NETWORK, encode(core))
        world.ask(SEATS[1], world.seats[0], VOTE_PROTOCOL, encode(CoreVote(core, 1, signature)))
    evidence = [payload for topic, payload in world.published if topic == "evidence"]
    assert len(evidence) == 1
    assert decode(DoubleVote, evidence[0]).signer == SEATS[1].public_key


def test_a_workers_word_alone_does_not_make_a_lease_ready(world: Any) -> None:
    world.program = "silent"
    order_id = world.place()
    world.run(2)
    # The worker claims health, and its tunnel leads nowhere.
    world.report(order_id, "healthy")
    world.run(6)
    assert not world.certificates(ReadyCore)
    assert RUNNING_TEXT not in world.texts()
    assert len(world.seats[0].done(Probe)) >= 3
    world.containers[order_id] = "healthy"  # it says so again, and now it is true
    world.until(lambda: RUNNING_TEXT in world.texts(), within_s=10)
