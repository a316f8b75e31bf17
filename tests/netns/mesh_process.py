"""Meshes in processes of their own, each in a network namespace: they obey lines of JSON and answer each with one.

Started once by the tests, with a socket for stdin; every message there is a namespace and the settings of a mesh, with
a socket to talk over. Each mesh is a fork: what takes longest is to import everything.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import parse_any
from kaisar_p2p.mesh.reach import holepunch
from kaisar_p2p.wire.verdict import Verdict
from tests.netns.namespaces import enter

_PIECE = 16 * 1024

Command = Callable[[Mesh, dict[str, Any]], Awaitable[dict[str, Any]]]


class Subject:
    """What the process remembers between commands."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.streams: dict[str, MeshStream] = {}
        self.punched = 0
        self.joined: Counter[str] = Counter()  # connections, by peer and kind

    def watch(self, mesh: Mesh) -> None:
        """Count the connections, and the attempts to punch holes."""
        on_connected, punch = mesh._network.on_connected, mesh._relaying._punch._punch_as_leader

        def count(connection: Connection) -> None:
            self.joined[f"{connection.key.hex()} {'relayed' if connection.relayed else 'direct'}"] += 1
            on_connected(connection)

        async def count_attempt(connection: Connection) -> None:
            try:
                await punch(connection)
            finally:
                self.punched += 1

        mesh._network.on_connected = count
        mesh._relaying._punch._punch_as_leader = count_attempt

    async def info(self, mesh: Mesh, _arguments: dict[str, Any]) -> dict[str, Any]:
        reach, relay = mesh.reachability(), mesh.relay_statistics()
        return {
            "key": mesh.key.hex(),
            "addresses": list(mesh.addrs),
            "peers": {info.key.hex(): info.relayed for info in mesh.peers()},
            "reach": reach.status,
            "how": reach.how,
            "mapping": mesh.port_mapping(),
            "reached_at": list(reach.addresses),
            "observed": list(reach.observed),
            "keeps_ports": reach.keeps_ports,
            "clock_skew_s": reach.clock_skew_s,
            "reservations": relay.reservations,
            "circuits": relay.circuits,
            "circuits_total": relay.circuits_total,
            "relayed_bytes": relay.relayed_bytes,
            "refused": relay.refused,
            "open_files": len(os.listdir("/proc/self/fd")),
            "connections": mesh.statistics().connections,
            "joined": dict(self.joined),
            "punched": self.punched,
            "heard": self.heard,
            "subscribers": [key.hex() for key in mesh.subscribers("news")],
        }

    async def keep(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        mesh.keep_connected(bytes.fromhex(arguments["peer"]), arguments["addresses"])
        return {}

    async def reserve(self, mesh: Mesh, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Be reachable through relays, whatever else it is."""
        mesh._relaying.client.want(True)
        return {}

    async def dial(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        """Connect with a peer at this very address."""
        await mesh._network.dial(bytes.fromhex(arguments["peer"]), [parse_any(arguments["address"])[0]])
        return {}

    async def know(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        mesh.add_addresses(bytes.fromhex(arguments["peer"]), arguments["addresses"])
        return {}

    async def subscribe(self, mesh: Mesh, _arguments: dict[str, Any]) -> dict[str, Any]:
        mesh.subscribe("news", self._hear)
        return {}

    def _hear(self, data: bytes, *_message: object) -> tuple[Verdict, str]:
        self.heard.append(data.decode())
        return Verdict.ACCEPT, ""

    async def publish(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        await mesh.publish("news", arguments["text"].encode())
        return {}

    async def echo(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        """A request on a new stream."""
        payload = os.urandom(arguments["size"])
        answer = await mesh.request(
            bytes.fromhex(arguments["peer"]),
            "/echo",
            payload,
            deadline_s=arguments["deadline_s"],
            max_reply_bytes=1 << 22,
        )
        return {"same": answer == payload}

    async def tunnel(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        """Open a stream that stays open, under a name."""
        peer = bytes.fromhex(arguments["peer"])
        stream = await mesh.open_stream(peer, "/pipe", timeout_s=arguments["deadline_s"], max_frame_bytes=1024)
        self.streams[arguments["name"]] = stream
        return {}

    async def through(self, _mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send bytes through an open stream, which come back."""
        stream, left = self.streams[arguments["name"]], arguments["size"]
        with trio.fail_after(arguments["deadline_s"]):
            while left:
                piece = os.urandom(min(left, _PIECE))
                await stream.send_some(piece)
                answer = b""
                while len(answer) < len(piece):
                    part = await stream.receive_some()
                    if not part:
                        return {"same": False}
                    answer += part
                if answer != piece:
                    return {"same": False}
                left -= len(piece)
        return {"same": True}


async def _echo(stream: MeshStream) -> None:
    await stream.send_frame(await stream.receive_frame())


async def _pipe(stream: MeshStream) -> None:
    while data := await stream.receive_some():
        await stream.send_some(data)


async def _obey(mesh: Mesh, subject: Subject, line: str) -> None:
    arguments = json.loads(line)
    try:
        command: Command = getattr(subject, arguments["do"])
        answer = await command(mesh, arguments)
    except (KaisarError, trio.TooSlowError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"id": arguments["id"], **answer}), flush=True)


async def main(settings: dict[str, Any]) -> None:
    """Run one mesh until stdin ends."""
    config = MeshConfig(
        listen=tuple(settings["listen"]),
        network="lab",
        relay=settings["relay"],
        pre_shared_key=bytes.fromhex(settings["pre_shared_key"]) or None,
        upnp=settings["upnp"],
        mdns=False,
        limits=MeshLimits(**settings["limits"]),
    )
    for name, value in settings["punching"].items():
        setattr(holepunch, name, value)
    subject = Subject()
    async with open_mesh(config, os.urandom(32)) as mesh, trio.open_nursery() as nursery:
        subject.watch(mesh)
        mesh.serve("/echo", _echo, max_frame_bytes=1 << 22)
        mesh.serve("/pipe", _pipe, max_frame_bytes=1024)
        print(json.dumps({"id": 0, "key": mesh.key.hex(), "pid": os.getpid()}), flush=True)
        buffered = b""
        stdin = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        async for data in stdin:
            *lines, buffered = (buffered + data).split(b"\n")
            for line in lines:
                nursery.start_soon(_obey, mesh, subject, line.decode())
        nursery.cancel_scope.cancel()


def _be_a_mesh(order: bytes, talk: int) -> None:
    """What a fork does; it does not return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(talk, 0)
        os.dup2(talk, 1)
        os.close(talk)
        settings = json.loads(order)
        enter(settings["namespace"])
        trio.run(main, settings)
    except OSError as error:
        print(f"mesh_process: {error}", file=sys.stderr)
    finally:
        os._exit(0)


def fork_on_demand() -> None:
    """Until the other end of stdin is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=os.dup(0)) as orders:
        while True:
            order, descriptors, _, _ = socket.recv_fds(orders, 65536, 1)
            if not order:
                return
            if os.fork() == 0:
                orders.close()
                _be_a_mesh(order, descriptors[0])
            os.close(descriptors[0])


if __name__ == "__main__":
    if os.environ.get("KAISAR_LAB_LOG"):
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(process)d %(name)s %(message)s")
        logging.getLogger("multiaddr").setLevel(logging.INFO)
    fork_on_demand()
