"""Limits on connections and what happens at them: who is refused, who gives way, what is held against whom."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct

import psutil
import pytest
import trio
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError

from kaisar_p2p.errors import PeerUnreachable, RequestFailed
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh
from kaisar_p2p.mesh.connection import Connection, TcpStream
from kaisar_p2p.mesh.guard.conflicts import PROTOCOL as KEY_IN_USE
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.wire.verdict import Verdict

FAST = MeshLimits(heartbeat_s=0.1, keepalive_s=1.0, exchange_s=0.5)


async def eventually(condition, within_s: float = 15.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


class Stranger:
    """A key that connects with nodes and does no more than that."""

    def __init__(self, nursery: trio.Nursery, seed: bytes | None = None) -> None:
        self.network = Network(key_pair_of(seed or os.urandom(32)), FAST)
        self.network.run_in(nursery)
        self.key = bytes(self.network.get_peer_id().to_bytes()[6:])

    async def dial(self, mesh: Mesh) -> Connection:
        return await self.network.dial_direct(mesh.key, mesh._own_addresses())

    async def is_let_in(self, mesh: Mesh) -> bool:
        """The node takes a connection and keeps it for as long as it takes to answer."""
        try:
            connection = await self.dial(mesh)
        except PeerUnreachable:
            return False
        await eventually(lambda: mesh.is_connected(self.key) or connection.event_closed.is_set())
        return mesh.is_connected(self.key)


async def gone(connection: Connection) -> None:
    with trio.fail_after(10):
        await connection.event_closed.wait()


# -- offences ---------------------------------------------------------------------------------------------------------


async def test_who_breaks_the_muxer_is_refused_for_longer_each_time(lab, nursery) -> None:
    mesh = await lab.mesh(ban_s=0.2)
    stranger, lengths = Stranger(nursery), []
    for _ in range(2):
        connection = await stranger.dial(mesh)
        await eventually(lambda: mesh.is_connected(stranger.key))
        connection.muxer.enqueue(struct.pack("!BBHII", 9, 0, 0, 1, 0))
        await gone(connection)
        await eventually(lambda: mesh._reputation.is_banned(stranger.key, trio.current_time()))
        lengths.append(mesh._reputation.ban_left_s(stranger.key, trio.current_time()))
        assert not await stranger.is_let_in(mesh)
        await trio.sleep(lengths[-1])
    assert lengths[0] < 0.5 * lengths[1]
    assert await stranger.is_let_in(mesh)
    assert mesh.statistics().refused["peer"] == 2


async def test_a_frame_that_does_not_authenticate_is_held_against_the_peer_but_bans_nobody(lab, nursery) -> None:
    """Somebody on the way can do that to an honest peer."""
    mesh, stranger = await lab.mesh(), Stranger(nursery)
    connection = await stranger.dial(mesh)
    await eventually(lambda: mesh.is_connected(stranger.key))
    await connection.muxer._session._raw.write(b"\x00\x40" + bytes(64))
    await gone(connection)
    await eventually(lambda: mesh._reputation.score(stranger.key, trio.current_time()) < 0)
    assert await stranger.is_let_in(mesh)


async def test_streams_of_garbage_add_up_to_a_ban(lab, nursery) -> None:
    mesh, stranger = await lab.mesh(), Stranger(nursery)
    connection = await stranger.dial(mesh)
    for _ in range(12):
        with contextlib.suppress(MuxedStreamError, MuxedStreamEOF, MuxedConnUnavailable):
            stream = connection.muxer.open_stream_nowait()
            await stream.write(b"\x05\xff\xfe\xfd\xfc\n")
            while True:
                await stream.read()
    await gone(connection)
    assert not await stranger.is_let_in(mesh)


async def test_messages_that_cannot_be_decoded_add_up_too(lab, nursery) -> None:
    mesh, stranger = await lab.mesh(), Stranger(nursery)
    connection = await stranger.dial(mesh)
    stream = connection.muxer.open_stream_nowait()
    await stream.write(proposal(KEY_IN_USE) + (4).to_bytes(4, "big") + b"junk")
    await eventually(lambda: mesh._reputation.score(stranger.key, trio.current_time()) < -9)


async def test_an_honest_goodbye_and_silence_cost_nothing(lab, nursery) -> None:
    mesh, stranger = await lab.mesh(keepalive_s=0.1), Stranger(nursery)
    connection = await stranger.dial(mesh)
    await eventually(lambda: mesh.is_connected(stranger.key))
    await connection.close()
    await eventually(lambda: not mesh.is_connected(stranger.key))
    connection = await stranger.dial(mesh)
    connection.muxer._outbox.pong = lambda _frame: None
    await gone(connection)
    assert mesh._reputation.score(stranger.key, trio.current_time()) == 0


async def test_ignored_messages_cost_nothing_and_rejected_ones_the_author_most(lab) -> None:
    author, victim = await lab.pair()
    verdicts = [Verdict.IGNORE] * 20 + [Verdict.REJECT]
    victim.subscribe("advert", lambda *_: (verdicts.pop(0), ""))
    await eventually(lambda: victim.key in author.subscribers("advert"))
    for number in range(20):
        await author.publish("advert", b"%d" % number)
    await eventually(lambda: victim.statistics().messages.get(("advert", "ignore")) == 20)
    assert victim.peers()[0].score == 0
    await author.publish("advert", b"last")
    await eventually(lambda: victim.statistics().messages.get(("advert", "reject")) == 1)
    assert -10 <= victim.peers()[0].score < -9


class Shelf(dict[str, bytes]):
    """A memory of a mesh."""

    def load(self, name: str) -> bytes | None:
        return self.get(name)

    def save(self, name: str, blob: bytes) -> None:
        self[name] = blob


async def test_a_ban_outlives_the_process(nursery) -> None:
    config, seed, memory, stranger = MeshConfig(limits=FAST), os.urandom(32), Shelf(), Stranger(nursery)
    async with open_mesh(config, seed, memory) as mesh:
        connection = await stranger.dial(mesh)
        await eventually(lambda: mesh.is_connected(stranger.key))
        connection.muxer.enqueue(struct.pack("!BBHII", 9, 0, 0, 1, 0))
        await gone(connection)
        await eventually(lambda: mesh._reputation.is_banned(stranger.key, trio.current_time()))
    async with open_mesh(config, seed, memory) as mesh:
        assert not await stranger.is_let_in(mesh)
        assert await Stranger(nursery).is_let_in(mesh)


# -- connections ------------------------------------------------------------------------------------------------------


async def fill(mesh: Mesh, nursery: trio.Nursery, count: int) -> list[Stranger]:
    strangers = [Stranger(nursery) for _ in range(count)]
    for stranger in strangers:
        assert await stranger.is_let_in(mesh)
    return strangers


async def test_inbound_connections_leave_room_for_those_that_we_dial(lab, nursery) -> None:
    mesh = await lab.mesh(connections=6, outbound_reserved=2, target_peers=0)
    await fill(mesh, nursery, 4)
    assert not await Stranger(nursery).is_let_in(mesh)
    assert mesh.statistics().refused["connections"] >= 1
    for _ in range(2):
        other = await lab.mesh()
        mesh.add_addresses(other.key, other.addrs)
        await mesh._discovery.connect(other.key)
    assert mesh.statistics().connections == 6


async def test_half_of_few_connections_is_for_others_whatever_is_reserved(lab, nursery) -> None:
    mesh = await lab.mesh(connections=4, outbound_reserved=32, target_peers=0)
    await fill(mesh, nursery, 2)
    assert not await Stranger(nursery).is_let_in(mesh)


async def test_who_is_of_no_use_gives_way_but_nobody_is_replaced_for_being_there_first(lab, nursery) -> None:
    mesh = await lab.mesh(connections=4, outbound_reserved=1, idle_s=1000.0, target_peers=0)
    strangers = await fill(mesh, nursery, 3)
    assert not await Stranger(nursery).is_let_in(mesh)
    useless = mesh._network.connection_to(strangers[1].key)
    useless.useful_at -= 1001
    newcomer = Stranger(nursery)
    assert await newcomer.is_let_in(mesh)
    assert not mesh.is_connected(strangers[1].key)
    assert mesh.is_connected(strangers[0].key)
    assert mesh.is_connected(strangers[2].key)
    assert mesh.statistics().pruned == {"idle": 1}
    await gone(useless)


async def test_who_misbehaved_gives_way_first_and_who_is_kept_never(lab, nursery) -> None:
    mesh = await lab.mesh(connections=4, outbound_reserved=1, target_peers=0)
    strangers = await fill(mesh, nursery, 3)
    for stranger in strangers:
        mesh._reputation.penalise(stranger.key, 50.0, trio.current_time())
    mesh.keep_connected(strangers[0].key, [])
    mesh._reputation.penalise(strangers[1].key, 20.0, trio.current_time())
    assert await Stranger(nursery).is_let_in(mesh)
    assert {mesh.is_connected(strangers[number].key) for number in (0, 2)} == {True}
    assert not mesh.is_connected(strangers[1].key)
    assert mesh.statistics().pruned == {"blame": 1}


async def test_when_all_is_full_a_peer_that_we_want_gets_the_place_of_one_without_use(lab, nursery) -> None:
    mesh = await lab.mesh(connections=2, outbound_reserved=1, target_peers=0)
    (stranger,) = await fill(mesh, nursery, 1)
    others = [await lab.mesh(target_peers=0) for _ in range(2)]
    mesh.add_addresses(others[0].key, others[0].addrs)
    await mesh._discovery.connect(others[0].key)
    for other in others:
        mesh.add_addresses(other.key, other.addrs)
    with pytest.raises(PeerUnreachable):  # nobody is worse than a stranger
        await mesh._discovery.connect(others[1].key)
    mesh.keep_connected(others[1].key, others[1].addrs)
    await eventually(lambda: mesh.is_connected(others[1].key))
    assert mesh.statistics().connections == 2
    assert mesh.statistics().pruned == {"kept": 1}
    assert not (mesh.is_connected(stranger.key) and mesh.is_connected(others[0].key))


async def test_who_has_a_request_open_stays_while_another_can_go(lab, nursery) -> None:
    mesh = await lab.mesh(connections=3, outbound_reserved=1, target_peers=0)
    finish = trio.Event()

    async def slow(stream: MeshStream) -> None:
        await stream.receive_frame()
        await finish.wait()

    mesh.serve("/slow", slow, max_frame_bytes=10)
    busy, idle = await fill(mesh, nursery, 2)
    stream = busy.network.connection_to(mesh.key).muxer.open_stream_nowait()
    await stream.write(proposal("/slow") + (2).to_bytes(4, "big") + b"do")
    await eventually(lambda: mesh._network.connection_to(busy.key).busy)
    for stranger in (busy, idle):
        mesh._network.connection_to(stranger.key).useful_at -= 1e6
    assert await Stranger(nursery).is_let_in(mesh)
    assert mesh.is_connected(busy.key)
    assert not mesh.is_connected(idle.key)


async def test_a_key_has_few_connections_and_none_that_lives_is_thrown_out(lab, nursery) -> None:
    mesh, stranger = await lab.mesh(connections_per_key=2), Stranger(nursery)
    first, second = await stranger.dial(mesh), await stranger.dial(mesh)
    await eventually(lambda: len(mesh._network.connections_with(stranger.key)) == 2)
    third = await stranger.dial(mesh)
    await gone(third)
    assert mesh.statistics().refused["key"] == 1
    assert not first.event_closed.is_set()
    assert not second.event_closed.is_set()
    mesh._network.connections_with(stranger.key)[0].muxer.last_received -= 1000  # a crash that nobody noticed
    await stranger.dial(mesh)
    await gone(first)
    assert mesh.statistics().pruned == {"silent": 1}


async def test_a_flood_of_connections_makes_no_crowd_of_tasks(lab) -> None:
    mesh = await lab.mesh(handshakes=16, handshake_s=1.0)
    address = mesh._network.bound[0]
    before, most = trio.lowlevel.current_statistics().tasks_living, 0
    flood: list[socket.socket] = []
    try:
        for number in range(800):
            flood.append(socket.socket())
            flood[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                flood[-1].connect((address.host, address.port))
            if number % 20 == 0:
                await trio.lowlevel.checkpoint()
                most = max(most, trio.lowlevel.current_statistics().tasks_living - before)
        await eventually(lambda: sum(mesh.statistics().refused.values()) > 200)
        assert most <= 100
        assert mesh._network.door.half_open <= 16
    finally:
        for sock in flood:
            sock.close()
    other = await lab.mesh()
    other.keep_connected(mesh.key, mesh.addrs)
    with trio.fail_after(20):
        await mesh.wait_connected()


async def test_a_flood_of_identities_leaves_nothing_behind(lab, nursery) -> None:
    mesh = await lab.mesh()
    for _ in range(60):
        stranger = Stranger(nursery)
        connection = await stranger.dial(mesh)
        await connection.close()
    await eventually(lambda: mesh.statistics().connections == 0)
    network = mesh._network
    await eventually(lambda: network.door.inside == 0)
    assert list(network.peerstore.peer_ids()) == [network.self_id]
    assert not network.connections
    assert not network._open
    assert not network._joining
    assert not mesh._gossip._router._peers
    assert not mesh._reputation._keys.records


async def test_sockets_notice_a_pulled_cable(lab) -> None:
    first, second = await lab.pair(keepalive_s=12.0)
    for mesh in (first, second):
        tcp = _tcp_of(mesh._network.open_connections()[0])
        assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10


def _tcp_of(connection: Connection) -> trio.socket.SocketType:
    layer = connection.muxer._session
    while not isinstance(layer, TcpStream):
        layer = getattr(layer, "_raw", None) or layer.stream
    return layer.stream.socket


# -- streams and memory -----------------------------------------------------------------------------------------------


async def test_streams_are_limited_over_all_peers_and_each_has_some(lab, nursery) -> None:
    mesh = await lab.mesh(streams=20)

    async def hold(_stream: MeshStream) -> None:
        await trio.sleep_forever()

    mesh.serve("/hold", hold, max_frame_bytes=10, per_peer=100, rate_per_s=1000)
    for number, stranger in enumerate(await fill(mesh, nursery, 4)):
        muxer = stranger.network.connection_to(mesh.key).muxer
        for _ in range(20):
            await muxer.open_stream_nowait().write(proposal("/hold"))
        await eventually(lambda number=number: mesh._network.open_streams == 20 + number * 8)
    await eventually(lambda: mesh.statistics().refused["streams"] == 80 - 44)


async def test_what_served_streams_hold_is_limited_over_all_peers(lab) -> None:
    server = await lab.mesh(served_bytes=1 << 20, target_peers=0)
    clients = [await lab.mesh(target_peers=0) for _ in range(3)]

    async def swallow(stream: MeshStream) -> None:
        await stream.receive_frame()

    server.serve("/swallow", swallow, max_frame_bytes=1 << 19)
    held = server._served_bytes
    streams = []
    for client in clients:
        client.add_addresses(server.key, server.addrs)
        streams.append(await client.open_stream(server.key, "/swallow", timeout_s=10, max_frame_bytes=10))
    for stream in streams[:2]:
        await stream.send_some((1 << 19).to_bytes(4, "big") + bytes((1 << 19) - 1))  # the last byte never comes
    await eventually(lambda: held.total == (1 << 20) - 2)
    with trio.fail_after(10), pytest.raises(RequestFailed):
        await streams[2].send_some((1 << 19).to_bytes(4, "big") + bytes(1 << 19))
        await streams[2].receive_frame()
    for stream in streams:
        await stream.reset()
    await eventually(lambda: held.total == 0)


async def test_what_is_only_announced_takes_nobodys_place(lab) -> None:
    server, client = await lab.pair(served_bytes=1 << 20)

    async def swallow(stream: MeshStream) -> None:
        await stream.receive_frame()
        await stream.send_frame(b"taken")

    server.serve("/swallow", swallow, max_frame_bytes=1 << 20)
    for _ in range(4):
        stream = await client.open_stream(server.key, "/swallow", timeout_s=10, max_frame_bytes=10)
        await stream.send_some((1 << 20).to_bytes(4, "big") + bytes(10))
    await eventually(lambda: server._served_bytes.total == 40)
    assert await client.request(server.key, "/swallow", bytes(9000), deadline_s=10, max_reply_bytes=10) == b"taken"


async def test_a_stream_protects_a_peer_only_when_something_is_asked_on_it(lab) -> None:
    server, client = await lab.pair()

    async def tunnel(stream: MeshStream) -> None:
        await stream.receive_frame()
        await stream.receive_frame()

    server.serve("/tunnel", tunnel, max_frame_bytes=1 << 19)
    connection = server._network.connection_to(client.key)
    await eventually(lambda: not connection.busy)
    stream = await client.open_stream(server.key, "/tunnel", timeout_s=10, max_frame_bytes=10)
    assert not connection.serving
    await stream.send_frame(b"hello")
    await eventually(lambda: connection.serving == 1)
    await stream.reset()
    await eventually(lambda: connection.serving == 0)


async def test_a_request_counts_until_it_is_answered(lab) -> None:
    server, client = await lab.pair(served_bytes=1 << 20)
    held, seen = server._served_bytes, []

    async def answer(stream: MeshStream) -> None:
        await stream.receive_frame()
        seen.append(held.total)
        await stream.send_frame(bytes(900_000))

    server.serve("/answer", answer, max_frame_bytes=1 << 19)
    reply = await client.request(server.key, "/answer", bytes(100_000), deadline_s=10, max_reply_bytes=1 << 20)
    assert len(reply) == 900_000 and seen == [100_000]
    await eventually(lambda: held.total == 0)


@pytest.mark.slow
async def test_thousands_of_identities_leave_memory_flat(lab) -> None:
    mesh = await lab.mesh(handshakes_per_s=100_000)
    process, sizes = psutil.Process(), []
    for _ in range(5):
        for _ in range(300):
            async with trio.open_nursery() as nursery:
                connection = await Stranger(nursery).dial(mesh)
                await connection.close()
                nursery.cancel_scope.cancel()
        await eventually(lambda: mesh.statistics().connections == 0)
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[1] < 6_000_000, sizes
    assert len(list(mesh._network.peerstore.peer_ids())) == 1
