"""Any bytes into every machine: no step raises, each call is answered or waits, and tables stay bounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import open_signed, seal
from node.roles.all import ROLES
from protocols import actions as do
from protocols.deploy import DEPLOY_PROTOCOL, UP, DeployOrder, DeployReply
from protocols.epoch_fetch import PAGE_BYTES, Downloads
from protocols.epochs import FETCH_PROTOCOL, FetchReply, FetchRequest
from protocols.offers import MAX_HOLDS, Holds, OfferMachine, offer_request, order_spec
from protocols.orders import OFFER_PROTOCOL, Offer, OfferRequest, Refusal, Workload
from protocols.popw import CHALLENGE_PROTOCOL, VOTE_PROTOCOL, Challenge, PrivatePart, Vote
from protocols.popw_worker import MAX_EARLY, WorkerCheckMachine
from protocols.quorum import CoreVote, ReadyCore, WitnessCore

PROTOCOLS = sorted({each.protocol for role in ROLES.values() for each in role.serves})
fixed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
PLAIN = st.recursive(
    st.integers(0, 2**64 - 1) | st.binary(max_size=70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)
NOISE = st.one_of(
    st.binary(max_size=300),
    PLAIN.map(lambda plain: msgpack.packb(plain, use_bin_type=True)),
    st.sampled_from([b"", b"\x91" * 10_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x92\x1f\x90"]),
)


def requests_of(world: Any) -> dict[str, tuple[bytes, bytes]]:
    """A valid request on every protocol: (peer, payload)."""
    seat, order = world.checkers[1], world.state.orders[world.own_order_id]
    place = order.seats.index(seat.public_key)
    core = WitnessCore(world.own_order_id, order.worker, 7, UP)
    vote = CoreVote(core, place, seat.sign(core.DOMAIN, world.network, encode(core)))
    verdict = world.verdict()
    private = PrivatePart(bytes(32), place, 1, bytes(80), bytes(32))
    popw_vote = Vote(verdict, bytes(64), private, bytes(64))
    spec = order_spec(order.resources, 60, WORKLOAD, world.network)
    return {
        CHALLENGE_PROTOCOL: (
            seat.public_key,
            seal(Challenge(1, 7, world.victim.public_key, place, bytes(32)), seat, world.network),
        ),
        VOTE_PROTOCOL: (seat.public_key, encode(vote)),
        f"{VOTE_PROTOCOL} ": (seat.public_key, encode(popw_vote)),
        OFFER_PROTOCOL: (
            world.bound.public_key,
            offer_request(world.bound, spec, WORKLOAD, bytes(31) + b"\x01", world.network),
        ),
        DEPLOY_PROTOCOL: (world.client.public_key, encode(DeployOrder(world.ticket(world.own_order_id), ()))),
        FETCH_PROTOCOL: (world.nobody.public_key, encode(FetchRequest("body", bytes(32), 2**63))),
    }


WORKLOAD = Workload("", ("sleep", "1"), (), (8080,))


def all_steps(machines: list[Any], event: do.Event, now: float) -> list[do.Action]:
    return [action for machine in machines for action in machine.step(event, now)]


def test_every_served_protocol_has_a_specimen(world: Any) -> None:
    assert {name.strip() for name in requests_of(world)} == set(PROTOCOLS)


@fixed
@given(data=st.data())
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_bytes_on_any_protocol(protocol: str, machines: list[Any], world: Any, data: st.DataObject) -> None:
    """Noise, and valid requests with a change; from strangers, and from those whose request it was."""
    peer, payload = requests_of(world)[protocol]
    changed = st.builds(
        lambda at, byte: payload[:at] + bytes([byte]) + payload[at + 1 :],
        st.integers(0, len(payload) - 1),
        st.integers(0, 255),
    )
    cut = st.integers(0, len(payload)).map(lambda at: payload[:at])
    sent = data.draw(NOISE | changed | cut)
    sender = data.draw(
        st.sampled_from([peer, world.nobody.public_key, world.victim.public_key, world.bound.public_key])
    )
    actions = all_steps(machines, do.Incoming(1, sender, protocol, sent, world.now), world.now)
    replies = [action for action in actions if isinstance(action, do.Reply)]
    assert len(replies) <= 2
    assert sum(reply.last for reply in replies) <= 1
    assert not any(isinstance(action, do.Deploy | do.Compute) for action in actions if sender != peer)
    all_steps(machines, do.Wake(), world.now)


@fixed
@given(noise=NOISE)
def test_any_bytes_in_answer_to_any_request(machines: list[Any], world: Any, noise: bytes) -> None:
    """Whatever was asked of a peer, its answer may be anything; its end may come twice."""
    asked = open_requests(machines, world)
    kinds = {request.request_id.partition("/")[0] for request in asked}
    assert kinds >= {"chal", "ticket", "epoch"}, kinds
    for request in asked:
        for event in (
            do.Answer(request.request_id, noise, world.now),
            do.Answer(request.request_id, noise[:1], world.now),
            do.RequestEnded(request.request_id, ""),
            do.RequestEnded(request.request_id, "again"),
        ):
            all_steps(machines, event, world.now)
    for name in ("", "/", "chal", "chal/7", "vote//", "epoch/body/zz/1", "deliver/xyz", "handover/00", noise.hex()):
        all_steps(machines, do.Answer(name, noise, world.now), world.now)
        all_steps(machines, do.RequestEnded(name, "x"), world.now)
        all_steps(machines, do.WorkDone(name, None, "x"), world.now)
        all_steps(machines, do.ProbeReport(name, up=False, detail="x"), world.now)


def open_requests(machines: list[Any], world: Any) -> list[do.Request]:
    """What the machines ask of others in this state: checks, votes on a ticket, a proposal's body."""
    from protocols.interpreter.events import OrderPlaced, SlotStarted

    events = (SlotStarted(7), OrderPlaced(world.own_order_id))
    actions = all_steps(machines, do.BlockApplied(world.state, events, live=True), world.now)
    proposal, proposer = world.proposal()
    proposal = replace(proposal, header=replace(proposal.header, verdicts=1))
    verified = open_signed(type(proposal), seal(proposal, proposer, world.network), world.network)
    actions += all_steps(machines, do.Gossip("epoch", verified, bytes(32), world.now), world.now + 30)
    ready = world.certify(
        ReadyCore(world.own_order_id, world.victim.public_key), world.state.orders[world.own_order_id].seats, 4
    )
    actions += all_steps(machines, do.Gossip("lease", ready, bytes(32), world.now), world.now)
    for machine in machines:  # all votes and checks that earlier steps have left
        for check in getattr(machine, "checks", ()):
            actions.append(do.Request(f"chal/{check.name}/0", check.due.worker, CHALLENGE_PROTOCOL, b"", 1))
        for watch in getattr(machine, "watches", ()):
            for ballot in watch.ballots():
                actions.append(do.Request(f"{ballot.name}/{bytes(8).hex()}/1", bytes(32), VOTE_PROTOCOL, b"", 1))
    names = [f"epoch/body/{bytes(32).hex()}/{number}" for number in range(3)]
    actions += [do.Request(name, bytes(32), FETCH_PROTOCOL, b"", 1) for name in names]
    return [action for action in actions if isinstance(action, do.Request)]


