"""Tunnels: who may open what, what a refusal says, and what is left when somebody hangs up or dies."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from immutables import Map

from kaisar_p2p.errors import ContainerError, KaisarError, MeshError, PortUnavailable, RequestFailed
from kaisar_p2p.mesh import Mesh
from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus
from kaisar_p2p.runtime.process import ProcessRuntime
from node.tunnels import FRAME_BYTES, LOG_TAIL_BYTES, TunnelClient, TunnelServer, may_open
from protocols.actions import BlockApplied
from protocols.adverts import CPU_CLASS, Spec
from protocols.deploy import TUNNEL_PROTOCOL, TunnelOpen
from protocols.genesis import Genesis, genesis_state, write_genesis
from protocols.interpreter.state import ORDER_CANCELLED, ORDER_CLOSED, OrderState, State

ORDER, OTHER = b"\xab" * 32, b"\xcd" * 32
CLIENT, WORKER, WITNESS, STRANGER = (bytes([n]) * 32 for n in range(1, 5))
EMPTY = genesis_state(write_genesis(Genesis("test", "demo", 0)))
ECHO = """
import os, socket
server = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while True:
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
"""


def order(worker: bytes = WORKER, client_key: bytes = CLIENT, **changes: Any) -> OrderState:
    resources = Spec(CPU_CLASS, 1, 512, 100, 0, 0, "")
    state = OrderState(
        client=b"\x09" * 32, client_key=client_key, worker=worker, worker_owner=b"\x08" * 32, spec_hash=bytes(32),
        resources=resources, offer_hash=bytes(32), price_planck_per_hour=1, duration_s=60, escrow_planck=1,
        locked_planck=1, points_planck=0, placed_block=1, placed_ms=1, seats=(WITNESS,), threshold=1,
    )  # fmt: skip
    return replace(state, **changes)


def state_with(*orders: tuple[bytes, OrderState]) -> State:
    return replace(EMPTY, orders=Map(dict(orders)))


# ── who may open what ────────────────────────────────────────────────────────────────────────────────────────────────

NO_LEASE, ENDED, NOT_YOURS = (
    "no such lease on this worker",
    "the order has ended",
    "only the lease's client may open this",
)


@pytest.mark.parametrize(
    ("peer", "service", "changes", "reason"),
    [
        (CLIENT, "tcp", {}, ""),
        (CLIENT, "logs", {}, ""),
        (CLIENT, "exec", {}, ""),
        (WITNESS, "tcp", {}, ""),
        (WITNESS, "logs", {}, NOT_YOURS),
        (WITNESS, "exec", {}, NOT_YOURS),
        (STRANGER, "tcp", {}, NOT_YOURS),
        (STRANGER, "logs", {}, NOT_YOURS),
        (STRANGER, "exec", {}, NOT_YOURS),
        (WORKER, "exec", {}, NOT_YOURS),
        (b"\x09" * 32, "exec", {}, NOT_YOURS),  # the paying account is not a machine
        (CLIENT, "tcp", {"status": ORDER_CANCELLED}, ENDED),
        (CLIENT, "logs", {"status": ORDER_CLOSED}, ENDED),
        (WITNESS, "tcp", {"status": ORDER_CLOSED}, ENDED),
        (CLIENT, "tcp", {"worker": STRANGER}, NO_LEASE),
        (WITNESS, "tcp", {"worker": STRANGER}, NO_LEASE),
        (CLIENT, "exec", {"worker": STRANGER, "status": ORDER_CLOSED}, NO_LEASE),
    ],
)
def test_who_may_open_what(peer: bytes, service: str, changes: dict[str, Any], reason: str) -> None:
    assert may_open(order(**changes), peer, WORKER, service) == reason


def test_an_unknown_order_is_refused() -> None:
    assert may_open(None, CLIENT, WORKER, "tcp") == NO_LEASE


# ── a worker and a client ────────────────────────────────────────────────────────────────────────────────────────────


class StubSession:
    """A command that says nothing and never ends."""

    def __init__(self) -> None:
        self.input: list[bytes] = []
        self.input_ended, self.ended = trio.Event(), trio.Event()

    async def send(self, data: bytes) -> None:
        self.input.append(data)

    async def send_eof(self) -> None:
        self.input_ended.set()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        await trio.sleep_forever()
        yield 1, b""

    async def exit_code(self) -> int:
        return 0


class StubRuntime:
    """One container in whatever state a test wants."""

    def __init__(self, status: ContainerStatus | None = None) -> None:
        self.current = status
        self.session = StubSession()
        self.logs_ended = trio.Event()
        self.error: Exception | None = None

    async def status(self, lease: str) -> ContainerStatus | None:
        return self.current

    async def logs(self, lease: str, *, follow: bool, tail_bytes: int) -> AsyncIterator[bytes]:
        try:
            yield b"first line\n"
            await trio.sleep_forever()
        finally:
            self.logs_ended.set()

    @asynccontextmanager
    async def exec(self, lease: str, command: tuple[str, ...]) -> AsyncIterator[StubSession]:
        if self.error is not None:
            raise self.error
        try:
            yield self.session
        finally:
            self.session.ended.set()


@dataclass
class Rented:
    """A worker that serves tunnels, and the client of its lease."""

    worker: Mesh
    client: Mesh
    tunnels: TunnelClient
    runtime: Any
    state: State
    lab: Any
    leases: list[str] = field(default_factory=list)

    def set_orders(self, *orders: tuple[bytes, OrderState]) -> None:
        self.state = state_with(*orders)

    async def open(self, service: str, port: int = 0, *arguments: str, order_id: bytes = ORDER) -> Any:
        return await self.tunnels.open(self.worker.key, TunnelOpen(order_id, service, port, arguments))

    async def start(self, *command: str, ports: tuple[int, ...] = ()) -> None:
        spec = ContainerSpec(ORDER.hex(), "", command, (), ports, 1, 512, 100, 0)
        await self.runtime.start(spec)

    async def eventually_up(self, port: int) -> None:
        """The program has to start before it listens."""
        with trio.fail_after(20):
            while not (await self.tunnels.probe(ORDER, self.worker.key, port, 5.0))[0]:  # noqa: ASYNC110
                await trio.sleep(0.02)


@pytest.fixture
async def rent(lab: Any) -> AsyncIterator[Callable[..., Any]]:
    async with trio.open_nursery() as nursery:
        processes: list[ProcessRuntime] = []

        async def make(runtime: Any) -> Rented:
            worker, client = await lab.pair()
            rented = Rented(worker, client, TunnelClient(client), runtime, EMPTY, lab)
            rented.set_orders((ORDER, order(worker.key, client.key)))
            server = TunnelServer(runtime, worker.key, lambda: rented.state)
            worker.serve(TUNNEL_PROTOCOL, server.handle, max_frame_bytes=FRAME_BYTES, per_peer=64, rate_per_s=500.0)
            nursery.start_soon(rented.tunnels.run)
            if isinstance(runtime, ProcessRuntime):
                processes.append(runtime)
            return rented

        yield make
        for runtime in processes:
            for status in await runtime.containers():
                await runtime.stop(status.lease, 0.0)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def processes(rent: Callable[..., Any], tmp_path: Path) -> Rented:
    return await rent(ProcessRuntime(tmp_path / "leases"))  # type: ignore[no-any-return]


def running(*ports: tuple[int, tuple[str, int]]) -> ContainerStatus:
    return ContainerStatus(ORDER.hex(), "running", None, ports)


def free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.mark.parametrize(
    ("service", "port", "arguments", "status", "changes", "reason"),
    [
        ("tcp", 80, (), None, {}, "the container does not run"),
        ("tcp", 0, (), None, {}, "the container does not run"),
        ("tcp", 80, (), ContainerStatus("", "exited", 0, ((80, ("127.0.0.1", 1)),)), {}, "the container does not run"),
        ("tcp", 81, (), running((80, ("127.0.0.1", 1))), {}, "the container has no port 81"),
        ("tcp", 80, (), running((80, ("127.0.0.1", 1))), {}, "nothing listens on port 80 of the container"),
        ("logs", 0, (), None, {}, "the container is gone"),
        ("exec", 0, (), running(), {}, "no command"),
        ("reboot", 0, (), running(), {}, "unknown service 'reboot'"),
        ("exec", 0, ("id",), running(), {"status": ORDER_CLOSED}, ENDED),
        ("exec", 0, ("id",), running(), {"worker": STRANGER}, NO_LEASE),
        ("exec", 0, ("id",), running(), {"client_key": STRANGER}, NOT_YOURS),
    ],
)
async def test_a_refusal_gives_its_reason(
    rent: Callable[..., Any],
    service: str,
    port: int,
    arguments: tuple[str, ...],
    status: Any,
    changes: Any,
    reason: str,
) -> None:
    rented = await rent(StubRuntime(status))
    rented.set_orders((ORDER, replace(rented.state.orders[ORDER], **changes)))
    with pytest.raises(RequestFailed, match=f"the worker refused: {reason}"):
        await rented.open(service, port, *arguments)
    up, detail, answered = await rented.tunnels.probe(ORDER, rented.worker.key, 81, 5.0)
    assert not up
    assert detail
    assert answered  # the worker is there, whatever its reason
    assert not rented.worker.statistics().failed_handlers


async def test_a_request_that_is_none_ends_the_stream_only(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    for garbage in (b"", b"\x00", b"\xff" * 1000):
        stream = await rented.client.open_stream(
            rented.worker.key, TUNNEL_PROTOCOL, timeout_s=5, max_frame_bytes=FRAME_BYTES
        )
        async with stream:
            await stream.send_frame(garbage)
            with pytest.raises(RequestFailed):
                await stream.receive_frame()
    assert not rented.worker.statistics().failed_handlers
    assert (await rented.tunnels.probe(ORDER, rented.worker.key, 0, 5.0)) == (True, "", True)


async def test_a_worker_that_answers_garbage_or_nothing(lab: Any) -> None:
    worker, client = await lab.pair()
    tunnels = TunnelClient(client)
    answers = [b"\xff\xff", None]

    async def serve(stream: Any) -> None:
        await stream.receive_frame()
        answer = answers.pop(0)
        if answer is not None:
            await stream.send_frame(answer)

    worker.serve(TUNNEL_PROTOCOL, serve, max_frame_bytes=1000)
    with pytest.raises(RequestFailed, match="garbage"):
        await tunnels.open(worker.key, TunnelOpen(ORDER, "tcp", 80, ()))
    for key in (worker.key, STRANGER):
        probed = await tunnels.probe(ORDER, key, 80, 5.0)
        assert (probed.up, probed.answered) == (False, False)


# ── TCP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_program_answers_through_local_port_tunnel_and_runtime(processes: Rented) -> None:
    await processes.start(sys.executable, "-c", ECHO, ports=(7,))
    await processes.eventually_up(7)
    assert (await processes.tunnels.probe(ORDER, processes.worker.key, 0, 5.0)) == (True, "", True)
    local = await processes.tunnels.listen(ORDER, processes.worker.key, 7, "127.0.0.1", 0)
    data, got = bytes(range(256)) * 2_000, bytearray()
    with trio.fail_after(20):
        async with await trio.open_tcp_stream("127.0.0.1", local.local_port) as tcp, trio.open_nursery() as nursery:
            nursery.start_soon(tcp.send_all, data)
            while len(got) < len(data):
                got += await tcp.receive_some()
    assert bytes(got) == data
    await processes.runtime.stop(ORDER.hex(), 0.0)
    assert (await processes.tunnels.probe(ORDER, processes.worker.key, 7, 5.0))[0] is False


async def test_a_worker_that_is_killed_ends_connections_and_nothing_else(processes: Rented) -> None:
    await processes.start(sys.executable, "-c", ECHO, ports=(7,))
    await processes.eventually_up(7)
    local = await processes.tunnels.listen(ORDER, processes.worker.key, 7, "127.0.0.1", 0)
    with trio.fail_after(20):
        async with await trio.open_tcp_stream("127.0.0.1", local.local_port) as tcp:
            await tcp.send_all(b"hello")
            assert await tcp.receive_some() == b"hello"
            await processes.lab.stop(processes.worker)
            assert await _rest(tcp) == b""
        async with await trio.open_tcp_stream("127.0.0.1", local.local_port) as tcp:
            assert await _rest(tcp) == b""
    assert processes.tunnels.local_ports == [local]


async def _rest(tcp: trio.SocketStream) -> bytes:
    got = bytearray()
    try:
        while data := await tcp.receive_some():
            got += data
    except trio.BrokenResourceError:
        pass
    return bytes(got)


# ── local ports ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_local_port_is_listened_on_once(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    key, tunnels = rented.worker.key, rented.tunnels
    first = await tunnels.listen(ORDER, key, 80, "127.0.0.1", 0)
    assert await tunnels.listen(ORDER, key, 80, "127.0.0.1", 0) is first
    assert await tunnels.listen(ORDER, key, 80, "127.0.0.1", first.local_port) is first
    other = await tunnels.listen(ORDER, key, 81, "127.0.0.1", 0)
    assert other.local_port != first.local_port
    with pytest.raises(PortUnavailable, match=str(first.local_port)):
        await tunnels.listen(OTHER, key, 80, "127.0.0.1", first.local_port)
    for port in (70_000, -1):
        with pytest.raises(MeshError):
            await tunnels.listen(OTHER, key, 80, "127.0.0.1", port)
    with pytest.raises(KaisarError):
        await tunnels.listen(OTHER, key, 80, "203.0.113.7", 0)  # not an address of this machine
    assert tunnels.local_ports == [first, other]


async def test_local_ports_close_with_their_order(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    key, tunnels = rented.worker.key, rented.tunnels
    ended = await tunnels.listen(ORDER, key, 80, "127.0.0.1", 0)
    gone = await tunnels.listen(OTHER, key, 80, "127.0.0.1", 0)
    going_on = await tunnels.listen(b"\x55" * 32, key, 80, "127.0.0.1", 0)
    assert (
        tunnels.step(BlockApplied(state_with((ORDER, order()), (OTHER, order()), (b"\x55" * 32, order())), ()), 0) == []
    )
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert tunnels.local_ports == [ended, gone, going_on]
    tunnels.step(BlockApplied(state_with((ORDER, order(status=ORDER_CLOSED)), (b"\x55" * 32, order())), ()), 0)
    await rented.lab.until(lambda: tunnels.local_ports == [going_on])
    for local in (ended, gone):
        with pytest.raises(OSError, match=str(local.local_port)):
            await trio.open_tcp_stream("127.0.0.1", local.local_port)


# ── logs and commands ────────────────────────────────────────────────────────────────────────────────────────────────


async def _frames(stream: Any) -> list[bytes]:
    frames = []
    try:
        with trio.fail_after(20):
            while True:
                frames.append(await stream.receive_frame())
    except RequestFailed:
        return frames


async def test_logs_come_in_frames_within_the_limit(processes: Rented) -> None:
    lines = "import sys\nfor n in range(60000): print('line', n)"
    await processes.start(sys.executable, "-c", lines)
    with trio.fail_after(20):
        assert await processes.runtime.wait(ORDER.hex()) == 0
    async with await processes.open("logs") as stream:
        frames = await _frames(stream)
    text = b"".join(frames)
    assert max(map(len, frames)) <= FRAME_BYTES
    assert len(text) + 100 >= LOG_TAIL_BYTES
    assert text.endswith(b"line 59999\n")


async def test_a_silent_log_is_no_longer_followed_when_its_reader_hangs_up(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    async with await rented.open("logs", 0, "follow") as stream:
        assert await stream.receive_frame() == b"first line\n"
    with trio.fail_after(20):
        await rented.runtime.logs_ended.wait()
    assert not rented.worker.statistics().failed_handlers


async def test_a_command_gets_its_input_and_all_its_output_arrives(processes: Rented) -> None:
    await processes.start("sleep", "1000")
    script = (
        "import sys; data = sys.stdin.buffer.read(); sys.stderr.write('e' * 70000);"
        "sys.stdout.buffer.write(data * 2); sys.stdout.flush(); sys.exit(7)"
    )
    async with await processes.open("exec", 0, sys.executable, "-c", script) as stream:
        for _ in range(4):
            await stream.send_frame(b"\0" + b"x" * 60_000)
        await stream.send_frame(b"\x05not input")
        await stream.send_frame(b"")
        await stream.send_eof()
        frames = await _frames(stream)
    by_channel = {n: b"".join(frame[1:] for frame in frames if frame[0] == n) for n in range(4)}
    assert by_channel == {0: b"", 1: b"x" * 480_000, 2: b"e" * 70_000, 3: b"7"}
    assert frames[-1] == b"\x037"
    assert max(map(len, frames)) <= FRAME_BYTES
    assert not processes.worker.statistics().failed_handlers


async def test_a_client_that_hangs_up_ends_its_command(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    stream = await rented.open("exec", 0, "sleep", "1000")
    await stream.send_frame(b"\0hello")
    await stream.reset()
    with trio.fail_after(20):
        await rented.runtime.session.ended.wait()
    await rented.lab.until(lambda: not rented.worker.statistics().failed_handlers)


async def test_the_end_of_the_input_does_not_end_the_command(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    async with await rented.open("exec", 0, "wc") as stream:
        await stream.send_frame(b"\0hello")
        await stream.send_eof()
        with trio.fail_after(20):
            await rented.runtime.session.input_ended.wait()
        assert rented.runtime.session.input == [b"hello"]
        assert not rented.runtime.session.ended.is_set()
        await stream.reset()
    with trio.fail_after(20):
        await rented.runtime.session.ended.wait()


async def test_a_client_that_hangs_up_while_a_command_talks(processes: Rented) -> None:
    await processes.start("sleep", "1000")
    stream = await processes.open("exec", 0, sys.executable, "-c", "while True: print('x' * 1000)")
    assert (await stream.receive_frame())[0] == 1
    await stream.reset()
    await processes.lab.until(lambda: not processes.runtime._sessions[ORDER.hex()])
    async with await processes.open("exec", 0, "echo", "still here") as again:
        assert (await again.receive_frame()) == b"\x01still here\n"
    assert not processes.worker.statistics().failed_handlers


async def test_a_command_that_cannot_start_ends_the_tunnel(rent: Callable[..., Any]) -> None:
    rented = await rent(StubRuntime(running()))
    rented.runtime.error = ContainerError("lease abababab does not run")
    with pytest.raises(RequestFailed):
        await rented.open("exec", 0, "id")
    assert not rented.worker.statistics().failed_handlers
