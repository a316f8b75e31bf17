from __future__ import annotations

import os
import socket
import time

import pytest
import trio

from kaisar_p2p.errors import ConfigError, LimitExceeded, PeerUnreachable, PortUnavailable, RequestFailed
from kaisar_p2p.mesh import MeshConfig, MeshStream, open_mesh


async def _echo(stream: MeshStream) -> None:
    await stream.send_frame(await stream.receive_frame())


async def test_request_and_reply(lab) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=1 << 20)
    for payload in (b"", b"x", os.urandom(1 << 20)):
        assert await a.request(b.key, "/echo", payload, deadline_s=5, max_reply_bytes=1 << 20) == payload


async def test_the_handler_knows_who_asks(lab) -> None:
    a, b = await lab.pair()
    asked_by: list[bytes] = []

    async def handler(stream: MeshStream) -> None:
        asked_by.append(stream.peer)
        await stream.send_frame(await stream.receive_frame())

    b.serve("/who", handler, max_frame_bytes=10)
    await a.request(b.key, "/who", b"", deadline_s=5, max_reply_bytes=10)
    assert asked_by == [a.key]


async def test_request_dials_a_peer_whose_address_is_known(lab) -> None:
    a, b = await lab.mesh(), await lab.mesh()
    b.serve("/echo", _echo, max_frame_bytes=10)
    a.add_addresses(b.key, b.addrs)
    assert await a.request(b.key, "/echo", b"hi", deadline_s=5, max_reply_bytes=10) == b"hi"


async def test_unknown_peer_is_unreachable(lab) -> None:
    a = await lab.mesh()
    with pytest.raises(PeerUnreachable):
        await a.request(os.urandom(32), "/echo", b"", deadline_s=5, max_reply_bytes=10)


async def test_why_a_peer_is_unreachable_is_told_in_plain_words(lab) -> None:
    a = await lab.mesh()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    a.add_addresses(bytes(range(32)), [f"/ip4/127.0.0.1/tcp/{port}"])
    with pytest.raises(PeerUnreachable) as caught:
        await a.request(bytes(range(32)), "/echo", b"", deadline_s=5, max_reply_bytes=10)
    assert caught.value.message.endswith(f"/ip4/127.0.0.1/tcp/{port}: Connection refused")


async def test_a_name_that_nobody_has_is_told_in_plain_words(lab, monkeypatch) -> None:
    async def unknown(*_arguments: object, **_options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    a = await lab.mesh()
    monkeypatch.setattr(trio.socket, "getaddrinfo", unknown)
    a.add_addresses(bytes(range(32)), ["/dns4/node.invalid/tcp/4001"])
    with pytest.raises(PeerUnreachable) as caught:
        await a.request(bytes(range(32)), "/echo", b"", deadline_s=5, max_reply_bytes=10)
    assert caught.value.message.endswith("/tcp/4001: the name is not known: Name or service not known")


async def test_somebody_elses_address_does_not_pass_for_the_peer(lab) -> None:
    a, b, c = [await lab.mesh() for _ in range(3)]
    a.add_addresses(c.key, [b.addrs[0].split("/p2p/")[0]])  # where b listens
    with pytest.raises(PeerUnreachable):
        await a.request(c.key, "/echo", b"", deadline_s=5, max_reply_bytes=10)


async def test_a_peer_does_not_dial_itself(lab) -> None:
    a = await lab.mesh()
    with pytest.raises(PeerUnreachable):
        await a.request(a.key, "/echo", b"", deadline_s=5, max_reply_bytes=10)


@pytest.mark.parametrize("how", ["request", "open_stream"])
async def test_unknown_protocol_is_refused_and_the_connection_lives(lab, how: str) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=10)
    with pytest.raises(RequestFailed):
        if how == "request":
            await a.request(b.key, "/nothing", b"", deadline_s=5, max_reply_bytes=10)
        else:
            await a.open_stream(b.key, "/nothing", timeout_s=5, max_frame_bytes=10)
    assert await a.request(b.key, "/echo", b"", deadline_s=5, max_reply_bytes=10) == b""
    assert b.statistics().connections == 1


async def test_deadline(lab) -> None:
    a, b = await lab.pair()

    async def silent(stream: MeshStream) -> None:
        await stream.receive_some()
        await trio.sleep_forever()

    b.serve("/silent", silent, max_frame_bytes=10)
    with pytest.raises(RequestFailed, match="did not answer"):
        await a.request(b.key, "/silent", b"", deadline_s=0.1, max_reply_bytes=10)