# ── what a peer may make a machine keep ──────────────────────────────────────────────────────────────────────────────


def test_deploy_orders_without_a_quorum_start_nothing(machines: list[Any], world: Any) -> None:
    order = world.state.orders[world.own_order_id]
    forged = [
        world.ticket(world.own_order_id, count=3),
        world.ticket(world.own_order_id, network=bytes(32)),
        replace(world.ticket(world.own_order_id), signatures=(bytes(64),) * 4),
        replace(world.ticket(world.own_order_id), mask=2**64 - 1, signatures=(bytes(64),) * 64),
        world.certify(ReadyCore(world.own_order_id, order.worker), order.seats, 4),
        world.ticket(world.order_id),
        world.certificate(),
    ]
    for ticket in forged:
        for workload in ((), (WORKLOAD,)):
            payload = encode(DeployOrder(ticket, workload))
            actions = all_steps(
                machines, do.Incoming(1, world.client.public_key, DEPLOY_PROTOCOL, payload, world.now), world.now
            )
            assert [type(action) for action in actions] == [do.Reply]
            assert decode(DeployReply, actions[0].payload).accepted == 0  # type: ignore[union-attr]


def test_a_true_ticket_with_another_workload_starts_nothing(machines: list[Any], world: Any) -> None:
    payload = encode(DeployOrder(world.ticket(world.own_order_id), (WORKLOAD,)))
    call = do.Incoming(1, world.client.public_key, DEPLOY_PROTOCOL, payload, world.now)
    actions = all_steps(machines, call, world.now)
    assert not any(isinstance(action, do.Deploy) for action in actions)
    (reply,) = (action for action in actions if isinstance(action, do.Reply))
    assert decode(DeployReply, reply.payload).text == "not the workload of this order"


def test_a_flood_of_offers_is_bounded_and_others_still_get_one(world: Any) -> None:
    holds = Holds()
    machine = OfferMachine(world.victim, holds, runtime="process", max_leases=8)
    machine.step(do.BlockApplied(world.state, ()), world.now)
    whole = replace(world.state.workers[world.victim.public_key].spec, cpu_cores=7, memory_mb=1, disk_mb=0)

    def ask(keys: KeyPair, resources: Any, nonce: int, now: float) -> bytes:
        spec = order_spec(resources, 60, WORKLOAD, world.network)
        payload = offer_request(keys, spec, WORKLOAD, nonce.to_bytes(32, "big"), world.network)
        actions = machine.step(do.Incoming(1, keys.public_key, OFFER_PROTOCOL, payload, now), now)
        (reply,) = actions
        assert isinstance(reply, do.Reply)
        return reply.payload

    def offered(payload: bytes) -> bool:
        if payload[1] == Refusal.TAG:  # type: ignore[attr-defined]
            return False
        return open_signed(Offer, payload, world.network).message.worker == world.victim.public_key

    for number in range(300):  # strangers, whose keys cost nothing
        assert not offered(ask(KeyPair.from_seed(number.to_bytes(32, "big")), whole, number, world.now))
    assert len(holds) == 0
    for number in range(300):
        ask(world.bound, whole, number, world.now + number / 10)
    assert len(holds) <= MAX_HOLDS
    assert offered(ask(world.client, replace(whole, cpu_cores=1), 1, world.now + 30))


