"""Nothing that happens to a node, or that a peer does, may end its background tasks, or pile them up."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import psutil
import pytest
import trio
import trio.testing

from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, open_mesh
from kaisar_p2p.mesh.discovery.addresses import Address, local_addresses
from kaisar_p2p.mesh.discovery.rendezvous import Rendezvous
from kaisar_p2p.mesh.guard.conflicts import KeyConflicts
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach.dialback import FAILED, PROTOCOL, Answer, Question
from kaisar_p2p.mesh.reach.dialed_back import SECRET_BYTES
from kaisar_p2p.mesh.reach.holepunch import HolePunch
from kaisar_p2p.mesh.reach.igd import RouterRefused
from kaisar_p2p.mesh.reach.upnp import PortMapping
from kaisar_p2p.mesh.transport.yamux import Muxer
from kaisar_p2p.wire.codec import decode, encode
from tests.kaisar_p2p.mesh.conftest import FAST

from libp2p.network.exceptions import SwarmException  # isort: skip


def network() -> Network:
    return Network(key_pair_of(os.urandom(32)), MeshLimits())


def punch() -> HolePunch:
    """Of a mesh that does not run."""
    return Mesh(MeshConfig(listen=()), os.urandom(32))._relaying._punch


async def test_months_without_a_router_do_not_end_the_search_for_one(autojump_clock) -> None:
    asked, mapping = [0], PortMapping(lambda: (), random.Random(1))

    async def renew() -> None:
        asked[0] += 1
        raise RouterRefused("there is none")

    mapping._renew = renew  # type: ignore[method-assign]
    with trio.move_on_after(200 * 86_400):
        await mapping.run()
    assert asked[0] > 4000


async def test_interfaces_that_cannot_be_read_are_as_they_were(monkeypatch) -> None:
    wildcard = Address("ip4", "0.0.0.0", 4001)
    known = local_addresses([wildcard])

    def no_descriptor() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(psutil, "net_if_addrs", no_descriptor)
    assert local_addresses([wildcard]) == known


async def test_many_bootstraps_can_be_named_at_once() -> None:
    mesh = Mesh(MeshConfig(), os.urandom(32))
    for _ in range(3000):
        mesh.keep_connected(os.urandom(32), ())


async def test_a_peer_that_changes_its_instance_all_the_time_starts_one_inquiry(nursery) -> None:
    conflicts = KeyConflicts(network(), None, bytes(8))  # type: ignore[arg-type]
    nursery.start_soon(conflicts.run)
    before = trio.lowlevel.current_statistics().tasks_living
    one, other = (SimpleNamespace(key=b"k" * 32, event_closed=trio.Event()) for _ in range(2))
    for _ in range(200):
        conflicts.found(one, other)  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living <= before + 3
    one.event_closed.set()
    await trio.testing.wait_all_tasks_blocked()
    assert not conflicts._looking


async def test_a_connection_before_everything_runs_is_no_error() -> None:
    punch().on_connected(SimpleNamespace(relayed=False))  # type: ignore[arg-type]


async def test_who_listens_nowhere_punches_no_holes_into_itself() -> None:
    assert punch()._acceptable([Address("ip4", "127.0.0.1", 22)]) == []


async def test_being_full_is_not_held_against_who_comes(nursery) -> None:
    """Several honest nodes behind one address redial a node that has no place for them."""
    hub, dialer = network(), network()
    hub.limits = MeshLimits(connections_per_key=1)
    hub.pruner._limits = hub.limits
    blamed: list[object] = []
    hub.on_failed_handshake = blamed.append
    for each in (hub, dialer):
        each.run_in(nursery)
    await hub.listen_on(["/ip4/127.0.0.1/tcp/0"])
    key = bytes(hub.get_peer_id().to_bytes()[6:])
    with trio.fail_after(10):
        await dialer.dial_direct(key, hub.bound)
        second = await dialer.dial_direct(key, hub.bound)
        await second.event_closed.wait()
    assert hub.refused["key"] == 1
    assert not blamed
    hub.is_foreign = lambda _key: True
    with pytest.raises(SwarmException):
        await hub.add_conn(dialer.connections_with(key)[0].muxer, "inbound")
    assert not blamed


async def test_a_dial_back_finds_a_stranger_s_listener_and_leaves_from_a_fresh_port(nursery) -> None:
    """In a private swarm, what listens on the port may be no member: that is an answer, too."""

    async def talk(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-x\r\n" * 8)
        await stream.receive_some()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, talk, [listener])
    port = listener.socket.getsockname()[1]
    config = MeshConfig(pre_shared_key=b"k" * 32, limits=FAST)
    async with open_mesh(config, os.urandom(32)) as asker, open_mesh(config, os.urandom(32)) as helper:
        fresh: list[bool] = []
        dial = helper._network.open_raw

        async def open_raw(address: Address, *, fresh_port: bool = False) -> object:
            fresh.append(fresh_port)
            return await dial(address, fresh_port=fresh_port)

        asker.keep_connected(helper.key, helper.addrs)
        with trio.fail_after(10):
            await asker.wait_connected()
        helper._network.open_raw = open_raw  # type: ignore[method-assign]
        question = Question(0, (port,), (os.urandom(SECRET_BYTES),))
        raw = await asker.request(helper.key, PROTOCOL, encode(question), deadline_s=10, max_reply_bytes=1024)
        assert decode(Answer, raw).results == (FAILED,)
        assert all(fresh)


async def test_all_who_wait_for_the_last_stream_are_woken() -> None:
    """Else a connection that is retired and parted with at once stays until the patience of both is over."""
    muxer = Muxer(SimpleNamespace(is_initiator=True), b"peer", limits=MeshLimits())  # type: ignore[arg-type]
    muxer.event_started.set()
    stream = muxer.open_stream_nowait()
    with trio.fail_after(5):
        async with trio.open_nursery() as waiting:
            for _ in range(2):
                waiting.start_soon(muxer.wait_without_streams)
            await trio.testing.wait_all_tasks_blocked()
            stream.reset_nowait()


async def test_a_connection_that_somebody_uses_is_not_closed_after_a_question() -> None:
    """A search dials a peer too many; meanwhile a request to it shares the dial."""
    closed: list[bool] = []

    async def ask(*_question: object) -> None:
        return None

    for busy in (True, False):

        async def close(busy: bool = busy) -> None:
            closed.append(busy)

        connection = SimpleNamespace(busy=busy, close=close)

        async def dial(_key: bytes, found: object = connection) -> object:
            return found

        crowd = SimpleNamespace(
            get_peer_id=lambda: SimpleNamespace(to_bytes=lambda: bytes(38)),
            connection_to=lambda _key: None,
            connected_keys=lambda: [bytes(32)] * 9,
            limits=MeshLimits(target_peers=8),
        )
        dialer, exchange = SimpleNamespace(dial=dial), SimpleNamespace(ask=ask)
        rendezvous = Rendezvous(crowd, None, exchange, dialer, random.Random(1))  # type: ignore[arg-type]
        await rendezvous._ask_about(b"p" * 32, b"k" * 32, [])
    assert closed == [False]
