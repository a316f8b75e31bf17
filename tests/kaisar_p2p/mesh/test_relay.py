"""Relays on loopback: meshes that nobody can dial, as behind a NAT, reach each other."""

from __future__ import annotations

import math
import os
import time

import pytest
import trio

from kaisar_p2p.errors import PeerUnreachable, RequestFailed
from kaisar_p2p.mesh import MeshStream
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import CircuitAddress, with_peer
from kaisar_p2p.mesh.ids import id_bytes_of
from kaisar_p2p.mesh.protobuf import parse_fields
from kaisar_p2p.mesh.reach import relay_client
from kaisar_p2p.mesh.reach.circuit_wire import (
    HOP,
    STOP,
    HopMessage,
    HopType,
    Limit,
    Status,
    StopMessage,
    StopType,
    addresses_of,
    framed,
    receive,
    send,
)
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.wire.verdict import Verdict
from tests.kaisar_p2p.mesh.conftest import eventually
from tests.kaisar_p2p.mesh.relay_lab import LIMITS, circuits, echoed, introduce, relayed

from libp2p.peer.envelope import unmarshal_envelope  # isort: skip

# -- reaching each other ----------------------------------------------------------------------------------------------


async def test_two_hidden_nodes_talk_over_a_relay(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    payload = os.urandom(1 << 20)
    assert await echoed(a, b, payload) == payload
    assert relayed(a, b) == relayed(b, a) == [True]
    carried = relay.relay_statistics()
    assert (carried.reservations, carried.circuits) == (2, 1)
    assert carried.relayed_bytes > 2 * len(payload)


async def test_every_method_of_the_mesh_finds_the_way(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)

    async def answer(stream: MeshStream) -> None:
        await stream.send_frame(await stream.receive_frame() + b" from " + stream.peer)

    b.serve("/ask", answer, max_frame_bytes=100)
    assert await a.request(b.key, "/ask", b"hi", deadline_s=5, max_reply_bytes=100) == b"hi from " + a.key


@pytest.mark.parametrize("asked", [True, False])
async def test_when_a_relay_says_nothing_any_more_what_is_new_goes_over_another(internet, asked: bool) -> None:
    relays = [await internet.relay() for _ in range(2)]
    a, b = await internet.hidden_node(*relays), await internet.hidden_node(*relays)
    introduce(a, b)
    assert await echoed(a, b) == b"hello"
    first = a._network.connection_to(b.key)
    first.muxer._liveness.is_doubtful = lambda _now, _received: True
    if asked:
        assert await echoed(a, b) == b"hello"
    else:
        await eventually(lambda: len(a._network.connections_with(b.key)) == 2)
    second = a._network.connection_to(b.key)
    assert second is not first
    assert second.address.relay != first.address.relay
    await eventually(lambda: first.event_closed.is_set())  # nothing was open on it


async def test_without_another_relay_a_doubtful_connection_is_used(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    assert await echoed(a, b) == b"hello"
    only = a._network.connection_to(b.key)
    only.muxer._liveness.is_doubtful = lambda _now, _received: True
    assert await echoed(a, b) == b"hello"
    assert a._network.connections_with(b.key) == [only]


async def test_the_addresses_over_relays_are_announced(internet) -> None:
    relays = [await internet.relay() for _ in range(2)]
    b = await internet.hidden_node(*relays)
    assert sorted(circuits(b)) == sorted(
        f"{relay.addrs[0]}/p2p-circuit/p2p/{b.addrs[0].rsplit('/', 1)[1]}" for relay in relays
    )


async def test_a_peer_finds_a_hidden_one_by_asking_the_relay(internet) -> None:
    relay = await internet.relay()
    b = await internet.hidden_node(relay)
    await eventually(lambda: any(isinstance(at, CircuitAddress) for at in relay._book.of(b.key)))
    a = await internet.node(relay, hidden=True)
    assert await echoed(a, b) == b"hello"


async def test_gossip_crosses_a_relay_that_takes_no_part(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    received = b.subscribe("news", lambda *_message: (Verdict.ACCEPT, ""))
    a.subscribe("news", lambda *_message: (Verdict.ACCEPT, ""))
    await echoed(a, b)
    await eventually(lambda: b.key in a.subscribers("news"))
    await a.publish("news", b"hello")
    with trio.fail_after(10):
        message = await received.receive()
    assert (message.data, message.author) == (b"hello", a.key)


async def test_half_close_and_reset_cross_a_relay(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)

    async def count(stream: MeshStream) -> None:
        size = 0
        while data := await stream.receive_some():
            size += len(data)
        await stream.send_frame(str(size).encode())

    async def impolite(stream: MeshStream) -> None:
        await stream.receive_some()
        await stream.reset()

    b.serve("/count", count, max_frame_bytes=10)
    b.serve("/impolite", impolite, max_frame_bytes=10)
    with trio.fail_after(20):
        stream = await a.open_stream(b.key, "/count", timeout_s=5, max_frame_bytes=100)
        await stream.send_some(bytes(3_000_000))
        await stream.send_eof()
        assert await stream.receive_frame() == b"3000000"
        stream = await a.open_stream(b.key, "/impolite", timeout_s=5, max_frame_bytes=100)
        await stream.send_some(b"x")
        with pytest.raises(RequestFailed):
            await stream.receive_frame()
    assert await echoed(a, b) == b"hello"


async def test_a_receiver_that_does_not_read_stops_the_sender_not_the_relay(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    go_on = trio.Event()

    async def late(stream: MeshStream) -> None:
        await go_on.wait()
        await stream.send_frame(b"")
        while await stream.receive_some():
            pass

    b.serve("/late", late, max_frame_bytes=10)
    stream = await a.open_stream(b.key, "/late", timeout_s=5, max_frame_bytes=100)
    with trio.move_on_after(1) as scope:  # long enough to send all, if somebody took it
        await stream.send_some(bytes(64 << 20))
    assert scope.cancelled_caught
    assert relay.relay_statistics().relayed_bytes < 8 << 20
    go_on.set()


# -- when relays go ---------------------------------------------------------------------------------------------------


async def test_another_relay_takes_over(internet) -> None:
    first, second = await internet.relay(), await internet.relay()
    a, b = await internet.hidden_node(first, second), await internet.hidden_node(first, second)
    introduce(a, b)
    assert await echoed(a, b) == b"hello"
    used, other = (first, second) if first.relay_statistics().circuits else (second, first)
    stream = await a.open_stream(b.key, "/echo", timeout_s=5, max_frame_bytes=100)
    await internet.stop(used)
    with pytest.raises(RequestFailed), trio.fail_after(10):
        while await stream.receive_some():
            pass
        raise RequestFailed("it ended")
    assert await echoed(a, b) == b"hello"
    assert other.relay_statistics().circuits == 1
    await eventually(lambda: b._relaying.client.relays == (other.key,))


async def test_a_new_relay_replaces_one_that_is_gone(internet) -> None:
    first = await internet.relay()
    b = await internet.hidden_node(first, relays=1)
    second = await internet.relay()
    b.keep_connected(second.key, second.addrs)
    await b.wait_connected(2)
    assert b._relaying.client.relays == (first.key,)
    await internet.stop(first)
    await eventually(lambda: b._relaying.client.relays == (second.key,), within_s=5)


async def test_a_relay_that_is_known_by_its_record_is_dialed(internet) -> None:
    relay, meeting = await internet.relay(), await internet.node(hidden=False)
    relay.keep_connected(meeting.key, meeting.addrs)
    await relay.wait_connected()
    b = await internet.node(meeting)  # not connected with the relay, and it looks for nobody
    await eventually(lambda: b._relaying.client.relays == (relay.key,))


async def test_reservations_are_refreshed_before_they_run_out(internet, monkeypatch) -> None:
    monkeypatch.setattr(relay_client, "_LIFETIME_S", (0.1, 0.5))
    relay = await internet.relay(relay_asks_per_s=100.0)
    asked: list[HopMessage] = []
    reserve = relay._relaying.server._reserve
    monkeypatch.setattr(relay._relaying.server, "_reserve", lambda *args: (asked.append(args), reserve(*args))[1])
    b = await internet.hidden_node(relay)
    await eventually(lambda: len(asked) >= 4)
    assert b._relaying.client.relays == (relay.key,)


async def test_a_reservation_ends_with_the_connection(internet) -> None:
    relay = await internet.relay()
    b = await internet.hidden_node(relay)
    assert relay.relay_statistics().reservations == 1
    await internet.stop(b)
    await eventually(lambda: relay.relay_statistics().reservations == 0)


async def test_reservations_end_when_they_are_not_wanted(internet) -> None:
    relay = await internet.relay()
    b = await internet.hidden_node(relay)
    b._relaying.on_reachability("public")
    await eventually(lambda: not circuits(b))


# -- quotas -----------------------------------------------------------------------------------------------------------


async def test_reservations_are_limited(internet) -> None:
    relay = await internet.relay(relay_reservations=1)
    await internet.hidden_node(relay)
    late = await internet.node(relay)
    await eventually(lambda: relay.relay_statistics().refused.get("reservations", 0) > 0)
    assert late._relaying.client.relays == ()


async def test_reservations_of_an_address_are_limited(internet) -> None:
    relay = await internet.relay(relay_reservations_per_address=2)
    for _ in range(2):
        await internet.hidden_node(relay)
    await internet.node(relay)
    await eventually(lambda: relay.relay_statistics().refused.get("reservations of an address", 0) > 0)
    assert relay.relay_statistics().reservations == 2


async def test_strangers_bulk_is_refused(internet) -> None:
    relay = await internet.relay(relay_stranger_bytes=300_000)
    b = await internet.hidden_node(relay)
    member, stranger = await internet.hidden_node(relay), await internet.node(relay, reserve=False)
    for mesh in (member, stranger):
        introduce(mesh, b)
    payload = os.urandom(1 << 20)
    assert await echoed(member, b, payload) == payload
    assert await echoed(stranger, b) == b"hello"
    with pytest.raises((RequestFailed, ExceptionGroup)):
        assert await echoed(stranger, b, payload) == payload
    assert relay.relay_statistics().refused["data"] == 1
    await eventually(lambda: relay.relay_statistics().circuits == 1)


async def test_no_bytes_for_strangers_means_no_circuits_for_them(internet) -> None:
    relay = await internet.relay(relay_stranger_bytes=0)
    b = await internet.hidden_node(relay)
    member, stranger = await internet.hidden_node(relay), await internet.node(relay, reserve=False)
    for mesh in (member, stranger):
        introduce(mesh, b)
    assert await echoed(member, b, bytes(1 << 20)) == bytes(1 << 20)
    with pytest.raises(PeerUnreachable, match="permission denied"):
        await echoed(stranger, b)
    assert relay.relay_statistics().refused["strangers"] > 0
    relay.relay_members(lambda _key: False)
    refused = relay.relay_statistics().refused["strangers"]
    await internet.node(relay)
    await eventually(lambda: relay.relay_statistics().refused["strangers"] > refused)


async def test_the_node_says_who_is_a_member(internet) -> None:
    relay = await internet.relay(relay_stranger_bytes=300_000)
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    relay.relay_members(lambda key: key == b.key)
    introduce(a, b)
    with pytest.raises((RequestFailed, ExceptionGroup, AssertionError)):
        assert await echoed(a, b, bytes(1 << 20)) == bytes(1 << 20)
    relay.relay_members(lambda _key: True)
    await eventually(lambda: not a.is_connected(b.key))
    assert await echoed(a, b, bytes(1 << 20)) == bytes(1 << 20)


async def test_a_circuit_has_an_end(internet) -> None:
    relay = await internet.relay(relay_member_s=1.0, relay_stranger_s=1.0)
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    stream = await a.open_stream(b.key, "/echo", timeout_s=5, max_frame_bytes=100)
    with pytest.raises(RequestFailed), trio.fail_after(10):
        await stream.receive_some()
    assert relay.relay_statistics().refused == {"duration": 1}
    assert await echoed(a, b) == b"hello"


async def test_circuits_of_a_peer_are_limited(internet) -> None:
    relay = await internet.relay(relay_circuits_per_peer=1)
    a, b, c = [await internet.hidden_node(relay) for _ in range(3)]
    for mesh in (a, c):
        introduce(mesh, b)
    assert await echoed(a, b) == b"hello"
    with pytest.raises(PeerUnreachable, match="resource limit exceeded"):
        await echoed(c, b)
    assert await echoed(a, b) == b"hello"


async def test_all_circuits_together_keep_to_the_rate(internet) -> None:
    relay = await internet.relay(relay_bytes_per_s=500_000.0)
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    began = trio.current_time()
    await echoed(a, b, bytes(750_000))  # both ways, half a million of it at once
    assert trio.current_time() - began > 1.5


# -- protocol ---------------------------------------------------------------------------------------------------------


async def _hop(connection: Connection, data: bytes) -> HopMessage:
    stream = connection.muxer.open_stream_nowait()
    with trio.fail_after(5):
        await stream.write(proposal(HOP))
        await confirm(stream, HOP)
        await stream.write(data)
        return HopMessage.decode(await receive(stream))


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"\x03abc", Status.MALFORMED_MESSAGE),
        (b"\xff\xff\x7f", Status.MALFORMED_MESSAGE),
        (b"\x00", Status.MALFORMED_MESSAGE),
        (framed(HopMessage(HopType.STATUS, status=100)), Status.UNEXPECTED_MESSAGE),
        (framed(HopMessage(77)), Status.UNEXPECTED_MESSAGE),
        (framed(HopMessage(HopType.CONNECT)), Status.MALFORMED_MESSAGE),
        (framed(HopMessage(HopType.CONNECT, peer=b"nobody")), Status.MALFORMED_MESSAGE),
        (framed(HopMessage(HopType.CONNECT, peer=id_bytes_of(bytes(32)))), Status.NO_RESERVATION),
    ],
)
async def test_what_a_relay_answers_to_nonsense(internet, message: bytes, status: Status) -> None:
    relay = await internet.relay()
    node = await internet.node(relay, hidden=False)
    connection = node._network.connection_to(relay.key)
    assert (await _hop(connection, message)).status == status
    assert node.is_connected(relay.key)


async def test_what_a_reservation_says(internet) -> None:
    relay = await internet.relay()
    node = await internet.node(relay, hidden=False)
    answer = await _hop(node._network.connection_to(relay.key), framed(HopMessage(HopType.RESERVE)))
    assert (answer.type, answer.status) == (HopType.STATUS, Status.OK)
    assert answer.limit == Limit(math.ceil(LIMITS.relay_member_s), LIMITS.relay_member_bytes)
    assert abs(answer.reservation.expires_at - time.time() - LIMITS.relay_reservation_s) < 60
    assert [with_peer(at, key) for at, key in addresses_of(answer.reservation.addresses)] == list(relay.addrs)
    envelope = unmarshal_envelope(answer.reservation.voucher)
    envelope.validate("libp2p-relay-rsvp")
    voucher = parse_fields(envelope.raw_payload)
    assert voucher == {
        1: [id_bytes_of(relay.key)],
        2: [id_bytes_of(node.key)],
        3: [answer.reservation.expires_at],
    }


async def test_there_is_no_relaying_over_relays(internet) -> None:
    relay = await internet.relay()
    a = await internet.hidden_node(relay)
    b = await internet.hidden_node(relay)
    introduce(a, b)
    await echoed(a, b)
    b._relaying.server.start()
    over_relay = a._network.connection_to(b.key)
    assert (await _hop(over_relay, framed(HopMessage(HopType.RESERVE)))).status == Status.PERMISSION_DENIED


async def test_only_relays_that_we_chose_may_bring_connections(internet) -> None:
    relay, stranger = await internet.relay(), await internet.relay()
    b = await internet.hidden_node(relay)
    b._relaying.client.want(False)
    b.keep_connected(stranger.key, stranger.addrs)
    await b.wait_connected(2)
    connection = stranger._network.connection_to(b.key)
    stream = connection.muxer.open_stream_nowait()
    with trio.fail_after(5):
        await stream.write(proposal(STOP))
        await confirm(stream, STOP)
        await send(stream, StopMessage(StopType.CONNECT, peer=id_bytes_of(bytes(32))))
        answer = StopMessage.decode(await receive(stream))
    assert answer.status == Status.PERMISSION_DENIED


async def test_a_relay_cannot_pretend_to_be_the_peer(internet) -> None:
    relay = await internet.relay()
    a, b, c = [await internet.hidden_node(relay) for _ in range(3)]
    server = relay._relaying.server
    server._connection_with = lambda _key: relay._network.connection_to(c.key)  # leads to somebody else
    introduce(a, b)
    with pytest.raises(PeerUnreachable):
        await echoed(a, b)
    assert not a.is_connected(b.key)


# -- from relayed to direct -------------------------------------------------------------------------------------------


async def test_a_public_peer_is_dialed_back_and_streams_in_progress_go_on(internet) -> None:
    relay = await internet.relay()
    b = await internet.hidden_node(relay)
    a = await internet.node(relay, hidden=False)
    introduce(a, b)
    early = await a.open_stream(b.key, "/echo", timeout_s=5, max_frame_bytes=100)
    await eventually(lambda: relayed(a, b) == relayed(b, a) == [False])
    with trio.fail_after(10):
        await early.send_some(b"still here")
        assert await early.receive_some() == b"still here"
        carried = relay.relay_statistics().relayed_bytes
        assert await echoed(a, b, bytes(1 << 20)) == bytes(1 << 20)
        assert relay.relay_statistics().relayed_bytes - carried < 100_000
        await early.send_eof()
        assert await early.receive_some() == b""
    await early.aclose()
    await eventually(lambda: relay.relay_statistics().circuits == 0)
