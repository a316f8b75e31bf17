"""A small internet of network namespaces: hosts with public addresses, and homes behind NATs of two kinds.

Every place hangs on one router by a cable or a slow line of its own, in a network of its own with globally routable
looking addresses; nothing leaves the namespaces, and what rules the machine has for its own traffic does not matter.
Needs root, iproute2 and iptables; skipped with the reason otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import trio

from tests.netns import namespaces

PORT = 4001
ROOT = Path(__file__).resolve().parents[2]
_NETWORKS = ("45.81.7", "5.42.13", "62.109.21", "81.17.30", "91.60.44", "178.33.50", "193.5.60", "31.7.70")
_LIMITS = {"dial_s": 2.0}  # a NAT that says nothing is found out sooner
_insides = itertools.count()

Nat = Literal["keeps-ports", "random-ports"]
T = TypeVar("T")


@pytest.fixture(scope="session")
def iptables() -> str:
    """The name of the iptables to use."""
    if sys.platform != "linux":
        pytest.skip("network namespaces exist on Linux only")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed (package iproute2)")
    namespaces.remove_leftovers()
    name = namespaces.working_iptables()
    if name is None:
        pytest.skip("no namespace with NAT can be made: iptables is not installed, or the kernel lacks it")
    return name


@pytest.fixture(scope="session")
def fork_server(iptables: str) -> Iterator[socket.socket]:
    """Where meshes are ordered; see `mesh_process`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen((sys.executable, "-m", "tests.netns.mesh_process"), stdin=theirs, cwd=ROOT)
        yield ours
    process.wait(10)


async def together(*waits: Awaitable[T]) -> list[T]:
    """The results of several coroutines that run at the same time."""
    results: dict[int, T] = {}

    async def note(number: int, wait: Awaitable[T]) -> None:
        results[number] = await wait

    async with trio.open_nursery() as nursery:
        for number, wait in enumerate(waits):
            nursery.start_soon(note, number, wait)
    return [results[number] for number in range(len(waits))]


