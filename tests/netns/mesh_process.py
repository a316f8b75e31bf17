"""One mesh in a process of its own, which obeys lines of JSON on stdin and answers each with one on stdout.

Started by the tests inside a network namespace: `mesh_process.py '{"listen": …, "relay": …, "limits": {…}}'`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh
from kaisar_p2p.wire.verdict import Verdict

_PIECE = 16 * 1024

Command = Callable[[Mesh, dict[str, Any]], Awaitable[dict[str, Any]]]


class Subject:
    """What the process remembers between commands."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.streams: dict[str, MeshStream] = {}

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
            "heard": self.heard,
            "subscribers": [key.hex() for key in mesh.subscribers("news")],
        }

    async def keep(self, mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Any]:
        mesh.keep_connected(bytes.fromhex(arguments["peer"]), arguments["addresses"])
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
    """Run until stdin ends."""
    config = MeshConfig(
        listen=tuple(settings["listen"]),
        network="lab",
        relay=settings.get("relay"),
        pre_shared_key=bytes.fromhex(settings["pre_shared_key"]) or None,
        upnp=settings.get("upnp", False),
        mdns=False,
        limits=MeshLimits(**settings.get("limits", {})),
    )
    subject = Subject()
    async with open_mesh(config, os.urandom(32)) as mesh, trio.open_nursery() as nursery:
        mesh.serve("/echo", _echo, max_frame_bytes=1 << 22)
        mesh.serve("/pipe", _pipe, max_frame_bytes=1024)
        print(json.dumps({"id": 0, "key": mesh.key.hex()}), flush=True)
        buffered = b""
        stdin = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        async for data in stdin:
            *lines, buffered = (buffered + data).split(b"\n")
            for line in lines:
                nursery.start_soon(_obey, mesh, subject, line.decode())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    if os.environ.get("KAISAR_LAB_LOG"):
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s %(message)s")
        logging.getLogger("multiaddr").setLevel(logging.INFO)
    trio.run(partial(main, json.loads(sys.argv[1])))
