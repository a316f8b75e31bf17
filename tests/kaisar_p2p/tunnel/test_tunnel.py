from __future__ import annotations

import contextlib
import os
from functools import partial

import pytest
import trio
import trio.testing

from kaisar_p2p.errors import PeerUnreachable, PortUnavailable
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshStream, open_mesh
from kaisar_p2p.tunnel import TunnelCounters, serve_local, splice

HOST = "127.0.0.1"


async def eventually(condition, within_s: float = 10.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.005)


class Path:
    """A service behind one mesh, reached through another: client → local port → stream → service."""

    def __init__(self) -> None:
        self.port = 0
        self.idle_timeout_s = 30.0
        self.ended: list[TunnelCounters] = []
        self.service = self.echo
        self.near: Mesh
        self.far: Mesh

    async def echo(self, tcp: trio.SocketStream) -> None:
        async with tcp:
            while data := await tcp.receive_some(65536):
                await tcp.send_all(data)
            await tcp.send_eof()

    async def to_service(self, service_port: int, stream: MeshStream) -> None:
        tcp = await trio.open_tcp_stream(HOST, service_port)
        self.ended.append(await splice(stream, tcp, idle_timeout_s=self.idle_timeout_s))

    async def open_remote(self) -> MeshStream:
        return await self.near.open_stream(self.far.key, "/tunnel", timeout_s=5, max_frame_bytes=1)

    async def client(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(HOST, self.port)


@pytest.fixture
async def path():
    made = Path()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        async with (
            open_mesh(MeshConfig(), os.urandom(32)) as made.near,
            open_mesh(MeshConfig(), os.urandom(32)) as made.far,
            trio.open_nursery() as nursery,
        ):
            made.near.add_addresses(made.far.key, made.far.addrs)
            handler = lambda tcp: made.service(tcp)  # noqa: E731
            (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host=HOST))
            port = listener.socket.getsockname()[1]
            made.far.serve("/tunnel", partial(made.to_service, port), max_frame_bytes=1, rate_per_s=1000, per_peer=60)
            made.port = await nursery.start(partial(serve_local, HOST, 0, made.open_remote, max_connections=5))
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield made
        nursery.cancel_scope.cancel()


async def drain(tcp: trio.SocketStream) -> bytes:
    data = bytearray()
    with trio.fail_after(20):
        while part := await tcp.receive_some(65536):
            data += part
    return bytes(data)


async def test_bytes_and_ends_pass_both_ways(path: Path) -> None:
    sent = os.urandom(5_000_000)
    async with await path.client() as tcp, trio.open_nursery() as nursery:

        async def send() -> None:
            await tcp.send_all(sent)
            await tcp.send_eof()

        nursery.start_soon(send)
        assert await drain(tcp) == sent
    await eventually(lambda: len(path.ended) == 1)
    assert path.ended == [TunnelCounters(sent_bytes=len(sent), received_bytes=len(sent))]


async def test_a_server_that_speaks_first_and_closes(path: Path) -> None:
    async def greet(tcp: trio.SocketStream) -> None:
        await tcp.send_all(b"220 hello\r\n")

    path.service = greet
    async with await path.client() as tcp:
        assert await drain(tcp) == b"220 hello\r\n"
        await tcp.send_eof()
    await eventually(lambda: len(path.ended) == 1)


async def test_several_connections_at_once(path: Path) -> None:
    async def one(number: int) -> None:
        async with await path.client() as tcp:
            await tcp.send_all(b"%d" % number)
            await tcp.send_eof()
            assert await drain(tcp) == b"%d" % number

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, number)


async def test_one_connection_too_many_is_closed(path: Path) -> None:
    open_ones = [await path.client() for _ in range(5)]
    for tcp in open_ones:
        await tcp.send_all(b"x")
        with trio.fail_after(10):
            assert await tcp.receive_some() == b"x"
    extra = await path.client()
    with trio.fail_after(10):
        with contextlib.suppress(trio.BrokenResourceError):
            assert await extra.receive_some() == b""
    await open_ones[0].aclose()
    await eventually(lambda: len(path.ended) == 1)
    again = await path.client()
    await again.send_all(b"y")
    with trio.fail_after(10):
        assert await again.receive_some() == b"y"


async def test_a_reader_that_does_not_read_holds_a_bounded_amount(path: Path) -> None:
    sent = 0

    async def flood(tcp: trio.SocketStream) -> None:
        nonlocal sent
        try:
            while True:
                await tcp.send_all(bytes(65536))
                sent += 65536
        except trio.BrokenResourceError:
            pass

    path.service = flood
    async with await path.client():
        await eventually(lambda: sent > 0)
        still = -1
        while still != sent:
            still = sent
            await trio.testing.wait_all_tasks_blocked(0.1)
        assert sent < 64 * 1024 * 1024
    await eventually(lambda: len(path.ended) == 1)


async def test_an_idle_tunnel_ends_on_both_sides(path: Path) -> None:
    path.idle_timeout_s = 0.2
    async with await path.client() as tcp:
        await tcp.send_all(b"x")
        with trio.fail_after(10):
            assert await tcp.receive_some() == b"x"
            with contextlib.suppress(trio.BrokenResourceError):
                assert await tcp.receive_some() == b""
    await eventually(lambda: len(path.ended) == 1)


async def test_a_client_that_vanishes_ends_the_service(path: Path) -> None:
    ended = trio.Event()

    async def service(tcp: trio.SocketStream) -> None:
        try:
            await tcp.send_all(b"x")
            await tcp.receive_some()
        except trio.BrokenResourceError:
            pass
        ended.set()

    path.service = service
    tcp = await path.client()
    assert await tcp.receive_some() == b"x"
    await trio.aclose_forcefully(tcp)
    with trio.fail_after(10):
        await ended.wait()


async def test_a_remote_that_cannot_be_reached_closes_the_connection_and_serving_goes_on(path: Path, caplog) -> None:
    async def unreachable() -> MeshStream:
        raise PeerUnreachable("gone")

    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve_local, HOST, 0, unreachable, max_connections=1))
        for _ in range(3):
            async with await trio.open_tcp_stream(HOST, port) as tcp:
                with trio.fail_after(10):
                    with contextlib.suppress(trio.BrokenResourceError):
                        assert await tcp.receive_some() == b""
        nursery.cancel_scope.cancel()
    assert "a connection through a tunnel failed: gone" in caplog.text


async def test_a_taken_local_port_is_named(path: Path) -> None:
    with pytest.raises(PortUnavailable, match=str(path.port)):
        await serve_local(HOST, path.port, path.open_remote, max_connections=1)


async def test_counters_can_be_watched(path: Path) -> None:
    counters = TunnelCounters()
    async with trio.open_nursery() as nursery:
        serve = partial(serve_local, HOST, 0, path.open_remote, max_connections=1, counters=counters)
        port = await nursery.start(serve)
        async with await trio.open_tcp_stream(HOST, port) as tcp:
            await tcp.send_all(b"12345")
            with trio.fail_after(10):
                assert await tcp.receive_some() == b"12345"
            await eventually(lambda: counters.sent_bytes == counters.received_bytes == 5)
        nursery.cancel_scope.cancel()
