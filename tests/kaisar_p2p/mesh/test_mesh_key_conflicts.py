"""One machine key in two processes: said on all three sides, and nobody throws anybody out."""

from __future__ import annotations

import logging
import os

import pytest
import trio

from kaisar_p2p.mesh import Mesh
from kaisar_p2p.mesh.guard.conflicts import PROTOCOL, KeyInUse
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.wire.codec import encode

from libp2p.stream_muxer.exceptions import MuxedStreamEOF  # isort: skip


async def eventually(condition, within_s: float = 15.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


async def twins_at(lab, hub: Mesh) -> list[Mesh]:
    seed = os.urandom(32)
    twins = [await lab.mesh(seed, target_peers=0) for _ in range(2)]
    for twin in twins:
        twin.keep_connected(hub.key, hub.addrs)
        with trio.fail_after(10):
            await twin.wait_connected()
    return twins


async def test_both_processes_learn_that_their_key_is_in_use_elsewhere(lab, caplog) -> None:
    hub = await lab.mesh(target_peers=0, keepalive_s=0.2)
    twins = await twins_at(lab, hub)
    await eventually(lambda: all(twin.report().key_conflict_proven for twin in twins))  # by each other's records
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("data directory with a key of its own" in record.getMessage() for record in errors)
    assert hub.key_conflict() is None
    assert "signed with the key" in twins[0].key_conflict()


async def test_both_connections_stay_and_no_more_are_made(lab) -> None:
    hub = await lab.mesh(target_peers=0, keepalive_s=0.2)
    twins = await twins_at(lab, hub)
    await eventually(lambda: all(twin.key_conflict() is not None for twin in twins))
    connections = hub._network.connections_with(twins[0].key)
    assert len(connections) == 2
    with trio.move_on_after(1.5):  # several keepalives and heartbeats: nothing flaps
        await hub.wait_until(lambda: hub.statistics().connections != 2)
    assert hub._network.connections_with(twins[0].key) == connections
    assert not hub.statistics().pruned


async def test_a_process_that_is_gone_without_a_word_is_no_conflict(lab, caplog, nursery) -> None:
    """After a crash, the old connection looks alive until its pings fail."""
    hub = await lab.mesh(target_peers=0, keepalive_s=0.3)
    seed = os.urandom(32)
    old = Network(key_pair_of(seed), MeshLimits())
    old.run_in(nursery)
    dead = await old.dial(hub.key, hub._own_addresses())
    dead.muxer._outbox.pong = lambda _frame: None  # it hangs
    new = await lab.mesh(seed, target_peers=0)
    await eventually(lambda: hub.is_connected(new.key))
    hub._network.connections_with(new.key)[0].instance = os.urandom(8)
    new.keep_connected(hub.key, hub.addrs)
    with trio.fail_after(10):
        await new.wait_connected()
        await dead.event_closed.wait()
    await hub.wait_until(lambda: len(hub._network.connections_with(new.key)) == 1)
    assert "two running nodes" not in caplog.text


async def test_whoever_dials_us_with_our_own_key_is_another_process(lab, caplog, nursery) -> None:
    seed = os.urandom(32)
    mesh = await lab.mesh(seed)
    twin = Network(key_pair_of(seed), MeshLimits())
    twin.run_in(nursery)
    with pytest.raises(Exception, match=r"."):
        await twin._dial_address(mesh.key, mesh._own_addresses()[0])
    await eventually(lambda: mesh.key_conflict() is not None)
    assert mesh.report().key_conflict_proven
    assert "another process uses this node's machine key" in caplog.text


async def test_lies_about_our_key_are_logged_once(lab, caplog) -> None:
    mesh = await lab.mesh()
    for number in range(5):
        connection = await lab.attacker(mesh)
        for _ in range(5):
            notice = encode(KeyInUse(os.urandom(8), f"192.0.2.{number}"))
            stream = connection.muxer.open_stream_nowait()
            await stream.write(proposal_of(notice))
            await stream.close_write()
    await eventually(lambda: mesh.key_conflict() is not None)
    assert not mesh.report().key_conflict_proven
    assert "claims" in mesh.key_conflict()
    told = [record for record in caplog.records if "claims" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]


async def test_peers_of_two_networks_are_believed(lab, monkeypatch) -> None:
    mesh = await lab.mesh(target_peers=0)
    for host in ("8.8.8.8", "8.8.1.1", "9.9.9.9"):
        connection = await lab.attacker(mesh)
        assert not mesh.report().key_conflict_proven
        ours = mesh._network.open_connections()[-1]
        monkeypatch.setattr(ours.muxer, "get_remote_address", lambda host=host: (host, 1))
        stream = connection.muxer.open_stream_nowait()
        await stream.write(proposal_of(encode(KeyInUse(os.urandom(8), "192.0.2.1"))))
        await stream.close_write()
        with trio.fail_after(10), pytest.raises(MuxedStreamEOF):
            while True:
                await stream.read()
    assert mesh.report().key_conflict_proven


def proposal_of(notice: bytes) -> bytes:
    return proposal(PROTOCOL) + len(notice).to_bytes(4, "big") + notice
