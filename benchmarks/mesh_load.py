"""Peers that use a mesh node as peers of every kind do, well and badly; `benchmarks.soak` starts this in processes.

`python -m benchmarks.mesh_load cycles KEY ADDRESS COUNT` connects COUNT times, from `COUNT / 20` identities: identify,
ping, request, gossip, and away, every second time without a goodbye. `... mixed KEY ADDRESS SECONDS` is half an hour of
everybody's day. Both print a line of JSON now and then: cycles done, failures, round trips of requests.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, open_mesh
from kaisar_p2p.wire.verdict import Verdict

_DEADLINE_S = 20.0
_AT_A_TIME = 4
_REPORT_S = 0.2
_LIMITS = MeshLimits(target_peers=0)  # only the subject is dialed
_BULK_BYTES = 4 * 1024 * 1024


@dataclass
class Progress:
    """What is told to the process above."""

    cycles: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)  # s
    bulk_bytes: int = 0

    def fail(self, error: BaseException) -> None:
        """Count a failure by its kind."""
        name = f"{type(error).__name__}: {error}"[:120]
        self.failures[name] = self.failures.get(name, 0) + 1

    def say(self) -> None:
        """One line on standard output."""
        sys.stdout.write(json.dumps(self.__dict__) + "\n")
        sys.stdout.flush()
        self.latencies = []


@dataclass(frozen=True)
class Target:
    """The node under load."""

    key: bytes
    address: str

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Where it listens."""
        parts = self.address.split("/")
        return parts[2], int(parts[4])


@asynccontextmanager
async def _peer(target: Target, seed: bytes) -> AsyncIterator[Mesh]:
    config = MeshConfig(network="subject", limits=_LIMITS, upnp=False, mdns=False)
    async with open_mesh(config, seed) as mesh:
        mesh.add_addresses(target.key, [target.address])
        yield mesh


def _accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


async def _identify(mesh: Mesh, target: Target) -> None:
    stream = await mesh.open_stream(target.key, "/ipfs/id/1.0.0", timeout_s=_DEADLINE_S, max_frame_bytes=1)
    async with stream:
        size = 0
        while data := await stream.receive_some():
            size += len(data)
    if not size:
        raise RuntimeError("identify told nothing")


async def _ping(mesh: Mesh, target: Target) -> None:
    stream = await mesh.open_stream(target.key, "/ipfs/ping/1.0.0", timeout_s=_DEADLINE_S, max_frame_bytes=1)
    async with stream:
        sent, back = os.urandom(32), b""
        await stream.send_some(sent)
        while len(back) < 32 and (data := await stream.receive_some()):
            back += data
    if back != sent:
        raise RuntimeError("ping came back changed")


async def _request(mesh: Mesh, target: Target, progress: Progress) -> None:
    began, payload = time.monotonic(), os.urandom(200)
    reply = await mesh.request(target.key, "/echo", payload, deadline_s=_DEADLINE_S, max_reply_bytes=200)
    progress.latencies.append(time.monotonic() - began)
    if reply != payload:
        raise RuntimeError("the echo differs")


async def _gossip(mesh: Mesh, target: Target) -> None:
    while target.key not in mesh.subscribers("advert"):  # noqa: ASYNC110  (tests wait like this, too)
        await trio.sleep(0.005)
    await mesh.publish("advert", b"ok" + os.urandom(300))


def _break(mesh: Mesh, rng: random.Random) -> None:
    """End every connection as a crash does (a reset of TCP) or as a cut wire does (nothing is said)."""
    for key in mesh._network.connected_keys():
        for connection in mesh._network.connections_with(key):
            raw = getattr(connection.muxer._session._raw, "stream", None)
            if rng.random() < 0.5 and isinstance(raw, trio.SocketStream):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.muxer.abort()


async def _cycle(target: Target, number: int, identities: int, progress: Progress) -> None:
    rng = random.Random(number)
    seed = hashlib.sha256(b"soak %d" % (number % identities)).digest()
    if number % 20 == 19:
        await _garbage(target, rng)
    try:
        with trio.fail_after(_DEADLINE_S):
            async with _peer(target, seed) as mesh:
                mesh.subscribe("advert", _accept)
                await _request(mesh, target, progress)
                await _identify(mesh, target)
                await _ping(mesh, target)
                await _gossip(mesh, target)
                if number % 2:
                    _break(mesh, rng)
    except (KaisarError, RuntimeError, trio.TooSlowError) as error:
        progress.fail(error)
    progress.cycles += 1