def test_a_repeated_request_gets_the_same_offer(world: Any) -> None:
    holds = Holds()
    machine = OfferMachine(world.victim, holds, runtime="process", max_leases=8)
    machine.step(do.BlockApplied(world.state, ()), world.now)
    spec = order_spec(world.state.orders[world.order_id].resources, 60, WORKLOAD, world.network)
    request = OfferRequest(world.bound.public_key, spec, WORKLOAD, bytes(32))
    payload = seal(request, world.bound, world.network)
    call = do.Incoming(1, world.bound.public_key, OFFER_PROTOCOL, payload, world.now)
    first = machine.step(call, world.now)
    assert [machine.step(call, world.now) for _ in range(10)] == [first] * 10
    assert len(holds) == 1


def test_only_keys_with_stake_may_be_early(world: Any) -> None:
    """Anybody can bind keys as checkers: they must not take the places of the seats of the next slot."""
    machine = WorkerCheckMachine(world.victim)
    state = replace(world.state, number=world.state.number - 6)  # slot 6: the next one is of the same epoch
    machine.step(do.BlockApplied(state, ()), world.now)

    def early(keys: KeyPair) -> list[do.Action]:
        challenge = seal(Challenge(1, 7, world.victim.public_key, 0, bytes(32)), keys, world.network)
        return machine.step(do.Incoming(1, keys.public_key, CHALLENGE_PROTOCOL, challenge, world.now), world.now)

    assert [type(action) for action in early(world.bound)] == [do.Reply]
    assert early(world.checkers[1]) == []
    assert len(machine._early) == 1 < MAX_EARLY


def test_votes_of_strangers_and_on_unknown_things_are_not_kept(machines: list[Any], world: Any) -> None:
    from protocols.popw_votes import REFUSED

    order, private = world.state.orders[world.own_order_id], PrivatePart(bytes(32), 0, 1, b"", bytes(32))
    for number in range(200):
        keys = KeyPair.from_seed((number + 1).to_bytes(32, "big"))
        core = WitnessCore(world.own_order_id, order.worker, number % 9, UP)
        votes = [
            encode(CoreVote(core, number % 64, keys.sign(core.DOMAIN, world.network, encode(core)))),
            encode(CoreVote(replace(core, order_id=number.to_bytes(32, "big")), 0, bytes(64))),
            encode(Vote(world.verdict(slot=number), bytes(64), private, bytes(64))),
        ]
        for payload in votes:
            event = do.Incoming(number, keys.public_key, VOTE_PROTOCOL, payload, world.now)
            actions = all_steps(machines, event, world.now)
            assert actions == [do.Reply(number, REFUSED)]
    seats = [machine for machine in machines if hasattr(machine, "watches")]
    assert all(len(watch.windows) <= 9 for machine in seats for watch in machine.watches)


@pytest.mark.parametrize("offset", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", ["body", "anchored", "certificate", "", "no such kind"])
def test_fetching_what_is_not_there(kind: str, offset: int, machines: list[Any], world: Any) -> None:
    payload = encode(FetchRequest(kind, bytes(32), offset))
    actions = all_steps(machines, do.Incoming(3, bytes(32), FETCH_PROTOCOL, payload, world.now), world.now)
    assert actions == [do.Reply(3, encode(FetchReply(0, b"")))]


def test_a_malformed_fetch_is_answered_at_once(machines: list[Any], world: Any) -> None:
    event = do.Incoming(3, bytes(32), FETCH_PROTOCOL, b"\xff", world.now)
    assert all_steps(machines, event, world.now) == [do.Reply(3, encode(FetchReply(0, b"")))]


def test_a_download_in_drops_goes_to_the_next_peer() -> None:
    downloads = Downloads("epoch")
    (request,) = downloads.start("body", bytes(32), [b"a" * 32, b"b" * 32])
    assert request.max_reply_bytes < 2 * PAGE_BYTES
    asked, fetched = downloads.answer(request.request_id, encode(FetchReply(1 << 20, b"x")))
    assert fetched is None
    assert [each.peer for each in asked] == [b"b" * 32]
    asked, fetched = downloads.answer(asked[0].request_id, encode(FetchReply(2**63, bytes(PAGE_BYTES))))
    assert asked == []
    assert fetched is not None and fetched.data is None
