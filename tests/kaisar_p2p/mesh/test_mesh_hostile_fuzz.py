"""Whatever arrives on the streams of any protocol, nothing reaches the mesh's nursery and others are served."""

from __future__ import annotations

import contextlib
import os
import random

import trio

from kaisar_p2p.mesh import Mesh
from kaisar_p2p.mesh.connection import Connection, StreamHandler
from kaisar_p2p.mesh.discovery.exchange import PeersQuestion
from kaisar_p2p.mesh.discovery.records import network_id
from kaisar_p2p.mesh.guard.conflicts import KeyInUse
from kaisar_p2p.mesh.ids import id_bytes_of
from kaisar_p2p.mesh.reach.circuit_wire import HopMessage, Limit, PunchMessage, Reservation, StopMessage, framed
from kaisar_p2p.mesh.reach.dialback import Question
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream
from kaisar_p2p.wire.codec import encode

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError  # isort: skip

KEY = os.urandom(32)


def _with_length(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _sensible(rng: random.Random) -> bytes:
    """A message of any of the protocols, perhaps on the stream of another."""
    limit, peer = Limit(rng.getrandbits(31), rng.getrandbits(62)), rng.choice([None, b"", KEY, id_bytes_of(KEY)])
    terms = Reservation(rng.getrandbits(63), (rng.randbytes(9),), rng.randbytes(40))
    return rng.choice(
        [
            framed(HopMessage(rng.randrange(5), peer, terms, limit, rng.getrandbits(20))),
            framed(HopMessage(rng.randrange(3), peer)),
            framed(StopMessage(rng.randrange(3), peer, limit, rng.getrandbits(40))),
            framed(PunchMessage(rng.choice([0, 100, 300]), (rng.randbytes(8), b"\x04\x7f\x00\x00\x01\x06\x00\x16"))),
            _with_length(encode(KeyInUse(rng.randbytes(8), "\x1b[2J" * 9))),
            _with_length(encode(Question(rng.getrandbits(64), (0, 22, 65535), (bytes(16),) * 2))),
            _with_length(
                encode(
                    PeersQuestion(rng.randbytes(8), network_id("test"), rng.randbytes(99), (KEY,), rng.randrange(256))
                )
            ),
            rng.randbytes(rng.randrange(200)),
        ]
    )


def _damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(3)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.2 else changed)


async def _attack(connection: Connection, protocol: str, data: bytes, rng: random.Random) -> None:
    with contextlib.suppress(MuxedStreamError, MuxedConnUnavailable), trio.move_on_after(0.2):
        stream = connection.muxer.open_stream_nowait()
        await stream.write(proposal(protocol) + data)
        if rng.random() < 0.5:
            await stream.close_write()
        else:
            await stream.read(1000)
        stream.reset_nowait()


def _noting(served: set[str], name: str, handler: StreamHandler) -> StreamHandler:
    async def handle(connection: Connection, stream: MuxedStream) -> None:
        served.add(name)
        await handler(connection, stream)

    return handle


async def test_no_stream_of_any_protocol_ends_a_mesh(lab) -> None:
    victim: Mesh = await lab.mesh(opens_per_s=10_000.0, opens_burst=10_000)
    victim._relaying.server.start()
    friend: Mesh = await lab.mesh(target_peers=0)
    friend.keep_connected(victim.key, victim.addrs)
    with trio.fail_after(10):
        await friend.wait_connected()
    rng = random.Random(7)
    protocols = sorted(name for name in victim._network.handlers if "meshsub" not in name)
    victim._network.on_offence = lambda _connection, _error: None  # else the first byte ends the attack
    served: set[str] = set()
    handlers = victim._network.handlers
    for name in protocols:
        handlers[name] = _noting(served, name, handlers[name])
    with trio.fail_after(60):
        for _ in range(12):
            attacker = await lab.attacker(victim)
            async with trio.open_nursery() as streams:
                for protocol in protocols * 4:
                    data = b"".join(_damaged(_sensible(rng), rng) for _ in range(rng.randrange(1, 3)))
                    streams.start_soon(_attack, attacker, protocol, data, rng)
            await attacker.close()
    assert victim.is_connected(friend.key)
    assert victim._network.open_streams <= 2
    assert not victim._failed_handlers
    assert served == set(protocols)
