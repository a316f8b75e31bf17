"""A mesh node in a process of its own, to be loaded and attacked: the soak and the attack tests watch it from outside.

`python -m benchmarks.mesh_subject [JSON]` opens a mesh, prints one line of JSON (key, addresses), and
answers commands, one JSON object a line on standard input, with one line each on standard output:

* ``{"do": "figures"}``: tasks, connections, sizes of what is remembered about peers, counters of the mesh;
* ``{"do": "connect", "key": hex, "addresses": [...]}``: stay connected with a peer;
* ``{"do": "probe", "peers": [hex], "interval_s": x}``: from now on ask these peers, and publish, at this interval;
* ``{"do": "latencies"}``: the round trips of the probes and the gossip delays since the last question, seconds;
* ``{"do": "publish", "topic": name, "data": hex}``, and ``pause`` and ``resume`` of our own reading of a topic.

Options: `listen`, `seed` (hex), `limits` (fields of MeshLimits), `clock_offset_s` (a wrong clock).

It serves ``/echo`` (one frame back), ``/sink`` (reads everything), ``/slow`` (never answers) and ``/fails`` (raises),
and subscribes to the topics of a node.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import trio

from kaisar_p2p.errors import MeshError
from kaisar_p2p.mesh import GossipMessage, Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh
from kaisar_p2p.wire.verdict import Verdict

TOPICS = {"certificate": 0, "evidence": 1, "advert": 2, "heartbeat": 2}
"""Topics of the subject, with their priorities."""

_STAMP = struct.Struct("!d8s")  # when it was published, by the clock that all processes of a machine share; where
_PROBE_DEADLINE_S = 5.0
_ANSWER_S = 4.0


class Probe:
    """An honest peer's traffic: requests at an interval, certificates at the same, and how long they took."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._name = os.urandom(8)
        self._published = 0
        self.requests: list[float] = []
        self.gossip: list[float] = []
        self.failures: list[str] = []

    async def run(self, peers: list[bytes], interval_s: float) -> None:
        """Ask and publish until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish, interval_s)
            for peer in peers:
                nursery.start_soon(self._ask, peer, interval_s)

    async def _ask(self, peer: bytes, interval_s: float) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._mesh.request(
                    peer, "/echo", os.urandom(64), deadline_s=_PROBE_DEADLINE_S, max_reply_bytes=64
                )
                self.requests.append(time.monotonic() - began)
            except MeshError as error:
                self.failures.append(error.message)
            await trio.sleep(max(0.0, began + interval_s - time.monotonic()))

    async def _publish(self, interval_s: float) -> None:
        while True:
            await self._mesh.publish("certificate", _STAMP.pack(time.monotonic(), self._name) + bytes(400))
            self._published += 1
            await trio.sleep(interval_s)

    def note(self, message: GossipMessage) -> None:
        """A certificate arrived; those of other probes say when they left."""
        if len(message.data) == _STAMP.size + 400:
            left, name = _STAMP.unpack_from(message.data)
            if name != self._name:
                self.gossip.append(time.monotonic() - left)

    def take(self) -> dict[str, Any]:
        """What was measured since the last time."""
        taken = {
            "requests": self.requests,
            "gossip": self.gossip,
            "failures": self.failures,
            "published": self._published,
        }
        self.requests, self.gossip, self.failures, self._published = [], [], [], 0
        return taken


class Subject:
    """The commands of one node."""

    def __init__(self, mesh: Mesh, nursery: trio.Nursery) -> None:
        self._mesh, self._nursery = mesh, nursery
        self._probe = Probe(mesh)
        self.received = dict.fromkeys(TOPICS, 0)
        self._open: dict[str, trio.Event] = {}  # set when a paused topic is read again
        self._serve_and_subscribe()

    def _serve_and_subscribe(self) -> None:
        generous: dict[str, Any] = {"per_peer": 32, "rate_per_s": 200.0}
        self._mesh.serve("/echo", _echo, max_frame_bytes=64 * 1024, **generous)
        self._mesh.serve("/sink", _sink, max_frame_bytes=64 * 1024, **generous)
        self._mesh.serve("/slow", _slow, max_frame_bytes=64 * 1024, per_peer=8)
        self._mesh.serve("/fails", _fails, max_frame_bytes=64 * 1024, **generous)
        for name, priority in TOPICS.items():
            channel = _subscribe(self._mesh, name, priority)
            self._nursery.start_soon(self._receive, name, channel)

    async def _receive(self, name: str, channel: trio.MemoryReceiveChannel[GossipMessage]) -> None:
        async for message in channel:
            if name in self._open:
                await self._open[name].wait()
            self.received[name] += 1
            if name == "certificate":
                self._probe.note(message)

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a line of standard input asks for."""
        match command["do"]:
            case "figures":
                return figures_of(self._mesh) | {"received": self.received}
            case "connect":
                self._mesh.keep_connected(bytes.fromhex(command["key"]), command["addresses"])
            case "probe":
                peers = [bytes.fromhex(key) for key in command["peers"]]
                self._nursery.start_soon(self._probe.run, peers, float(command["interval_s"]))
            case "latencies":
                return self._probe.take()
            case "publish":
                data = bytes.fromhex(command["data"])
                self._nursery.start_soon(self._mesh.publish, command["topic"], data)
            case "pause":  # a consumer that is slow
                self._open[command["topic"]] = trio.Event()
            case "resume":
                self._open.pop(command["topic"]).set()
            case unknown:
                return {"error": f"unknown command {unknown!r}"}
        return {}


