"""A small internet of network namespaces: hosts with public addresses, and homes behind NATs of two kinds.

Every place hangs on one router by a cable of its own, in a network of its own with globally routable looking
addresses; nothing leaves the namespaces. Needs root, iproute2 and iptables; skipped with the reason otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

PORT = 4001
_PROCESS = Path(__file__).with_name("mesh_process.py")
_NETWORKS = ("45.81.7", "5.42.13", "62.109.21", "81.17.30", "91.60.44", "178.33.50", "193.5.60", "31.7.70")
_numbers = itertools.count()

Nat = Literal["keeps-ports", "random-ports"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def _inside(namespace: str, *command: str) -> None:
    _run("ip", "netns", "exec", namespace, *command)


def _iptables() -> str | None:
    """A working iptables: which of the two backends the kernel has differs."""
    for name in ("iptables", "iptables-legacy", "iptables-nft"):
        if shutil.which(name) is None:
            continue
        probe = f"kp{os.getpid()}-{next(_numbers)}"
        try:
            _run("ip", "netns", "add", probe)
            _inside(probe, name, "-t", "nat", "-A", "POSTROUTING", "-o", "w", "-p", "tcp", "-j", "MASQUERADE")
            _inside(probe, name, "-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
        except subprocess.CalledProcessError:
            continue
        else:
            return name
        finally:
            subprocess.run(("ip", "netns", "del", probe), check=False, capture_output=True)
    return None


@pytest.fixture(scope="session")
def iptables() -> str:
    """The name of the iptables to use."""
    if sys.platform != "linux":
        pytest.skip("network namespaces exist on Linux only")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed (package iproute2)")
    name = _iptables()
    if name is None:
        pytest.skip("no namespace with NAT can be made: iptables is not installed, or the kernel lacks it")
    return name


class Subject:
    """A mesh in a process of its own, somewhere in the lab."""

    def __init__(self, process: trio.Process, host: str) -> None:
        self.host = host
        self.key = ""
        self._process = process
        self._answers: dict[int, dict[str, Any]] = {}
        self._arrived = trio.Condition()
        self._ids = itertools.count(1)

    async def read(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect the answers, until the process ends."""
        buffered = b""
        assert self._process.stdout is not None
        async for data in self._process.stdout:
            *lines, buffered = (buffered + data).split(b"\n")
            async with self._arrived:
                for answer in map(json.loads, lines):
                    self._answers[answer["id"]] = answer
                    if answer["id"] == 0:
                        self.key = answer["key"]
                        task_status.started()
                self._arrived.notify_all()

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give a command and wait for what it answers."""
        number = next(self._ids)
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
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
        self._process.send_signal(signal.SIGKILL)


class Internet:
    """Makes places and starts meshes in them."""

    def __init__(self, nursery: trio.Nursery, stack: AsyncExitStack, iptables: str) -> None:
        self._nursery, self._stack, self._iptables = nursery, stack, iptables
        self._networks = iter(_NETWORKS)
        self._cables: dict[str, str] = {}  # the router's end of them, by address
        self.pre_shared_key = b""  # of all meshes that are started
        self._router = self._namespace()
        _inside(self._router, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def _namespace(self) -> str:
        name = f"kaisar{os.getpid()}-{next(_numbers)}"
        _run("ip", "netns", "add", name)
        self._stack.callback(subprocess.run, ("ip", "netns", "del", name), check=False, capture_output=True)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _cable(self, inner: str, outer: str, network: str) -> str:
        """Connect two namespaces; the outer one is .1 and the way to everywhere. Returns the outer interface."""
        outer_name = f"c{next(_numbers)}"
        _run("ip", "link", "add", "up0", "netns", inner, "type", "veth", "peer", "name", outer_name, "netns", outer)
        for namespace, interface, host in ((inner, "up0", 2), (outer, outer_name, 1)):
            _run("ip", "-n", namespace, "addr", "add", f"{network}.{host}/24", "dev", interface)
            _run("ip", "-n", namespace, "link", "set", interface, "up")
        _run("ip", "-n", inner, "route", "add", "default", "via", f"{network}.1")
        return outer_name

    async def host(self, *, relay: bool | None = None, **limits: object) -> Subject:
        """A mesh on a machine with a public address."""
        namespace, network = self._namespace(), next(self._networks)
        self._cables[f"{network}.2"] = self._cable(namespace, self._router, network)
        return await self._start(namespace, f"{network}.2", relay=relay, limits=limits)

    async def home(self, nat: Nat, *, forwards: bool = False, upnp: bool = False, **limits: object) -> Subject:
        """A mesh in a home network, behind a NAT that lets in what belongs to connections from inside only.

        With `forwards`, its owner has told the router to forward the port; with `upnp`, the router does when asked.
        """
        gateway, machine, network = self._namespace(), self._namespace(), next(self._networks)
        self._cable(gateway, self._router, network)
        inside = f"192.168.{next(_numbers) % 200}"
        self._cable(machine, gateway, inside)
        if forwards:
            to = ("-p", "tcp", "--dport", str(PORT))
            destination = f"{inside}.2:{PORT}"
            dnat = ("-t", "nat", "-A", "PREROUTING", "-i", "up0", *to, "-j", "DNAT", "--to-destination", destination)
            _inside(gateway, self._iptables, *dnat)
            _inside(gateway, self._iptables, "-A", "FORWARD", "-i", "up0", *to, "-j", "ACCEPT")
        _inside(gateway, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        ports = ("--random-fully",) if nat == "random-ports" else ()
        established = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED")
        for rule in (
            ("-t", "nat", "-A", "POSTROUTING", "-o", "up0", "-p", "tcp", "-j", "MASQUERADE", *ports),
            ("-A", "FORWARD", "-i", "up0", *established, "-j", "ACCEPT"),
            ("-A", "FORWARD", "-i", "up0", "-j", "DROP"),
            ("-A", "INPUT", "-i", "up0", "-j", "DROP"),
        ):
            _inside(gateway, self._iptables, *rule)
        if upnp:
            await self._router_with_upnp(gateway, f"{inside}.1", f"{network}.2")
        return await self._start(machine, f"{network}.2", relay=None, limits=limits, upnp=upnp)

    async def _router_with_upnp(self, gateway: str, inner: str, outer: str) -> None:
        script = str(_PROCESS.with_name("igd_process.py"))
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
            "listen": [f"/ip4/0.0.0.0/tcp/{PORT}"],
            "relay": relay,
            "limits": limits,
            "upnp": upnp,
            "pre_shared_key": self.pre_shared_key.hex(),
        }
        command = ["ip", "netns", "exec", namespace, sys.executable, str(_PROCESS), json.dumps(settings)]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stack.push_async_callback(_end, process)
        subject = Subject(process, host)
        with trio.fail_after(30):
            await self._nursery.start(subject.read)
        return subject

    def unplug(self, subject: Subject) -> None:
        """Cut the cable of a host: nobody is told that it is gone."""
        _run("ip", "-n", self._router, "link", "set", self._cables[subject.host], "down")

    async def connect(self, subject: Subject, *others: Subject) -> None:
        """Let a mesh stay connected with others, all of which have public addresses."""
        for other in others:
            await subject.ask("keep", peer=other.key, addresses=[f"/ip4/{other.host}/tcp/{PORT}"])
        await subject.until(lambda info: all(other.key in info["peers"] for other in others))


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.kill()
        await process.wait()


@pytest.fixture
async def internet(iptables: str) -> AsyncIterator[Internet]:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        yield Internet(nursery, stack, iptables)
        nursery.cancel_scope.cancel()
