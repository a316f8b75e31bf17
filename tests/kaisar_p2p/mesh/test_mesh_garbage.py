"""What a peer sends costs that peer its connection at most: the victim goes on serving an honest neighbour."""

from __future__ import annotations

import contextlib
import os
import random
import struct

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from nacl.signing import SigningKey

from kaisar_p2p.mesh import Mesh
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.gossip.pubsub import PROTOCOL as GOSSIP
from kaisar_p2p.mesh.ids import id_bytes_of
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.wire.verdict import Verdict

TOPIC = "/kaisar/test/advert/1"


def accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


async def eventually(condition, within_s: float = 15.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


class Victim:
    """A node with an honest neighbour that checks that it lives."""

    def __init__(self, lab, mesh: Mesh, neighbour: Mesh) -> None:
        self.lab, self.mesh, self.neighbour = lab, mesh, neighbour
        self.received = mesh.subscribe("advert", accept)
        neighbour.subscribe("advert", accept)

    async def lives(self) -> None:
        """The neighbour is still connected, its gossip arrives, its requests are answered."""
        data = os.urandom(8)
        await eventually(lambda: self.mesh.key in self.neighbour.subscribers("advert"))
        await self.neighbour.publish("advert", data)
        with trio.fail_after(10):
            while (await self.received.receive()).data != data:
                pass
        reply = await self.neighbour.request(self.mesh.key, "/echo", data, deadline_s=10, max_reply_bytes=8)
        assert reply == data
        assert self.mesh.is_connected(self.neighbour.key)

    async def attacker(self) -> Connection:
        return await self.lab.attacker(self.mesh)


@pytest.fixture
async def victim(lab) -> Victim:
    mesh, neighbour = await lab.pair()

    async def echo(stream) -> None:
        await stream.send_frame(await stream.receive_frame())

    mesh.serve("/echo", echo, max_frame_bytes=1000)
    return Victim(lab, mesh, neighbour)


async def gone(connection: Connection) -> None:
    with trio.fail_after(10):
        await connection.event_closed.wait()


# -- below the handshake ----------------------------------------------------------------------------------------------


def _first_bytes() -> list[bytes]:
    rng = random.Random(1)
    multistream = b"\x13/multistream/1.0.0\n"
    return [
        b"",
        b"\x00",
        rng.randbytes(5000),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x05\xff\xfe\xfd\xfc\n",
        multistream,
        multistream + b"\x07/noise",
        multistream + b"\x07/noise\n",
        multistream + b"\x07/noise\n" + b"\xff\xff" + rng.randbytes(70000),
        multistream + b"\x07/noise\n" + b"\x00\x20" + rng.randbytes(32) + rng.randbytes(3000),
        multistream + b"\x07/noise\n" + b"\x00\x00" * 100,
        multistream + b"\x0b/plaintext\n" * 50,
    ]


@pytest.mark.parametrize("number", range(len(_first_bytes())))
async def test_garbage_instead_of_a_handshake(victim: Victim, number: int) -> None:
    host, port = victim.mesh._network.bound[0].host, victim.mesh._network.bound[0].port
    for _ in range(3):
        tcp = await trio.open_tcp_stream(host, port)
        with trio.fail_after(15):
            try:
                await tcp.send_all(_first_bytes()[number])
                await tcp.send_eof()
                while await tcp.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        await tcp.aclose()
    await victim.lives()
    await eventually(lambda: not victim.mesh._network.door.half_open)


async def test_half_open_connections_are_bounded_and_let_go(lab) -> None:
    mesh = await lab.mesh(handshakes=10, handshake_s=0.3)  # of them 5 for one address
    address = mesh._network.bound[0]
    idle = [await trio.open_tcp_stream(address.host, address.port) for _ in range(20)]
    await eventually(lambda: mesh.statistics().refused.get("handshakes", 0) >= 15)
    await eventually(lambda: mesh.statistics().refused.get("handshake", 0) == 5)
    other = await lab.mesh()
    other.keep_connected(mesh.key, mesh.addrs)
    with trio.fail_after(10):
        await mesh.wait_connected()
    for tcp in idle:
        await trio.aclose_forcefully(tcp)


async def test_hundreds_of_connections_in_a_life(lab) -> None:
    mesh = await lab.mesh()
    for _ in range(300):
        tcp = await trio.open_tcp_stream(mesh._network.bound[0].host, mesh._network.bound[0].port)
        await tcp.aclose()
    other = await lab.mesh()
    other.keep_connected(mesh.key, mesh.addrs)
    with trio.fail_after(10):
        await mesh.wait_connected()


async def test_connections_of_one_address_are_limited(lab) -> None:
    mesh = await lab.mesh(connections_per_address=2, private_factor=1)
    others = [await lab.mesh(target_peers=0) for _ in range(3)]
    for other in others:
        other.keep_connected(mesh.key, mesh.addrs)
    await eventually(lambda: mesh.statistics().refused.get("address", 0) >= 3)
    await eventually(lambda: mesh.statistics().connections == 2)


# -- below the streams ------------------------------------------------------------------------------------------------


def _yamux(version: int, kind: int, flags: int, stream: int, length: int) -> bytes:
    return struct.pack("!BBHII", version, kind, flags, stream, length)


_MUXER_GARBAGE = {
    "noise": random.Random(2).randbytes(2000),
    "version": _yamux(9, 0, 0, 1, 0),
    "type": _yamux(0, 7, 0, 1, 0),
    "window overrun": _yamux(0, 0, 1, 1001, 0) + _yamux(0, 0, 0, 1001, 300 * 1024) + bytes(300 * 1024),
    "huge frame": _yamux(0, 0, 1, 1001, 0xFFFFFFFF),
    "huge frame of an unknown stream": _yamux(0, 0, 0, 999, 0xFFFFFFFF),
    "our stream id": _yamux(0, 1, 1, 2, 0),
    "stream id 0": _yamux(0, 1, 1, 0, 0),
    "stream twice": _yamux(0, 1, 1, 1001, 0) * 2,
    "goodbye": _yamux(0, 3, 0, 0, 0),
}


@pytest.mark.parametrize("name", _MUXER_GARBAGE)
async def test_garbage_instead_of_yamux(victim: Victim, name: str) -> None:
    connection = await victim.attacker()
    connection.muxer.enqueue(_MUXER_GARBAGE[name])
    await gone(connection)
    await victim.lives()


async def test_ciphertext_that_does_not_authenticate(victim: Victim) -> None:
    connection = await victim.attacker()
    await connection.muxer._session._raw.write(b"\x00\x40" + bytes(64))
    await gone(connection)
    await victim.lives()


async def test_a_flood_of_streams_is_capped(victim: Victim) -> None:
    connection = await victim.attacker()
    for number in range(20_000):
        connection.muxer.enqueue(_yamux(0, 1, 1, 10_001 + 2 * number, 0))
    await victim.lives()
    theirs = victim.mesh._network.connection_to(connection.swarm.self_id.to_bytes()[6:])
    most = victim.mesh.config.limits.streams_per_connection + 5  # and ours
    assert theirs is None or theirs.muxer.stream_count <= most


async def test_pings_without_end_are_answered_or_end_the_connection(victim: Victim) -> None:
    connection = await victim.attacker()
    connection.muxer.enqueue(_yamux(0, 2, 1, 0, 7) * 50_000)
    await victim.lives()


async def test_a_peer_that_falls_silent_is_let_go(lab) -> None:
    mesh = await lab.mesh(keepalive_s=0.1)
    connection = await lab.attacker(mesh)
    connection.muxer._on_ping = lambda *_: None  # never answers; its own first ping comes later
    await gone(connection)
    await eventually(lambda: mesh.statistics().connections == 0)


# -- the negotiation of streams ---------------------------------------------------------------------------------------

_NEGOTIATIONS = {
    "not text": b"\x05\xff\xfe\xfd\xfc\n",
    "long line": b"\xff\x7f" + bytes(20000),
    "endless length": b"\xff" * 20,
    "empty line": b"\x00",
    "no newline": b"\x04abcd",
    "wrong header": b"\x06hello\n",
    "many protocols": b"\x13/multistream/1.0.0\n" + b"\x05/abc\n"[:6] * 100,
    "only the header": b"\x13/multistream/1.0.0\n",
    "random": random.Random(3).randbytes(3000),
}


@pytest.mark.parametrize("name", _NEGOTIATIONS)
async def test_garbage_instead_of_a_protocol_name(victim: Victim, name: str) -> None:
    connection = await victim.attacker()
    stream = connection.muxer.open_stream_nowait()
    await stream.write(_NEGOTIATIONS[name])
    await stream.close_write()
    with trio.fail_after(10):
        with contextlib.suppress(MuxedStreamError, MuxedStreamEOF):
            while True:
                await stream.read()
    await victim.lives()
    assert not connection.muxer.is_closed


@pytest.mark.parametrize("protocol", ["/kaisar/peers/2", "/echo", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"])
@pytest.mark.parametrize("seed", range(3))
async def test_garbage_on_every_request_stream(victim: Victim, protocol: str, seed: int) -> None:
    connection = await victim.attacker()
    for payload in (b"", b"\xff" * 4, b"\x00\x00\x00\x05ab", random.Random(seed).randbytes(5000)):
        stream = connection.muxer.open_stream_nowait()
        await stream.write(proposal(protocol) + payload)
        await stream.close_write()
    await victim.lives()


# -- gossip -----------------------------------------------------------------------------------------------------------


def _message(key: SigningKey, data: bytes = b"data", **changes: object) -> bytes:
    message = rpc_pb2.Message()
    message.ParseFromString(wire.sign(key, TOPIC, data, random.getrandbits(60)).raw)
    for name, value in changes.items():
        message.ClearField(name)
        if name == "topicIDs":
            message.topicIDs.extend(value)
        else:
            setattr(message, name, value)
    return wire.publish_frame(message.SerializeToString())


def _bad_frames() -> dict[str, bytes]:
    key, other = SigningKey.generate(), SigningKey.generate()
    rng = random.Random(4)
    return {
        "random": rng.randbytes(3000),
        "random rpc": wire.frame(rng.randbytes(300)),
        "endless length": b"\xff" * 30,
        "announced gigabyte": b"\xff\xff\xff\xff\x07" + bytes(1000),
        "no signature": _message(key, signature=b""),
        "wrong signature": _message(key, signature=bytes(64)),
        "short signature": _message(key, signature=bytes(10)),
        "changed data": _message(key, data=b"a" * 9, **{"seqno": b"12345678"}),
        "somebody else's name": _message(key, from_id=id_bytes_of(bytes(other.verify_key))),
        "bad author": _message(key, from_id=b"\x12\x20" + bytes(32)),
        "no author": _message(key, from_id=b""),
        "not a curve point": _message(key, from_id=id_bytes_of(b"\xff" * 32)),
        "long sequence number": _message(key, seqno=bytes(9)),
        "no topic": _message(key, topicIDs=[]),
        "two topics": _message(key, topicIDs=[TOPIC, TOPIC]),
        "too large": wire.publish_frame(wire.sign(key, TOPIC, bytes(300 * 1024), 1).raw),
    }


async def gossip_stream(connection: Connection):
    stream = connection.muxer.open_stream_nowait()
    await stream.write(proposal(GOSSIP))
    await confirm(stream, GOSSIP)
    return stream


@pytest.mark.parametrize("name", _bad_frames())
async def test_malformed_gossip_costs_the_connection(victim: Victim, name: str) -> None:
    connection = await victim.attacker()
    stream = await gossip_stream(connection)
    await stream.write(_bad_frames()[name])
    await gone(connection)
    await victim.lives()
    assert victim.received.statistics().current_buffer_used == 0


async def test_truncated_gossip_is_dropped(victim: Victim) -> None:
    connection = await victim.attacker()
    stream = await gossip_stream(connection)
    await stream.write(_message(SigningKey.generate())[:-10])
    await stream.close_write()
    await victim.lives()


async def test_somebody_elses_valid_message_is_accepted_once(victim: Victim) -> None:
    connection = await victim.attacker()
    stream = await gossip_stream(connection)
    author = SigningKey.generate()
    await stream.write(_message(author) * 5)
    with trio.fail_after(5):
        message = await victim.received.receive()
    assert message.author == bytes(author.verify_key)
    await victim.lives()


async def test_strange_but_harmless_gossip(victim: Victim) -> None:
    """Floods of subscriptions and control for topics that nobody knows change nothing."""
    connection = await victim.attacker()
    stream = await gossip_stream(connection)
    rpc = rpc_pb2.RPC()
    for number in range(200):
        rpc.subscriptions.add(subscribe=True, topicid=f"topic {number}")
    for number in range(300):
        rpc.control.graft.add(topicID=f"topic {number}")
        rpc.control.prune.add(topicID=f"topic {number}", backoff=2**60)
        rpc.control.ihave.add(topicID=TOPIC, messageIDs=[os.urandom(40) for _ in range(20)])
        rpc.control.iwant.add(messageIDs=[os.urandom(40) for _ in range(20)])
    await stream.write(wire.frame(rpc.SerializeToString()))
    await victim.lives()
    state = victim.mesh._gossip._router._peers[connection.swarm.self_id.to_bytes()[6:]]
    assert len(state.topics) <= 64
    assert state.asked <= 500


async def test_a_message_that_claims_to_be_ours_is_not_echoed_back_to_us(victim: Victim) -> None:
    await victim.mesh.publish("advert", b"mine")
    frame = wire.frame(next(iter(victim.mesh._gossip._router.cache._entries.values()))[1])
    victim.mesh._gossip._seen._new.clear()
    connection = await victim.attacker()
    stream = await gossip_stream(connection)
    await stream.write(frame)
    await victim.lives()


async def test_a_peer_that_does_not_read_its_gossip_is_bounded(lab) -> None:
    mesh = await lab.mesh(outbound_frames=50, send_stall_s=0.5)
    mesh.subscribe("advert", accept)
    connection = await lab.attacker(mesh)
    rpc = rpc_pb2.RPC()
    rpc.subscriptions.add(subscribe=True, topicid=TOPIC)
    stream = await gossip_stream(connection)

    async def never_reads(_connection, inbound) -> None:
        await trio.sleep_forever()

    connection.swarm.handlers[GOSSIP] = never_reads
    await stream.write(wire.frame(rpc.SerializeToString()))
    await eventually(lambda: len(mesh.subscribers("advert")) == 1)
    for _ in range(300):
        await mesh.publish("advert", os.urandom(50_000))
    link = next(iter(mesh._gossip._outbox.links.values()))
    assert sum(map(len, link._messages)) <= 50
    assert mesh.statistics().dropped_frames > 0
    await gone(connection)
