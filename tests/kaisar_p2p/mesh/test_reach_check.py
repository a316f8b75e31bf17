"""Being seen and being dialed back, over real meshes on loopback."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import pytest
import trio

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, open_mesh
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach.dialback import (
    DIALED,
    FAILED,
    PROTOCOL,
    REFUSED,
    Answer,
    DialBackServer,
    Question,
    hand_over,
)
from kaisar_p2p.mesh.reach.dialed_back import BACK_PROTOCOL, SECRET_BYTES
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.wire.codec import decode, encode

FAST = MeshLimits(heartbeat_s=0.1, keepalive_s=1.0, exchange_s=0.5)
SOON = {"reach_check_s": 0.2}
SECRET = bytes(SECRET_BYTES)


async def eventually(condition, within_s: float = 20.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.01)


async def meshes(lab, count: int) -> tuple[Mesh, list[Mesh]]:
    """A mesh, and `count` others that it has dialed."""
    others = [await lab.mesh(reach_check_s=1000.0) for _ in range(count)]
    mesh = await lab.mesh(**SOON, target_peers=0)
    for other in others:
        mesh.keep_connected(other.key, other.addrs)
    with trio.fail_after(10):
        await mesh.wait_connected(count)
    return mesh, others


async def closed_port() -> int:
    """A port on which nobody listens."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = int(listener.socket.getsockname()[1])
    await listener.aclose()
    return port


def answer_always(mesh: Mesh, answer: bytes) -> None:
    """The mesh answers every question with the same bytes."""

    async def handle(connection: Connection, stream: object) -> None:
        async with MeshStream(stream, connection.key, PROTOCOL, 1024) as frames:  # type: ignore[arg-type]
            await frames.receive_frame()
            await frames.send_frame(answer)

    mesh._network.handlers[PROTOCOL] = handle


async def ask(mesh: Mesh, helper: Mesh, *ports: int) -> Answer:
    question = Question(0, ports, tuple(os.urandom(SECRET_BYTES) for _ in ports))
    return decode(
        Answer, await mesh.request(helper.key, PROTOCOL, encode(question), deadline_s=10, max_reply_bytes=1024)
    )


async def test_a_node_that_can_be_dialed_finds_out(lab) -> None:
    mesh, _ = await meshes(lab, 3)
    assert mesh.reachability().status == "unknown"
    await eventually(lambda: mesh.reachability().status == "public")
    report = mesh.reachability()
    assert report.addresses == (str(mesh._network.bound[0]),)
    assert "dial us back came through" in report.how
    assert report.checked_at is not None
    assert report.observed == ("127.0.0.1",)
    assert report.keeps_ports is True


async def test_a_node_that_cannot_be_dialed_finds_out(lab) -> None:
    mesh, _ = await meshes(lab, 2)
    mesh._network.bound = (Address("ip4", "127.0.0.1", await closed_port()),)
    await eventually(lambda: mesh.reachability().status == "private")
    assert mesh.reachability().addresses == ()
    assert mesh.reachability().how == "none of 2 peers that were asked to dial us back came through"


async def test_the_verdict_follows_when_it_changes(lab) -> None:
    mesh, _ = await meshes(lab, 3)
    listening = mesh._network.bound
    await eventually(lambda: mesh.reachability().status == "public")
    mesh._network.bound = (Address("ip4", "127.0.0.1", await closed_port()),)
    await eventually(lambda: mesh.reachability().status == "private")
    mesh._network.bound = listening
    await eventually(lambda: mesh.reachability().status == "public")


async def test_a_node_that_others_dialed_asks_them(lab) -> None:
    mesh = await lab.mesh(**SOON, target_peers=0)
    other = await lab.mesh(reach_check_s=1000.0)
    other.keep_connected(mesh.key, mesh.addrs)
    await eventually(lambda: mesh.reachability().status == "public")


async def test_who_is_unsure_asks_again_when_others_come(lab) -> None:
    mesh, other = await lab.mesh(reach_check_s=1000.0, target_peers=0), await lab.mesh(reach_check_s=1000.0)
    reach, now = mesh._reach, trio.current_time()
    reach._checked_at, reach._next_round = now - 10, now + 500
    other.keep_connected(mesh.key, mesh.addrs)
    await eventually(lambda: reach._next_round < now + 500)
    assert reach._next_round == reach._checked_at + 120  # not at once: whoever comes and goes does not decide how often
    reach._checked_at = now - 200
    third = await lab.mesh(reach_check_s=1000.0)
    third.keep_connected(mesh.key, mesh.addrs)
    await eventually(lambda: reach._checked_at > now)


