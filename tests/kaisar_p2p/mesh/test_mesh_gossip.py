from __future__ import annotations

import itertools
import os
import threading
import time

import pytest
import trio
import trio.testing

from kaisar_p2p.errors import LimitExceeded
from kaisar_p2p.mesh import GossipMessage, Mesh
from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.wire.verdict import Verdict


def accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


async def eventually(condition, within_s: float = 15.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


async def line(lab, count: int, topic: str = "advert") -> tuple[list[Mesh], list[trio.MemoryReceiveChannel]]:
    """Meshes that know only their neighbour, all subscribed."""
    meshes = [await lab.mesh(target_peers=0) for _ in range(count)]
    channels = [mesh.subscribe(topic, accept) for mesh in meshes]
    for left, right in itertools.pairwise(meshes):
        right.keep_connected(left.key, left.addrs)
    for left, right in itertools.pairwise(meshes):
        await eventually(lambda left=left, right=right: right.key in left.subscribers(topic))
        await eventually(lambda left=left, right=right: left.key in right.subscribers(topic))
    return meshes, channels


async def receive(channel: trio.MemoryReceiveChannel, within_s: float = 10.0) -> GossipMessage:
    with trio.fail_after(within_s):
        return await channel.receive()


async def test_a_message_reaches_everybody_once(lab) -> None:
    meshes, channels = await line(lab, 5)
    await meshes[0].publish("advert", b"hello")
    for previous, channel in zip(meshes, channels[1:], strict=False):
        message = await receive(channel)
        assert (message.topic, message.data, message.author) == ("advert", b"hello", meshes[0].key)
        assert message.sender == previous.key
    assert all(channel.statistics().current_buffer_used == 0 for channel in channels)  # not echoed, not repeated


async def test_every_message_arrives_in_a_full_mesh(lab) -> None:
    meshes = [await lab.mesh() for _ in range(6)]
    channels = [mesh.subscribe("advert", accept) for mesh in meshes]
    for mesh in meshes[1:]:
        mesh.keep_connected(meshes[0].key, meshes[0].addrs)
    await eventually(lambda: all(len(mesh.subscribers("advert")) == 5 for mesh in meshes))
    sent = set()
    for number in range(60):
        data = b"%d" % number
        sent.add(data)
        await meshes[number % 6].publish("advert", data)
    for mesh, channel in zip(meshes, channels, strict=True):
        own = {b"%d" % number for number in range(60) if meshes[number % 6] is mesh}
        got = [(await receive(channel)).data for _ in range(50)]
        assert sorted(got) == sorted(sent - own)


async def test_an_ignored_message_is_dropped_and_held_against_nobody(lab) -> None:
    a, b, c = [await lab.mesh(target_peers=0) for _ in range(3)]
    a.subscribe("advert", accept)
    b.subscribe("advert", lambda *_: (Verdict.IGNORE, "seen better"))
    at_c = c.subscribe("advert", accept)
    b.keep_connected(a.key, a.addrs)
    c.keep_connected(b.key, b.addrs)
    await eventually(lambda: b.key in a.subscribers("advert") and c.key in b.subscribers("advert"))
    for _ in range(30):
        await a.publish("advert", b"x")
    await eventually(lambda: b.statistics().messages.get(("advert", "ignore")) == 30)
    assert next(peer for peer in b.peers() if peer.key == a.key).score == 0
    assert at_c.statistics().current_buffer_used == 0


async def test_rejected_messages_cost_the_sender_its_connection(lab) -> None:
    a, b = await lab.pair()
    a.subscribe("advert", accept)
    b.subscribe("advert", lambda *_: (Verdict.REJECT, "nonsense"))
    await eventually(lambda: b.key in a.subscribers("advert"))
    await a.publish("advert", b"x")
    await eventually(lambda: b.statistics().messages.get(("advert", "reject")) == 1)
    assert b.is_connected(a.key)  # once may be a mistake
    assert b.peers()[0].score < 0
    for _ in range(10):
        await a.publish("advert", b"x")
    await eventually(lambda: not b.is_connected(a.key))
    redialed = trio.current_time() + 1
    await eventually(lambda: trio.current_time() > redialed)
    assert not b.is_connected(a.key)  # and is refused for a while


async def test_a_validator_that_raises_is_our_bug(lab, caplog) -> None:
    a, b = await lab.pair()

    def broken(*_: object) -> tuple[Verdict, str]:
        raise ZeroDivisionError("bug")

    a.subscribe("advert", accept)
    b.subscribe("advert", broken)
    await eventually(lambda: b.key in a.subscribers("advert"))
    for _ in range(20):
        await a.publish("advert", b"x")
    await eventually(lambda: b.statistics().messages.get(("advert", "ignore")) == 20)
    assert b.peers()[0].score == 0
    assert "validator of topic advert failed" in caplog.text


async def test_a_heavy_validator_runs_in_a_thread_and_sees_what_a_light_one_sees(lab) -> None:
    a, b = await lab.pair()
    seen: list[tuple[str, tuple]] = []

    def validate(*arguments: object) -> tuple[Verdict, str]:
        seen.append((threading.current_thread().name, arguments))
        return Verdict.ACCEPT, ""

    a.subscribe("light", accept)
    a.subscribe("heavy", accept)
    light, heavy = b.subscribe("light", validate), b.subscribe("heavy", validate, heavy=True)
    await eventually(lambda: b.key in a.subscribers("light") and b.key in a.subscribers("heavy"))
    await a.publish("light", b"1")
    await a.publish("heavy", b"2")
    await receive(light)
    await receive(heavy)
    (light_thread, light_arguments), (heavy_thread, heavy_arguments) = seen
    assert light_thread == threading.main_thread().name != heavy_thread
    assert light_arguments[:3] == (b"1", a.key, a.key)
    assert heavy_arguments[:3] == (b"2", a.key, a.key)
    assert isinstance(heavy_arguments[3], float)


async def test_a_message_is_judged_by_when_it_arrived_not_by_when_we_got_round_to_it(lab) -> None:
    a, b = await lab.pair()
    busy, judged = threading.Event(), []

    def validate(data: bytes, _sender: bytes, _author: bytes, received_at: float) -> tuple[Verdict, str]:
        judged.append((received_at, time.time()))
        busy.wait(10)
        return Verdict.ACCEPT, ""

    a.subscribe("heavy", accept)
    channel = b.subscribe("heavy", validate, heavy=True)
    await eventually(lambda: b.key in a.subscribers("heavy"))
    await a.publish("heavy", b"first")
    await eventually(lambda: len(judged) == 1)
    await a.publish("heavy", b"second")
    await eventually(lambda: len(b._gossip._intake.pending) == 2)
    arrived = trio.current_time()
    await eventually(lambda: trio.current_time() > arrived + 0.3)
    busy.set()
    await receive(channel)
    await receive(channel)
    received_at, judged_at = judged[1]
    assert judged_at - received_at >= 0.3


async def test_a_slow_consumer_loses_the_oldest_and_holds_up_nobody(lab) -> None:
    a, b = await lab.pair()
    a.subscribe("advert", accept)
    slow = b.subscribe("advert", accept, queue=10)
    await eventually(lambda: b.key in a.subscribers("advert"))
    for number in range(100):
        await a.publish("advert", b"%d" % number)
    await eventually(lambda: b.statistics().messages.get(("advert", "accept")) == 100)
    assert [(await receive(slow)).data for _ in range(10)] == [b"%d" % number for number in range(90, 100)]
    assert b.statistics().dropped == {"advert": 90}


async def test_a_message_over_the_limit_is_refused_where_it_is_made(lab) -> None:
    a = await lab.mesh(message_bytes=1000)
    with pytest.raises(LimitExceeded):
        await a.publish("advert", bytes(1001))


async def test_large_messages_travel(lab) -> None:
    meshes, channels = await line(lab, 3)
    data = os.urandom(256 * 1024)
    await meshes[0].publish("advert", data)
    assert (await receive(channels[2])).data == data


async def test_two_subscribers_of_a_topic_are_a_mistake(lab) -> None:
    a = await lab.mesh()
    a.subscribe("advert", accept)
    with pytest.raises(ValueError, match="advert"):
        a.subscribe("advert", accept)


async def test_a_late_subscriber_gets_what_comes_after(lab) -> None:
    a, b = await lab.pair()
    a.subscribe("advert", accept)
    late = b.subscribe("advert", accept)
    await eventually(lambda: b.key in a.subscribers("advert"))
    await a.publish("advert", b"after")
    assert (await receive(late)).data == b"after"


async def test_a_restarted_node_is_heard_at_once(lab) -> None:
    seed = os.urandom(32)
    hub = await lab.mesh()
    at_hub = hub.subscribe("advert", accept)
    for start in range(4):
        node = await lab.mesh(seed)
        node.subscribe("advert", accept)
        node.keep_connected(hub.key, hub.addrs)
        await eventually(lambda node=node: hub.key in node.subscribers("advert"))
        for number in range(10):
            await node.publish("advert", b"%d %d" % (start, number))
        got = [(await receive(at_hub)).data for _ in range(10)]
        assert got == [b"%d %d" % (start, number) for number in range(10)]
        await lab.stop(node)


async def test_gossip_survives_many_quick_reconnects(lab) -> None:
    hub, node = await lab.pair()
    at_node = node.subscribe("advert", accept)
    hub.subscribe("advert", accept)
    for round_number in range(25):
        await eventually(lambda: node.key in hub.subscribers("advert"))
        await hub.publish("advert", b"%d" % round_number)
        assert (await receive(at_node)).data == b"%d" % round_number
        connection = hub._network.connection_to(node.key)
        connection.muxer.abort()
        node._discovery._attempts.clear()
        await eventually(lambda old=connection: hub._network.connection_to(node.key) is not old)
        if not hub.is_connected(node.key):  # do not wait for the backoff
            await node._discovery.connect(hub.key)
    assert hub.statistics().connections <= 1


async def test_a_reset_gossip_stream_is_opened_again(lab) -> None:
    a, b = await lab.pair()
    a.subscribe("advert", accept)
    at_b = b.subscribe("advert", accept)
    await eventually(lambda: b.key in a.subscribers("advert") and a.key in b.subscribers("advert"))
    for round_number in range(3):
        for mesh in (a, b):
            for connection in mesh._network._open[b.key if mesh is a else a.key]:
                for stream in list(connection.muxer._streams.values()):
                    stream.reset_nowait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await eventually(lambda: a._gossip._outbox.links[b.key].sending is not None)
        await a.publish("advert", b"%d" % round_number)
        assert (await receive(at_b)).data == b"%d" % round_number


async def test_a_duplicate_is_judged_once(lab) -> None:
    a, b = await lab.pair()
    judged = 0

    def validate(*_: object) -> tuple[Verdict, str]:
        nonlocal judged
        judged += 1
        return Verdict.ACCEPT, ""

    a.subscribe("advert", accept)
    at_b = b.subscribe("advert", validate)
    await eventually(lambda: b.key in a.subscribers("advert"))
    await a.publish("advert", b"once")
    await receive(at_b)
    (_, entry) = next(iter(a._gossip._router.cache._entries.values()))
    for _ in range(50):
        a._gossip._outbox.links[b.key].push_control(wire.frame(entry))
    a._gossip._outbox.links[b.key].flush()
    await eventually(lambda: b.statistics().messages.get(("", "duplicate"), 0) >= 50)
    assert judged == 1
    assert b.peers()[0].score == 0


async def test_a_flooding_peer_is_read_slowly_and_others_are_not(lab) -> None:
    victim = await lab.mesh(messages_per_s=10.0, messages_burst=20)
    flooder, honest = await lab.mesh(), await lab.mesh()
    at_victim = victim.subscribe("advert", accept, queue=1000)
    for mesh in (flooder, honest):
        mesh.subscribe("advert", accept)
        mesh.keep_connected(victim.key, victim.addrs)
        await eventually(lambda mesh=mesh: victim.key in mesh.subscribers("advert"))
    for number in range(400):
        await flooder.publish("advert", b"flood %d" % number)
    await honest.publish("advert", b"honest")
    while (await receive(at_victim)).sender != honest.key:
        pass
    assert victim.statistics().messages[("advert", "accept")] < 400
