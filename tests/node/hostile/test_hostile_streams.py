"""Streams that are opened, stuffed, starved and left: they cost whoever opens them, and nobody else waits."""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import MeshError, RequestFailed
from kaisar_p2p.mesh.discovery import discovery
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.envelope import open_signed, seal
from node import effects, tunnels
from node.roles.all import ROLES
from protocols.deploy import DEPLOY_PROTOCOL, TUNNEL_PROTOCOL, DeployOrder, DeployReply, TunnelOpen, TunnelReply
from protocols.epoch_machine import EpochMachine
from protocols.epochs import FETCH_PROTOCOL, FetchReply, FetchRequest
from protocols.lease_votes import COUNTED, REFUSED
from protocols.offers import MAX_HOLDS, OfferMachine, offer_request, order_spec
from protocols.orders import OFFER_PROTOCOL, Offer, Workload
from protocols.popw import CHALLENGE_PROTOCOL, VOTE_PROTOCOL, Challenge
from protocols.quorum import CoreVote, TicketCore

SERVED = {each.protocol: each for role in ROLES.values() for each in role.serves}
PROTOCOLS = sorted([*SERVED, TUNNEL_PROTOCOL])
WORKLOAD = Workload("", ("sleep", "1"), (), (8080,))
FOUR_GIB = b"\xff\xff\xff\xff"


async def open_to(peer: Any, victim: Any, protocol: str) -> Any:
    return await peer.open_stream(victim.mesh.key, protocol, timeout_s=10, max_frame_bytes=1 << 20)


async def ask(peer: Any, victim: Any, protocol: str, payload: bytes) -> bytes:
    reply: bytes = await peer.request(victim.mesh.key, protocol, payload, deadline_s=15, max_reply_bytes=1 << 20)
    return reply


async def serves(peer: Any, victim: Any) -> None:
    """An honest peer is answered while whatever is going on goes on."""
    reply = decode(FetchReply, await ask(peer, victim, FETCH_PROTOCOL, encode(FetchRequest("body", bytes(32), 0))))
    assert reply.length == 0


def opening(world: Any, service: str = "tcp", **changes: Any) -> TunnelOpen:
    fields = {"order_id": world.own_order_id, "service": service, "port": 8080, "arguments": ()} | changes
    return TunnelOpen(**fields)


# ── what any stream may be filled with ───────────────────────────────────────────────────────────────────────────────

FIRST_BYTES = {
    "4 GiB announced": FOUR_GIB + bytes(100),
    "one more than allowed": (1 << 20).to_bytes(4, "big"),
    "half a length": b"\x00\x00",
    "less than announced": b"\x00\x00\x01\x00abc",
    "an empty frame": bytes(4),
    "noise": b"\x00\x00\x00\x08" + b"\xc6\xff\xff\xff\xffabc",
    "ten thousand deep": (10_002).to_bytes(4, "big") + b"\x92\x01" + b"\x91" * 10_000,
    "fifty frames": (b"\x00\x00\x00\x01\x00") * 50,
}