async def test_in_a_private_swarm_the_dial_back_has_the_key_too() -> None:
    config = MeshConfig(pre_shared_key=b"k" * 32, limits=replace(FAST, reach_check_s=0.2))
    async with open_mesh(config, os.urandom(32)) as mesh, open_mesh(config, os.urandom(32)) as other:
        mesh.keep_connected(other.key, other.addrs)
        await eventually(lambda: mesh.reachability().status == other.reachability().status == "public")


async def test_a_node_that_dials_nobody_back_says_so(lab) -> None:
    mesh = await lab.mesh(reach_check_s=1000.0)
    helper = await lab.mesh(dialbacks=0, reach_check_s=1000.0)
    mesh.keep_connected(helper.key, helper.addrs)
    await mesh.wait_connected()
    assert (await ask(mesh, helper, mesh._network.bound[0].port)).results == (REFUSED,)


async def test_a_dial_back_is_no_peer_and_no_failed_handshake(lab) -> None:
    mesh, others = await meshes(lab, 2)
    await eventually(lambda: mesh.reachability().status == "public")
    assert len(mesh.peers()) == len(others)
    assert mesh.statistics().connections == len(others)
    assert not mesh.statistics().refused


async def test_who_claims_to_have_dialed_is_not_believed(lab) -> None:
    mesh, others = await meshes(lab, 2)
    for other in others:
        answer_always(other, encode(Answer("127.0.0.1", 1, 0, (DIALED,))))
    await eventually(lambda: mesh._reach._checked_at is not None)
    assert mesh.reachability().status == "unknown"


async def test_a_lying_minority_changes_nothing(lab) -> None:
    mesh, others = await meshes(lab, 3)
    answer_always(others[0], encode(Answer("8.8.8.8", 1, 10**15, (FAILED,))))
    await eventually(lambda: mesh.reachability().status == "public")
    report = mesh.reachability()
    assert report.addresses == (str(mesh._network.bound[0]),)
    assert report.observed == ("127.0.0.1",)


@pytest.mark.parametrize(
    "answer",
    [b"", b"garbage", encode(Answer("no address", 1, 0, ())), encode(Answer("", 1, 0, (7, 7, 7, 7))), b"\x00" * 1024],
    ids=["empty", "garbage", "no address", "too many results", "zeros"],
)
async def test_garbage_for_an_answer_is_no_answer(lab, answer: bytes) -> None:
    mesh, others = await meshes(lab, 1)
    answer_always(others[0], answer)
    await eventually(lambda: mesh._reach._checked_at is not None)
    assert mesh.reachability().status == "unknown"
    assert mesh.is_connected(others[0].key)


async def test_a_clock_that_is_an_hour_off_is_noticed(lab, caplog: pytest.LogCaptureFixture) -> None:
    mesh = await lab.mesh(reach_check_s=1000.0, target_peers=0)
    mesh._reach._wall_clock = lambda: trio.current_time() + 3600
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        other = await lab.mesh(reach_check_s=1000.0)
        server = DialBackServer(other._network, trio.current_time, allow_private=True)
        other._network.handlers[PROTOCOL] = server.handle
        mesh.keep_connected(other.key, other.addrs)
    await eventually(lambda: mesh.reachability().clock_skew_s is not None)
    skew_s = mesh.reachability().clock_skew_s
    assert skew_s is not None and 3590 < skew_s < 3610
    assert [r.message for r in caplog.records if "clock" in r.message] == [
        "the clock of this machine is 3600 s ahead of those of its peers: set it, best by NTP"
    ]


async def test_a_node_that_dials_nobody_still_learns_the_time(lab) -> None:
    """A bootstrap node; what those who came by themselves say about its address is not believed."""
    mesh = await lab.mesh(reach_check_s=1000.0, target_peers=0)
    for _ in range(3):
        other = await lab.mesh(reach_check_s=1000.0, target_peers=0)
        other.keep_connected(mesh.key, mesh.addrs)
    await eventually(lambda: mesh.reachability().clock_skew_s is not None)
    assert mesh.reachability().observed == ()