async def test_reply_over_the_limit(lab) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=1000)
    with pytest.raises(RequestFailed, match="over the limit"):
        await a.request(b.key, "/echo", b"x" * 1000, deadline_s=5, max_reply_bytes=999)


async def test_question_over_the_limit_costs_the_stream_only(lab) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=100)
    with pytest.raises(RequestFailed):
        await a.request(b.key, "/echo", b"x" * 101, deadline_s=5, max_reply_bytes=1000)
    assert await a.request(b.key, "/echo", b"x", deadline_s=5, max_reply_bytes=1000) == b"x"


async def test_frame_limits_are_limited_themselves(lab) -> None:
    a, b = await lab.pair(request_bytes=1000)
    for limit, payload in ((1001, b""), (10, bytes(1001))):
        with pytest.raises(LimitExceeded):
            await a.request(b.key, "/echo", payload, deadline_s=5, max_reply_bytes=limit)
    with pytest.raises(LimitExceeded):
        await a.open_stream(b.key, "/echo", timeout_s=5, max_frame_bytes=1001)
    with pytest.raises(LimitExceeded):
        b.serve("/echo", _echo, max_frame_bytes=1001)


async def test_the_limit_of_a_protocol_is_about_questions_not_answers(lab) -> None:
    a, b = await lab.pair()

    async def generous(stream: MeshStream) -> None:
        await stream.receive_frame()
        await stream.send_frame(bytes(100_000))

    b.serve("/generous", generous, max_frame_bytes=10)
    assert len(await a.request(b.key, "/generous", b"", deadline_s=5, max_reply_bytes=100_000)) == 100_000


async def test_an_announced_length_is_not_allocated(lab) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=100)
    stream = await a.open_stream(b.key, "/echo", timeout_s=5, max_frame_bytes=1 << 20)
    await stream.send_some((0xFFFFFFFF).to_bytes(4, "big"))
    with pytest.raises(RequestFailed):
        await stream.receive_frame()


async def test_a_truncated_frame_ends_the_stream_only(lab) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=100)
    stream = await a.open_stream(b.key, "/echo", timeout_s=5, max_frame_bytes=100)
    await stream.send_some((50).to_bytes(4, "big") + b"half")
    await stream.send_eof()
    with pytest.raises(RequestFailed), trio.fail_after(5):
        await stream.receive_frame()
    assert await a.request(b.key, "/echo", b"x", deadline_s=5, max_reply_bytes=100) == b"x"


async def test_a_handler_that_raises_costs_its_stream_only(lab, caplog) -> None:
    a, b = await lab.pair()

    async def broken(stream: MeshStream) -> None:
        raise ZeroDivisionError("bug")

    b.serve("/broken", broken, max_frame_bytes=10)
    b.serve("/echo", _echo, max_frame_bytes=10)
    with pytest.raises(RequestFailed):
        await a.request(b.key, "/broken", b"", deadline_s=5, max_reply_bytes=10)
    assert await a.request(b.key, "/echo", b"x", deadline_s=5, max_reply_bytes=10) == b"x"
    assert b.statistics().failed_handlers == {"/broken": 1}
    assert "the handler of /broken failed" in caplog.text


async def test_concurrent_streams_of_a_peer_are_limited(lab) -> None:
    a, b = await lab.pair()

    async def hold(stream: MeshStream) -> None:
        await stream.receive_some()

    b.serve("/hold", hold, max_frame_bytes=10, per_peer=2, rate_per_s=1000)
    held = [await a.open_stream(b.key, "/hold", timeout_s=5, max_frame_bytes=10) for _ in range(2)]
    third = await a.open_stream(b.key, "/hold", timeout_s=5, max_frame_bytes=10)
    with pytest.raises(RequestFailed), trio.fail_after(5):
        await third.receive_some()
    assert b.statistics().refused == {"/hold": 1}
    await held[0].aclose()


async def test_the_rate_of_streams_of_a_peer_is_limited(lab) -> None:
    a, b = await lab.pair()
    b.serve("/echo", _echo, max_frame_bytes=10, rate_per_s=0.001, per_peer=100)
    await a.request(b.key, "/echo", b"", deadline_s=5, max_reply_bytes=10)  # the burst is one
    with pytest.raises(RequestFailed):
        await a.request(b.key, "/echo", b"", deadline_s=5, max_reply_bytes=10)