class Subject:
    """A mesh in a process of its own, somewhere in the lab."""

    def __init__(self, talk: trio.SocketStream, host: str) -> None:
        self.host = host
        self.line: Line | None = None
        self.key = ""
        self._pid = 0
        self._talk = talk
        self._sending = trio.Lock()
        self._answers: dict[int, dict[str, Any]] = {}
        self._arrived = trio.Condition()
        self._ids = itertools.count(1)

    async def read(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect the answers, until the process ends."""
        buffered = b""
        with suppress(trio.BrokenResourceError):
            async for data in self._talk:
                *lines, buffered = (buffered + data).split(b"\n")
                async with self._arrived:
                    for answer in map(json.loads, lines):
                        self._answers[answer["id"]] = answer
                        if answer["id"] == 0:
                            self.key, self._pid = answer["key"], answer["pid"]
                            task_status.started()
                    self._arrived.notify_all()

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give a command and wait for what it answers."""
        number = next(self._ids)
        async with self._sending:
            await self._talk.send_all(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
        with trio.fail_after(60):
            async with self._arrived:
                while number not in self._answers:
                    await self._arrived.wait()
        return self._answers.pop(number)

    async def info(self) -> dict[str, Any]:
        """State of the mesh."""
        return await self.ask("info")

    async def until(self, condition: Callable[[dict[str, Any]], bool], within_s: float = 45.0) -> dict[str, Any]:
        """Wait for a state of the mesh that other processes bring about; returns it."""
        latest: dict[str, Any] = {}
        with trio.move_on_after(within_s):
            while True:
                latest = await self.info()
                if condition(latest):
                    return latest
                await trio.sleep(0.05)
        raise AssertionError(f"not within {within_s} s; last seen: {latest}")

    async def knows(self, other: Subject) -> None:
        """Tell it the other's addresses."""
        told = (await other.info())["addresses"]
        await self.ask("know", peer=other.key, addresses=told)

    def kill(self) -> None:
        """End the process without a goodbye."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._pid = 0

    async def end(self) -> None:
        """Let the process end."""
        await trio.aclose_forcefully(self._talk)


class Line:
    """A slow line; it tells who begins TCP connections from inside."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.dials: list[tuple[float, str, str]] = []  # when, from, to

    def dialed(self, host: str) -> float:
        """When the last connection with a host was begun."""
        return max(when for when, _, to in self.dials if to == host)

    async def read(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect what it tells, until the process ends."""
        buffered = b""
        assert self._process.stdout is not None
        async for data in self._process.stdout:
            *lines, buffered = (buffered + data).split(b"\n")
            for line in lines:
                if line == b"ready":
                    task_status.started()
                    continue
                when, source, target = line.decode().split()
                self.dials.append((float(when), source, target))


class Internet:
    """Makes places and starts meshes in them."""

    def __init__(self, nursery: trio.Nursery, stack: AsyncExitStack, iptables: str, fork_server: socket.socket) -> None:
        self._nursery, self._stack, self._iptables, self._fork_server = nursery, stack, iptables, fork_server
        self._networks = iter(_NETWORKS)
        self._cables: dict[str, str] = {}  # the router's end of them, by address
        self.pre_shared_key = b""  # of all meshes that are started
        self.punching: dict[str, object] = {}  # other times than those that `holepunch` has
        self._router = self._namespace()
        namespaces.inside(self._router, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def _namespace(self) -> str:
        name = namespaces.add()
        self._stack.callback(namespaces.remove, name)
        return name

    def place(self) -> tuple[str, str]:
        """A machine with a public address: its namespace, its address."""
        namespace, network = self._namespace(), next(self._networks)
        self._cables[f"{network}.2"] = namespaces.plug(namespace, self._router, network)
        return namespace, f"{network}.2"

    def behind_nat(self, nat: Nat) -> str:
        """A machine in a home network; its namespace."""
        gateway, machine = self._namespace(), self._namespace()
        namespaces.plug(gateway, self._router, next(self._networks))
        self._at_home(gateway, machine, nat)
        return machine

    def _at_home(self, gateway: str, machine: str, nat: Nat) -> str:
        """Connect a machine with its NAT; the network inside."""
        inside = f"192.168.{next(_insides) % 200}"
        namespaces.plug(machine, gateway, inside)
        namespaces.masquerade(gateway, self._iptables, random_ports=nat == "random-ports")
        return inside

    def shut(self, namespace: str) -> None:
        """A firewall before a machine: connections can be begun from there only."""
        namespaces.inside(namespace, self._iptables, "-A", "INPUT", "-i", "up0", "-p", "tcp", "--syn", "-j", "DROP")

    async def peer(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Let a peer of another implementation run until the end of the test."""
        return await self._nursery.start(_hold, manager)

    async def host(self, *, relay: bool | None = None, **limits: object) -> Subject:
        """A mesh on a machine with a public address."""
        namespace, address = self.place()
        return await self._start(namespace, address, relay=relay, limits=limits)

    async def home(
        self,
        nat: Nat,
        *,
        forwards: bool = False,
        upnp: bool = False,
        delay_s: float | None = None,
        loss: float = 0.0,
        **limits: object,
    ) -> Subject:
        """A mesh in a home network, behind a NAT.

        With `forwards`, its owner has told the router to forward the port; with `upnp`, the router does when asked.
        `delay_s` is that of the line to the internet in each direction, `loss` the share of packets that it loses.
        """
        gateway, machine, network = self._namespace(), self._namespace(), next(self._networks)
        line = None
        if delay_s is None:
            namespaces.plug(gateway, self._router, network)
        else:
            line = await self._line(gateway, network, delay_s, loss)
        inside = self._at_home(gateway, machine, nat)
        if forwards:
            namespaces.forward(gateway, self._iptables, PORT, f"{inside}.2")
        if upnp:
            await self._router_with_upnp(gateway, f"{inside}.1", f"{network}.2")
        subject = await self._start(machine, f"{network}.2", relay=None, limits=limits, upnp=upnp)
        subject.line = line
        return subject

    async def hosts(self, count: int, **settings: Any) -> list[Subject]:
        """Several of a kind."""
        return await together(*(self.host(**settings) for _ in range(count)))

    async def _line(self, gateway: str, network: str, delay_s: float, loss: float) -> Line:
        outer = namespaces.new_interface()
        command = [
            sys.executable,
            "-m",
            "tests.netns.line_process",
            gateway,
            self._router,
            outer,
            str(delay_s),
            str(loss),
        ]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=ROOT)
        self._stack.push_async_callback(_end, process)
        line = Line(process)
        with trio.fail_after(30):
            await self._nursery.start(line.read)
        namespaces.configure(gateway, self._router, outer, network)
        return line

    async def _router_with_upnp(self, gateway: str, inner: str, outer: str) -> None:
        script = str(Path(__file__).with_name("igd_process.py"))
        command = ["ip", "netns", "exec", gateway, sys.executable, script, inner, outer, self._iptables]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        self._stack.push_async_callback(_end, process)
        assert process.stdout is not None
        with trio.fail_after(30):
            assert (await process.stdout.receive_some()).startswith(b"ready")

    async def _start(
        self, namespace: str, host: str, *, relay: bool | None, limits: dict[str, object], upnp: bool = False
    ) -> Subject:
        settings = {
            "namespace": namespace,
            "listen": [f"/ip4/0.0.0.0/tcp/{PORT}"],
            "relay": relay,
            "limits": _LIMITS | limits,
            "upnp": upnp,
            "pre_shared_key": self.pre_shared_key.hex(),
            "punching": self.punching,
        }
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._fork_server, [json.dumps(settings).encode()], [theirs.fileno()])
        subject = Subject(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), host)
        self._stack.push_async_callback(subject.end)
        with trio.fail_after(30):
            await self._nursery.start(subject.read)
        return subject

    def unplug(self, subject: Subject) -> None:
        """Cut the cable of a host: nobody is told that it is gone."""
        namespaces.run("ip", "-n", self._router, "link", "set", self._cables[subject.host], "down")

    async def connect(self, subject: Subject, *others: Subject) -> None:
        """Let a mesh stay connected with others, all of which have public addresses."""
        for other in others:
            await subject.ask("keep", peer=other.key, addresses=[f"/ip4/{other.host}/tcp/{PORT}"])
        await subject.until(lambda info: all(other.key in info["peers"] for other in others))


async def _hold(manager: AbstractAsyncContextManager[T], *, task_status: trio.TaskStatus[T]) -> None:
    async with manager as held:
        task_status.started(held)
        await trio.sleep_forever()


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.kill()
        await process.wait()


@pytest.fixture
async def internet(iptables: str, fork_server: socket.socket) -> AsyncIterator[Internet]:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        yield Internet(nursery, stack, iptables, fork_server)
        nursery.cancel_scope.cancel()
