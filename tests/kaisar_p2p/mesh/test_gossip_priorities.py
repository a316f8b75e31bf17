"""Floods: what is important is never late, nobody is blamed for our backlog, nothing disappears uncounted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2
from nacl.signing import SigningKey

from kaisar_p2p.mesh import GossipMessage, Mesh
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.gossip import router as gossip_router
from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.gossip.pubsub import PROTOCOL
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.wire.verdict import Verdict

ADVERT = "/kaisar/test/advert/1"


def accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


async def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


async def receive(channel: trio.MemoryReceiveChannel) -> GossipMessage:
    with trio.fail_after(20):
        return await channel.receive()


def score_of(mesh: Mesh, key: bytes) -> float:
    return next(peer.score for peer in mesh.peers() if peer.key == key)


def key_of(connection: Connection) -> bytes:
    return bytes(connection.swarm.self_id.to_bytes()[6:])


async def gossip_stream(connection: Connection):
    stream = connection.muxer.open_stream_nowait()
    await stream.write(proposal(PROTOCOL))
    await confirm(stream, PROTOCOL)
    return stream


def slow(data: bytes, *_rest: object) -> tuple[Verdict, str]:
    until = time.perf_counter() + 0.001
    while time.perf_counter() < until:
        pass
    return Verdict.ACCEPT, ""


async def test_a_flood_of_adverts_delays_no_certificate_and_is_nobodys_fault(lab) -> None:
    victim = await lab.mesh(inbound_messages=200)
    certificates = victim.subscribe("certificate", accept, heavy=True, priority=0)
    victim.subscribe("advert", slow, priority=2)
    flooders = [await lab.attacker(victim) for _ in range(3)]
    honest = await lab.mesh(target_peers=0)
    honest.subscribe("certificate", accept, priority=0)
    honest.keep_connected(victim.key, victim.addrs)
    await eventually(lambda: victim.key in honest.subscribers("certificate"))
    for flooder in flooders:
        author, stream = SigningKey.generate(), await gossip_stream(flooder)
        await stream.write(b"".join(wire.publish_frame(wire.sign(author, ADVERT, b"x", n).raw) for n in range(1500)))
    await eventually(lambda: victim._gossip._intake.crowded)
    await honest.publish("certificate", b"money")
    assert (await receive(certificates)).data == b"money"
    judged = sum(count for (topic, _), count in victim.statistics().messages.items() if topic == "advert")
    assert judged < 3 * 1500 or victim.statistics().drops  # it did not wait for all of them
    await eventually(lambda: victim.statistics().drops.get(("inbound", "advert", 2), 0) > 0)
    assert not [drop for drop in victim.statistics().drops if drop[1] == "certificate"]
    assert all(score_of(victim, key_of(flooder)) == 0 for flooder in flooders)


async def test_a_flooder_of_what_is_costly_waits_behind_others(lab) -> None:
    victim, flooder, honest = await lab.mesh(), await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
    order: list[bytes] = []
    begun, go_on = threading.Event(), threading.Event()

    def validate(data: bytes, *_rest: object) -> tuple[Verdict, str]:
        begun.set()
        go_on.wait(20)
        order.append(data)
        return Verdict.IGNORE, ""

    victim.subscribe("lease", validate, heavy=True, priority=0)
    for mesh in (flooder, honest):
        mesh.subscribe("lease", accept)
        mesh.keep_connected(victim.key, victim.addrs)
        await eventually(lambda mesh=mesh: victim.key in mesh.subscribers("lease"))
    for number in range(200):
        await flooder.publish("lease", b"flood %d" % number)
    await eventually(lambda: len(victim._gossip._intake.pending) == 200)
    await honest.publish("lease", b"honest")
    await eventually(lambda: len(victim._gossip._intake.pending) == 201)
    assert begun.is_set()
    go_on.set()
    await eventually(lambda: len(order) == 201)
    assert order.index(b"honest") < 30


async def test_a_heavy_topic_that_is_stuck_holds_up_no_other_topic_of_the_same_peer(lab) -> None:
    a, b = await lab.pair()
    stuck = threading.Event()
    b.subscribe("lease", lambda *_: (stuck.wait(20), (Verdict.IGNORE, ""))[1], heavy=True)
    adverts = b.subscribe("advert", accept)
    for name in ("lease", "advert"):
        a.subscribe(name, accept)
        await eventually(lambda name=name: b.key in a.subscribers(name))
    for _ in range(20):
        await a.publish("lease", b"slow")
    await a.publish("advert", b"quick")
    assert (await receive(adverts)).data == b"quick"
    stuck.set()


async def test_a_subscriber_that_keeps_up_loses_nothing_in_a_burst(lab) -> None:
    a, b = await lab.pair()
    a.subscribe("advert", accept)
    channel = b.subscribe("advert", accept, queue=8)
    await eventually(lambda: b.key in a.subscribers("advert"))
    for number in range(400):
        a._gossip.publish("advert", b"%d" % number)
    for number in range(400):
        assert (await receive(channel)).data == b"%d" % number
    assert not b.statistics().dropped


async def test_an_old_message_of_an_author_is_a_replay(lab) -> None:
    victim = await lab.mesh()
    channel = victim.subscribe("advert", accept)
    author, stream = SigningKey.generate(), await gossip_stream(await lab.attacker(victim))
    now = time.time_ns()
    for age_s in (0, 200, 60):
        sequence = now - age_s * 10**9
        await stream.write(wire.publish_frame(wire.sign(author, ADVERT, b"%d" % age_s, sequence).raw))
    assert [(await receive(channel)).data for _ in range(2)] == [b"0", b"60"]
    assert victim.statistics().messages["", "replay"] == 1
    assert all(peer.score == 0 for peer in victim.peers())


async def test_an_altered_copy_does_not_stand_in_the_way_of_the_real_one(lab) -> None:
    victim = await lab.mesh()
    begun, go_on = threading.Event(), threading.Event()

    def validate(data: bytes, *_rest: object) -> tuple[Verdict, str]:
        begun.set()
        go_on.wait(20)
        return Verdict.ACCEPT, ""

    channel = victim.subscribe("advert", validate, heavy=True)
    author = SigningKey.generate()
    liar, honest = await lab.attacker(victim), await lab.attacker(victim)
    real = wire.sign(author, ADVERT, b"real", time.time_ns()).raw
    streams = [await gossip_stream(liar), await gossip_stream(honest)]
    for stream, raw in zip(streams, (real.replace(b"real", b"fake"), real), strict=True):
        await stream.write(wire.publish_frame(raw))
    await eventually(lambda: len(victim._gossip._intake.pending) == 2)
    go_on.set()
    assert (await receive(channel)).data == b"real"
    await eventually(lambda: not victim.is_connected(key_of(liar)))
    assert victim.is_connected(key_of(honest))


async def test_offers_that_are_not_kept_cost_points(lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip_router, "PROMISE_S", 0.2)
    victim = await lab.mesh()
    victim.subscribe("advert", accept)
    liar = await lab.attacker(victim)
    stream = await gossip_stream(liar)
    rpc = rpc_pb2.RPC()
    rpc.control.ihave.add(topicID=ADVERT, messageIDs=[b"x" * 46])
    await stream.write(wire.frame(rpc.SerializeToString()))
    await eventually(lambda: score_of(victim, key_of(liar)) < 0)
    assert score_of(victim, key_of(liar)) > -5