async def _garbage(target: Target, rng: random.Random) -> None:
    """A stranger that says something else than a handshake, and leaves."""
    first = rng.choice([b"", b"\x13/multistream/1.0.0\n\x07/noise\n", b"GET / HTTP/1.1\r\n\r\n"])
    try:
        tcp = await trio.open_tcp_stream(*target.host_and_port)
        async with tcp:
            await tcp.send_all(first + rng.randbytes(rng.randrange(300)))
            with trio.move_on_after(0.05):
                await tcp.receive_some(100)
    except (OSError, trio.BrokenResourceError):
        return


async def cycles(target: Target, count: int) -> None:
    """`count` connections, a few at a time."""
    progress, numbers = Progress(), iter(range(count))

    async def work() -> None:
        for number in numbers:
            await _cycle(target, number, max(1, count // 20), progress)

    await _reported(progress, [work] * _AT_A_TIME)


# -- mixed traffic ----------------------------------------------------------------------------------------------------


async def mixed(target: Target, seconds: float) -> None:
    """Three steady peers, four topics, requests, bulk streams both ways, peers that come and go, and garbage."""
    progress = Progress()
    jobs: list[Callable[[], Awaitable[None]]] = []
    for number in range(3):
        jobs.append(lambda n=number: _steady(target, n, progress))  # type: ignore[misc]
    jobs.append(lambda: _churn(target, progress))
    with trio.move_on_after(seconds):
        await _reported(progress, jobs)
    progress.say()


async def _steady(target: Target, number: int, progress: Progress) -> None:
    seed = hashlib.sha256(b"steady %d" % number).digest()
    async with _peer(target, seed) as mesh, trio.open_nursery() as nursery:
        mesh.keep_connected(target.key, [target.address])
        for topic in ("certificate", "evidence", "advert", "heartbeat"):
            nursery.start_soon(_drain, mesh.subscribe(topic, _accept))
            nursery.start_soon(
                _every, 0.25, lambda topic=topic: mesh.publish(topic, b"ok" + os.urandom(1000)), progress
            )
        nursery.start_soon(_every, 0.1, lambda: _request(mesh, target, progress), progress)
        nursery.start_soon(_every, 10.0, lambda: _bulk(mesh, target, progress), progress)


async def _drain(channel: trio.MemoryReceiveChannel[object]) -> None:
    async for _message in channel:
        pass


async def _every(interval_s: float, act: Callable[[], Awaitable[None]], progress: Progress) -> None:
    while True:
        began = trio.current_time()
        try:
            await act()
        except (KaisarError, RuntimeError) as error:
            progress.fail(error)
        await trio.sleep(max(0.0, began + interval_s - trio.current_time()))


async def _bulk(mesh: Mesh, target: Target, progress: Progress) -> None:
    """Megabytes there, and the same as one-frame echoes back."""
    stream = await mesh.open_stream(target.key, "/sink", timeout_s=_DEADLINE_S, max_frame_bytes=1)
    chunk = os.urandom(64 * 1024)
    async with stream:
        for _ in range(_BULK_BYTES // len(chunk)):
            await stream.send_some(chunk)
            progress.bulk_bytes += len(chunk)
    for _ in range(8):
        back = await mesh.request(target.key, "/echo", chunk, deadline_s=_DEADLINE_S, max_reply_bytes=len(chunk))
        progress.bulk_bytes += 2 * len(back)


async def _churn(target: Target, progress: Progress) -> None:
    number = 0
    while True:
        await _cycle(target, number, 40, progress)
        number += 1
        await trio.sleep(0.5)


async def _reported(progress: Progress, jobs: list[Callable[[], Awaitable[None]]]) -> None:
    async with trio.open_nursery() as outer:
        outer.start_soon(_report, progress)
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
        outer.cancel_scope.cancel()
    progress.say()


async def _report(progress: Progress) -> None:
    while True:
        await trio.sleep(_REPORT_S)
        progress.say()


def main() -> None:
    """Load the node named on the command line."""
    kind, key, address, amount = sys.argv[1:]
    target = Target(bytes.fromhex(key), address.split("/p2p/")[0])
    if kind == "cycles":
        trio.run(cycles, target, int(amount))
    else:
        trio.run(mixed, target, float(amount))


if __name__ == "__main__":
    main()
