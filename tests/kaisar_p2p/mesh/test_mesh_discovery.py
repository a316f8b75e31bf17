from __future__ import annotations

import logging
import os

import trio

from kaisar_p2p.mesh import Mesh
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.wire.verdict import Verdict


def accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


async def eventually(condition, within_s: float = 20.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.01)


async def echo(stream: MeshStream) -> None:
    await stream.send_frame(await stream.receive_frame())


async def swarm(lab, count: int) -> list[Mesh]:
    """`count` meshes that know only the first."""
    meshes = [await lab.mesh(target_peers=6) for _ in range(count)]
    for mesh in meshes:
        mesh.serve("/echo", echo, max_frame_bytes=100)
        mesh.keep_connected(meshes[0].key, meshes[0].addrs)
    return meshes


async def test_a_swarm_grows_from_one_bootstrap_and_outlives_it(lab) -> None:
    meshes = await swarm(lab, 12)
    channels = [mesh.subscribe("advert", accept) for mesh in meshes]
    await eventually(lambda: all(len(mesh.peers()) >= 6 for mesh in meshes))
    await lab.stop(meshes[0])
    rest, channels = meshes[1:], channels[1:]
    await eventually(lambda: not any(mesh.is_connected(meshes[0].key) for mesh in rest))
    await rest[0].publish("advert", b"still here")
    for channel in channels[1:]:
        with trio.fail_after(10):
            assert (await channel.receive()).data == b"still here"


async def test_any_peer_can_be_asked_by_key(lab) -> None:
    """Each of the two is connected with the hub only; the hub tells where the other is."""
    hub, a, b = [await lab.mesh(target_peers=0, exchange_s=1000.0) for _ in range(3)]
    b.serve("/echo", echo, max_frame_bytes=100)
    a.keep_connected(hub.key, hub.addrs)
    with trio.fail_after(10):
        await a.wait_connected()
    b.keep_connected(hub.key, hub.addrs)
    with trio.fail_after(10):
        await hub.wait_connected(2)
    await eventually(lambda: hub._book.of(b.key) != ())
    assert not a.is_connected(b.key)
    assert await a.request(b.key, "/echo", b"hi", deadline_s=10, max_reply_bytes=100) == b"hi"


async def test_a_bootstrap_that_comes_back_is_redialed(lab) -> None:
    seed = os.urandom(32)
    bootstrap, node = await lab.mesh(seed), await lab.mesh()
    port = int(bootstrap.addrs[0].split("/")[4])
    node.keep_connected(bootstrap.key, bootstrap.addrs)
    with trio.fail_after(10):
        await node.wait_connected()
    await lab.stop(bootstrap)
    with trio.fail_after(10):
        await node.wait_until(lambda: not node.is_connected(bootstrap.key))
    await lab.mesh(seed, port=port)
    with trio.fail_after(20):
        await node.wait_connected()


async def test_a_bootstrap_that_is_not_there_yet(lab) -> None:
    seed = os.urandom(32)
    bootstrap = await lab.mesh(seed)
    key, addrs, port = bootstrap.key, bootstrap.addrs, int(bootstrap.addrs[0].split("/")[4])
    await lab.stop(bootstrap)
    node = await lab.mesh()
    node.keep_connected(key, addrs)
    await eventually(lambda: node._network._dialing == {})
    await lab.mesh(seed, port=port)
    with trio.fail_after(20):
        await node.wait_connected()


async def test_two_that_dial_each_other_settle_on_one_connection(lab) -> None:
    for _ in range(5):
        a, b = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
        a.subscribe("advert", accept)
        at_b = b.subscribe("advert", accept)
        a.add_addresses(b.key, b.addrs)
        b.add_addresses(a.key, a.addrs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a._discovery.connect, b.key)
            nursery.start_soon(b._discovery.connect, a.key)
        await eventually(lambda a=a, b=b: a.statistics().connections == b.statistics().connections == 1)
        await eventually(lambda a=a, b=b: b.key in a.subscribers("advert"))
        await a.publish("advert", b"x")
        with trio.fail_after(10):
            assert (await at_b.receive()).data == b"x"