async def test_half_close_and_raw_bytes(lab) -> None:
    a, b = await lab.pair()

    async def count(stream: MeshStream) -> None:
        total = 0
        while data := await stream.receive_some():
            total += len(data)
        await stream.send_some(str(total).encode())

    b.serve("/count", count, max_frame_bytes=10)
    async with await a.open_stream(b.key, "/count", timeout_s=5, max_frame_bytes=10) as stream:
        for _ in range(50):
            await stream.send_some(bytes(100_000))
        await stream.send_eof()
        with trio.fail_after(10):
            assert await stream.receive_some() == b"5000000"
            assert await stream.receive_some() == b""
    assert stream.sent_bytes == 5_000_000


async def test_what_was_sent_before_aclose_arrives(lab) -> None:
    a, b = await lab.pair()

    async def flood(stream: MeshStream) -> None:
        await stream.send_some(bytes(3_000_000))

    b.serve("/flood", flood, max_frame_bytes=10)
    stream = await a.open_stream(b.key, "/flood", timeout_s=5, max_frame_bytes=10)
    total = 0
    with trio.fail_after(10):
        while data := await stream.receive_some():
            total += len(data)
    assert total == 3_000_000


async def test_a_reader_that_does_not_read_stops_the_writer_not_the_peer(lab) -> None:
    a, b = await lab.pair()
    sent = 0

    async def flood(stream: MeshStream) -> None:
        nonlocal sent
        while True:
            await stream.send_some(bytes(64 * 1024))
            sent += 64 * 1024

    b.serve("/flood", flood, max_frame_bytes=10)
    b.serve("/echo", _echo, max_frame_bytes=10)
    stream = await a.open_stream(b.key, "/flood", timeout_s=5, max_frame_bytes=10)
    for _ in range(5):
        assert await a.request(b.key, "/echo", b"x", deadline_s=5, max_reply_bytes=10) == b"x"
    assert sent < 2 * 1024 * 1024
    await stream.reset()


async def test_streams_end_when_the_peer_dies(lab) -> None:
    a = await lab.mesh()

    async def hold(stream: MeshStream) -> None:
        await trio.sleep_forever()

    async with open_mesh(MeshConfig(network="test"), os.urandom(32)) as b:
        b.serve("/hold", hold, max_frame_bytes=10)
        a.add_addresses(b.key, b.addrs)
        stream = await a.open_stream(b.key, "/hold", timeout_s=5, max_frame_bytes=10)
    with pytest.raises(RequestFailed), trio.fail_after(5):
        await stream.receive_frame()
    with trio.fail_after(5):
        await a.wait_until(lambda: not a.is_connected(b.key))


async def test_a_taken_port_is_named(lab) -> None:
    a = await lab.mesh()
    port = int(a.addrs[0].split("/")[4])
    with pytest.raises(PortUnavailable, match=str(port)) as caught:
        async with open_mesh(MeshConfig(listen=(f"/ip4/127.0.0.1/tcp/{port}",)), os.urandom(32)):
            raise AssertionError("two nodes share a port")
    assert "--listen" in caught.value.hint


async def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(PortUnavailable) as caught:
        async with open_mesh(MeshConfig(listen=("/ip4/192.0.2.77/tcp/0",)), os.urandom(32)):
            raise AssertionError("an address of nobody")
    assert "this machine does not have it" in caught.value.hint


@pytest.mark.parametrize("listen", ["", "127.0.0.1:4001", "/ip4/127.0.0.1/udp/1/quic-v1", "/ip4/300.1.1.1/tcp/1"])
async def test_a_listen_address_that_cannot_be_used(listen: str) -> None:
    with pytest.raises(ConfigError):
        async with open_mesh(MeshConfig(listen=(listen,)), os.urandom(32)):
            pass


async def test_an_exception_in_the_body_comes_out_as_it_is(lab) -> None:
    with pytest.raises(KeyError):
        async with open_mesh(MeshConfig(), os.urandom(32)):
            raise KeyError("mine")


async def test_closing_is_quick_under_cancellation(lab) -> None:
    meshes = [await lab.mesh() for _ in range(4)]
    with trio.CancelScope() as scope:
        async with open_mesh(MeshConfig(), os.urandom(32)) as mesh:
            for other in meshes:
                mesh.keep_connected(other.key, other.addrs)
            with trio.fail_after(10):
                await mesh.wait_connected(4)
            scope.cancel()
            began = time.monotonic()
            await trio.sleep_forever()
    assert time.monotonic() - began < 2.0