@pytest.mark.parametrize("name", FIRST_BYTES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_garbage_ends_its_own_stream_only(protocol: str, name: str, arena: Any) -> None:
    victim = await arena.victim(slot_started=False)
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    stream = await open_to(attacker, victim, protocol)
    await stream.send_some(FIRST_BYTES[name])
    await stream.send_eof()
    with trio.fail_after(15):
        try:
            while await stream.receive_some():
                pass
        except RequestFailed:
            pass
    await serves(neighbour, victim)
    assert victim.mesh.is_connected(attacker.key)
    assert not victim.mesh.statistics().failed_handlers
    await arena.eventually(lambda: not victim.node.effects._served)


async def test_garbage_instead_of_a_peer_exchange(arena: Any) -> None:
    victim = await arena.victim(slot_started=False)
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    for data in FIRST_BYTES.values():
        stream = await open_to(attacker, victim, discovery.PROTOCOL)
        try:
            await stream.send_some(data)
            await stream.send_eof()
        except RequestFailed:
            continue
    await serves(neighbour, victim)
    assert not victim.mesh.statistics().failed_handlers


# ── who holds streams open ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", sorted(SERVED))
async def test_streams_without_a_word_are_few_and_end(
    protocol: str, arena: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "CALL_TIMEOUT_S", 1.0)
    victim = await arena.victim(slot_started=False)
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    most = SERVED[protocol].per_peer
    held = [await attacker.open_stream(victim.mesh.key, protocol, timeout_s=5, max_frame_bytes=64) for _ in range(most)]
    await arena.eventually(lambda: len(victim.node.effects._served) == most)
    for _ in range(5):
        extra = await open_to(attacker, victim, protocol)
        with pytest.raises(MeshError):
            await extra.receive_frame()
    assert victim.mesh.statistics().refused[protocol] == 5
    await serves(neighbour, victim)
    await arena.eventually(lambda: not victim.node.effects._served)
    for stream in held:
        with pytest.raises(MeshError):
            await stream.receive_frame()


async def test_a_byte_at_a_time_is_cut_off(arena: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "CALL_TIMEOUT_S", 0.5)
    victim = await arena.victim(slot_started=False)
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    stream = await open_to(attacker, victim, OFFER_PROTOCOL)
    with pytest.raises(MeshError), trio.fail_after(15):
        while True:
            await stream.send_some(b"\x00")
            await serves(neighbour, victim)
            await trio.sleep(0.02)
    assert not victim.node.effects._served


async def test_tunnels_without_a_request_end(arena: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "FIRST_FRAME_S", 0.2)
    victim = await arena.victim(slot_started=False)
    attacker = await arena.peer(victim)
    stream = await open_to(attacker, victim, TUNNEL_PROTOCOL)
    with pytest.raises(MeshError), trio.fail_after(10):
        await stream.receive_frame()


async def test_answers_that_nobody_reads_fill_nothing(arena: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 256 KiB to a peer that never reads: its few streams wait, then end."""
    monkeypatch.setattr(effects, "CALL_TIMEOUT_S", 2.0)
    victim = await arena.victim(slot_started=False)
    neighbour, attacker = await arena.peer(victim), await arena.connection(victim)
    machine = next(each for each in victim.machines if isinstance(each, EpochMachine))
    machine._library.hold(b"\x01" * 32, bytes(8 << 20))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    request = encode(FetchRequest("body", b"\x01" * 32, 0))
    frame = len(request).to_bytes(4, "big") + request
    for _ in range(60):
        stream = attacker.muxer.open_stream_nowait()
        await stream.write(proposal(FETCH_PROTOCOL) + frame)
    await serves(neighbour, victim)
    assert len(victim.node.effects._served) <= SERVED[FETCH_PROTOCOL].per_peer + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 32 * 1024
    await arena.eventually(lambda: not victim.node.effects._served)
    page = decode(FetchReply, await ask(neighbour, victim, FETCH_PROTOCOL, request))
    assert page.length == 8 << 20


async def test_a_peer_that_hangs_up_in_the_middle_of_an_answer(arena: Any) -> None:
    victim = await arena.victim(slot_started=False)
    neighbour, attacker = await arena.peer(victim), await arena.peer(victim)
    machine = next(each for each in victim.machines if isinstance(each, EpochMachine))
    machine._library.hold(b"\x01" * 32, bytes(1 << 20))
    for _ in range(10):
        stream = await open_to(attacker, victim, FETCH_PROTOCOL)
        await stream.send_frame(encode(FetchRequest("body", b"\x01" * 32, 0)))
        assert await stream.receive_some(100)
        await stream.reset()
    await serves(neighbour, victim)
    await arena.eventually(lambda: not victim.node.effects._served)
    assert not victim.mesh.statistics().failed_handlers


@pytest.mark.parametrize("offset", [1 << 20, 2**63, 2**64 - 1])
async def test_pages_behind_the_end(offset: int, arena: Any) -> None:
    victim = await arena.victim(slot_started=False)
    peer = await arena.peer(victim)
    machine = next(each for each in victim.machines if isinstance(each, EpochMachine))
    machine._library.hold(b"\x01" * 32, bytes(1000))
    reply = await ask(peer, victim, FETCH_PROTOCOL, encode(FetchRequest("body", b"\x01" * 32, offset)))
    assert decode(FetchReply, reply) == FetchReply(1000, b"")


# ── what a lease is worth ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("service", ["tcp", "logs", "exec", "", "ssh", "_serve_tcp", "__class__"])
async def test_a_tunnel_into_somebody_elses_lease(service: str, arena: Any) -> None:
    world = arena.world
    victim = await arena.victim(slot_started=False)
    victim.runtime.running[world.own_order_id.hex()] = ("127.0.0.1", 1)
    attacker = await arena.peer(victim)
    for order_id in (world.own_order_id, world.order_id, bytes(32)):
        asked = encode(opening(world, service, order_id=order_id, arguments=("sh",)))
        reply = decode(TunnelReply, await ask(attacker, victim, TUNNEL_PROTOCOL, asked))
        assert (reply.accepted, bool(reply.text)) == (0, True)


async def test_a_witness_may_connect_and_nothing_else(arena: Any) -> None:
    world = arena.world
    victim = await arena.victim(slot_started=False)
    witness = await arena.peer(victim, world.checkers[1])
    for service in ("logs", "exec"):
        asked = encode(opening(world, service, arguments=("sh",)))
        assert decode(TunnelReply, await ask(witness, victim, TUNNEL_PROTOCOL, asked)).accepted == 0


async def test_garbage_through_a_tunnel_to_a_program_that_does_not_read(arena: Any) -> None:
    """The tenant's own bytes wait at the tenant, not in the worker's memory."""
    world = arena.world
    victim = await arena.victim(slot_started=False)
    neighbour, client = await arena.peer(victim), await arena.peer(victim, world.client)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    victim.runtime.running[world.own_order_id.hex()] = ("127.0.0.1", listener.socket.getsockname()[1])
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    streams = []
    for _ in range(8):
        stream = await open_to(client, victim, TUNNEL_PROTOCOL)
        streams.append(stream)
        await stream.send_frame(encode(opening(world)))
        assert decode(TunnelReply, await stream.receive_frame()).accepted == 1
        with trio.move_on_after(0.3):
            while True:
                await stream.send_some(bytes(1 << 16))
                sent += 1 << 16
    await serves(neighbour, victim)
    assert sent < 128 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 32 * 1024
    for stream in streams:
        await stream.reset()
    await listener.aclose()


async def test_forged_tickets_start_nothing(arena: Any) -> None:
    world = arena.world
    victim = await arena.victim(slot_started=False)
    attacker = await arena.peer(victim)
    forged = [
        world.ticket(world.own_order_id, count=3),
        world.ticket(world.own_order_id, network=bytes(32)),
        world.ticket(world.order_id),
        world.certificate(),
    ]
    for ticket in forged:
        payload = encode(DeployOrder(ticket, (WORKLOAD,)))
        assert decode(DeployReply, await ask(attacker, victim, DEPLOY_PROTOCOL, payload)).accepted == 0
    assert victim.runtime.started == []


# ── floods of well-formed requests ───────────────────────────────────────────────────────────────────────────────────


async def flood(peer: Any, victim: Any, protocol: str, payloads: list[bytes]) -> None:
    """As many at once as a peer may."""
    limiter = trio.CapacityLimiter(8)

    async def one(payload: bytes) -> None:
        async with limiter:
            with suppress(MeshError):  # above its rate
                await ask(peer, victim, protocol, payload)

    async with trio.open_nursery() as nursery:
        for payload in payloads:
            nursery.start_soon(one, payload)


def offer_of(world: Any, keys: Any, nonce: int, cores: int) -> bytes:
    resources = replace(world.state.orders[world.own_order_id].resources, cpu_cores=cores, disk_mb=0)
    spec = order_spec(resources, 60, WORKLOAD, world.network)
    return offer_request(keys, spec, WORKLOAD, nonce.to_bytes(32, "big"), world.network)


async def test_a_flood_of_offer_requests(arena: Any) -> None:
    world = arena.world
    victim = await arena.victim(slot_started=False)
    honest, attacker = await arena.peer(victim, world.client), await arena.peer(victim, world.bound)
    await flood(attacker, victim, OFFER_PROTOCOL, [offer_of(world, world.bound, n, 1) for n in range(200)])
    machine = next(each for each in victim.machines if isinstance(each, OfferMachine))
    assert 0 < len(machine._holds) <= MAX_HOLDS
    assert victim.mesh.statistics().refused[OFFER_PROTOCOL] > 100
    reply = await ask(honest, victim, OFFER_PROTOCOL, offer_of(world, world.client, 1, 1))
    assert open_signed(Offer, reply, world.network).signer == victim.mesh.key


async def test_a_flood_of_votes(arena: Any) -> None:
    world = arena.world
    victim = await arena.victim(slot_started=False)
    order = world.state.orders[world.own_order_id]
    seat = world.checkers[1]
    honest, attacker = await arena.peer(victim, seat), await arena.peer(victim)
    core = TicketCore(world.own_order_id, order.worker, order.client_key, order.offer_hash)
    forged = [encode(CoreVote(core, n % 64, bytes([n % 256]) * 64)) for n in range(400)]
    await flood(attacker, victim, VOTE_PROTOCOL, forged)
    stranger = await arena.peer(victim)
    place = order.seats.index(seat.public_key)
    vote = CoreVote(core, place, seat.sign(core.DOMAIN, world.network, encode(core)))
    assert await ask(stranger, victim, VOTE_PROTOCOL, encode(vote)) == REFUSED
    assert await ask(honest, victim, VOTE_PROTOCOL, encode(vote)) == COUNTED
    assert not victim.node.inbox.dropped


async def test_a_flood_of_challenges_by_strangers(arena: Any) -> None:
    """No proof is computed for them."""
    world = arena.world
    victim = await arena.victim()
    attacker = await arena.peer(victim)
    challenges = [
        seal(Challenge(1, slot, victim.mesh.key, seat, bytes(32)), world.nobody, world.network)
        for slot in (0, 6, 7, 8, 2**32 - 1)
        for seat in (0, 4, 5, 2**16 - 1)
    ]
    for payload in challenges:
        assert await ask(attacker, victim, CHALLENGE_PROTOCOL, payload) == b""
    assert "proved" not in [event.kind for event in victim.node.store.events(0, 100)]