async def test_however_many_dials_meet_one_connection_stays_from_the_first_to_the_last(lab) -> None:
    for round_of in range(4):
        a, b = [await lab.mesh(target_peers=0, connections_per_key=8) for _ in range(2)]
        gone: list[int] = []
        for mesh in (a, b):
            whole = mesh._network.on_disconnected

            def on_disconnected(connection, mesh=mesh, whole=whole, gone=gone) -> None:
                whole(connection)
                gone.append(mesh._network.connection_count)

            mesh._network.on_disconnected = on_disconnected
        async with trio.open_nursery() as nursery:
            for dialer, dialed, times in ((a, b, 3), (b, a, round_of)):
                for _ in range(times):
                    nursery.start_soon(dialer._network.dial_direct, dialed.key, dialed._network.bound)
        await eventually(lambda a=a, b=b: a.statistics().connections == b.statistics().connections == 1)
        assert 0 not in gone


async def test_what_is_said_on_a_retired_connection_retires_no_other(lab) -> None:
    a, b = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
    first = await a._network.dial_direct(b.key, b._network.bound)
    second = await a._network.dial_direct(b.key, b._network.bound)
    await eventually(lambda: first.retired)
    for mesh, peer in ((a, b), (b, a)):
        for connection in mesh._network.connections_with(peer.key):
            assert not [each for each in mesh._discovery._settling.surplus_with(connection) if each is second]
    assert not second.retired


async def test_two_nodes_with_one_key_are_told_apart_and_named(lab, caplog) -> None:
    hub, other = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
    at_hub = hub.subscribe("advert", accept)
    other.subscribe("advert", accept)
    other.keep_connected(hub.key, hub.addrs)
    seed = os.urandom(32)
    twins = [await lab.mesh(seed, target_peers=0) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for twin in twins:
            twin.keep_connected(hub.key, hub.addrs)
            with trio.fail_after(10):
                await twin.wait_connected()
        await eventually(lambda: "two running nodes use the machine key" in caplog.text)
    assert twins[0].key.hex() in caplog.text
    await eventually(lambda: hub.key in other.subscribers("advert"))
    await other.publish("advert", b"x")
    with trio.fail_after(10):
        assert (await at_hub.receive()).data == b"x"
    assert hub.is_connected(twins[0].key)


async def test_a_restart_is_not_mistaken_for_a_twin(lab, caplog) -> None:
    seed = os.urandom(32)
    hub = await lab.mesh()
    for _ in range(3):
        node = await lab.mesh(seed)
        node.keep_connected(hub.key, hub.addrs)
        with trio.fail_after(10):
            await node.wait_connected()
        await lab.stop(node)
        await eventually(lambda node=node: not hub.is_connected(node.key))
    assert "two running nodes" not in caplog.text


async def test_peers_are_described(lab) -> None:
    a, b = await lab.pair()
    (peer,) = a.peers()
    assert peer.key == b.key
    assert peer.inbound
    assert peer.score == 0
    await eventually(lambda: a.peers()[0].addresses == tuple(address.split("/p2p/")[0] for address in b.addrs))
    await eventually(lambda: a.peers()[0].rtt_s is not None)
    assert not b.peers()[0].inbound


async def test_requests_survive_settling_on_one_connection(lab) -> None:
    for _ in range(5):
        a, b = await lab.mesh(target_peers=0), await lab.mesh(target_peers=0)
        for mesh in (a, b):
            mesh.serve("/echo", echo, max_frame_bytes=100, rate_per_s=1000)
        a.add_addresses(b.key, b.addrs)
        b.add_addresses(a.key, a.addrs)

        async def ask(asker: Mesh, asked: Mesh) -> None:
            for number in range(20):
                data = b"%d" % number
                assert await asker.request(asked.key, "/echo", data, deadline_s=10, max_reply_bytes=100) == data

        async with trio.open_nursery() as nursery:
            for asker, asked in ((a, b), (b, a)):
                nursery.start_soon(ask, asker, asked)