async def test_a_clock_that_was_set_is_compared_again(lab) -> None:
    mesh = await lab.mesh(target_peers=0, reach_check_s=1000.0)
    wrong_s = -3600.0
    mesh._reach._wall_clock = lambda: trio.current_time() + wrong_s
    for _ in range(3):
        other = await lab.mesh(reach_check_s=1000.0)
        server = DialBackServer(other._network, trio.current_time, allow_private=True)
        other._network.handlers[PROTOCOL] = server.handle
        mesh.keep_connected(other.key, other.addrs)
    await eventually(lambda: (mesh.reachability().clock_skew_s or 0) < -3590)
    wrong_s = 0.0
    mesh._reach._wake.set()
    await eventually(lambda: abs(mesh.reachability().clock_skew_s or 99) < 5)


# -- the answering side -----------------------------------------------------------------------------------------------


async def test_only_the_asker_s_own_address_is_dialed_and_never_a_private_one_on_the_internet(lab) -> None:
    mesh, (helper,) = await meshes(lab, 1)
    port = mesh._network.bound[0].port
    assert (await ask(mesh, helper, port, 0)).results == (FAILED, REFUSED)  # dialed, and the secret is not known here
    server = DialBackServer(helper._network, trio.current_time, allow_private=False)
    helper._network.handlers[PROTOCOL] = server.handle
    assert (await ask(mesh, helper, port)).results == (REFUSED,)


async def test_dialing_for_others_is_limited(lab) -> None:
    mesh, (helper,) = await meshes(lab, 1)
    results: list[int] = []
    for _ in range(4):
        results += (await ask(mesh, helper, *[await closed_port()] * 4)).results
    assert 0 < results.count(FAILED) <= 8
    assert results[-1] == REFUSED


async def test_asking_too_often_is_refused(lab) -> None:
    mesh, (helper,) = await meshes(lab, 1)
    with pytest.raises(RequestFailed):
        for _ in range(20):
            await ask(mesh, helper)
    assert helper.statistics().refused[PROTOCOL] >= 1
    assert mesh.is_connected(helper.key)


@pytest.mark.parametrize("question", [b"", b"garbage", b"\xff" * 1024])
async def test_garbage_for_a_question_ends_the_stream_only(lab, question: bytes) -> None:
    mesh, (helper,) = await meshes(lab, 1)
    with pytest.raises(RequestFailed):
        await mesh.request(helper.key, PROTOCOL, question, deadline_s=5, max_reply_bytes=1024)
    assert mesh.is_connected(helper.key)


async def test_a_listener_of_another_kind_never_gets_the_secret() -> None:
    """A helper must not be a way to send chosen bytes to whatever listens at an address."""
    received = b""

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal received
        await stream.send_all(b"220 mail.example ESMTP, and some more words\r\n")
        with trio.move_on_after(5):
            while part := await stream.receive_some():
                received += part
        await stream.aclose()

    network = Network(key_pair_of(os.urandom(32)), FAST)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        assert not await hand_over(network, Address("ip4", "127.0.0.1", port), b"chosen by asker!")
        await eventually(lambda: received != b"")
        nursery.cancel_scope.cancel()
    assert received == proposal(BACK_PROTOCOL)


async def test_a_secret_that_is_not_ours_is_not_taken(lab) -> None:
    mesh = await lab.mesh()
    network = Network(key_pair_of(os.urandom(32)), FAST)
    assert not await hand_over(network, mesh._network.bound[0], SECRET)
    mesh._reach._secrets[SECRET] = found = type("Found", (), {"arrived": False})()
    assert await hand_over(network, mesh._network.bound[0], SECRET)
    assert found.arrived


async def test_a_dial_back_that_stalls_is_cut_off_as_a_handshake_is(lab) -> None:
    mesh = await lab.mesh(handshake_s=0.5)
    stream = await trio.open_tcp_stream("127.0.0.1", mesh._network.bound[0].port)
    await stream.send_all(proposal(BACK_PROTOCOL) + b"half")
    answer = b""
    with trio.fail_after(10):
        while part := await stream.receive_some():
            answer += part
    assert answer == proposal(BACK_PROTOCOL)
    await stream.aclose()