def figures_of(mesh: Mesh) -> dict[str, Any]:
    """Sizes of what a mesh holds, and its counters, for a line of JSON."""
    statistics = _with_text_keys(asdict(mesh.statistics()))
    network, book = mesh._network, mesh._book
    return {
        **statistics,
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "addresses": sum(len(book.of(key)) for key in book.peers()),
        "known_peers": len(book.peers()),
        "peerstore": len(network.peerstore.peer_ids()),
        "peer_keys": [info.key.hex() for info in mesh.peers()],
        "scores": {info.key.hex(): info.score for info in mesh.peers()},
        "subscribers": {name: len(mesh.subscribers(name)) for name in TOPICS},
    }


def _with_text_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        "/".join(map(str, key)) if isinstance(key, tuple) else key: _with_text_keys(part) for key, part in value.items()
    }


def _subscribe(mesh: Mesh, name: str, priority: int) -> trio.MemoryReceiveChannel[GossipMessage]:
    return mesh.subscribe(name, _judge, queue=1024, priority=priority)


def _judge(data: bytes, _sender: bytes, _author: bytes, _received_at: float) -> tuple[Verdict, str]:
    """The first bytes of a message say what its verdict is, so that an attacker can choose it."""
    if data.startswith(b"reject"):
        return Verdict.REJECT, "it says so itself"
    if data.startswith(b"ignore"):
        return Verdict.IGNORE, "it says so itself"
    if data.startswith(b"raise"):
        raise RuntimeError("a bug in a validator")
    return Verdict.ACCEPT, ""


async def _echo(stream: MeshStream) -> None:
    with trio.fail_after(_ANSWER_S):
        await stream.send_frame(await stream.receive_frame())


async def _sink(stream: MeshStream) -> None:
    while await stream.receive_some():
        pass


async def _slow(_stream: MeshStream) -> None:
    await trio.sleep(10)


async def _fails(stream: MeshStream) -> None:
    await stream.receive_frame()
    raise RuntimeError("a bug in a handler")


def _turn_clock(offset_s: float) -> None:
    """What a process on a machine with a wrong clock sees."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + offset_s
    time.time_ns = lambda: now_ns() + int(offset_s * 1e9)


async def _run(options: Mapping[str, Any]) -> None:
    limits = replace(MeshLimits(), **options.get("limits", {}))
    listen = tuple(options.get("listen", ("/ip4/127.0.0.1/tcp/0",)))
    # Nothing reaches outside this machine: no router is asked, nobody is looked for on the network.
    config = MeshConfig(listen=listen, network="subject", limits=limits, upnp=False, mdns=False)
    seed = bytes.fromhex(options["seed"]) if "seed" in options else os.urandom(32)
    async with open_mesh(config, seed) as mesh, trio.open_nursery() as nursery:
        subject = Subject(mesh, nursery)
        _say({"key": mesh.key.hex(), "addresses": mesh.addrs})
        try:
            await _answer_lines(subject)
        finally:
            nursery.cancel_scope.cancel()


async def _answer_lines(subject: Subject) -> None:
    buffer = bytearray()
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as lines:
        while data := await lines.receive_some(64 * 1024):
            buffer += data
            while (end := buffer.find(b"\n")) >= 0:
                line, buffer = bytes(buffer[:end]), buffer[end + 1 :]
                _say(subject.answer(json.loads(line)))


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run until standard input ends."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    _turn_clock(options.get("clock_offset_s", 0.0))
    try:
        trio.run(_run, options)
    except* KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
