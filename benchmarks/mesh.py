"""The mesh on loopback: one stream against raw trio TCP, requests on new streams, gossip, the cost of the import."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from statistics import median, quantiles

import trio

from benchmarks import Figure
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh, peer_of
from kaisar_p2p.wire.verdict import Verdict

_SECONDS = 2.0
_CHUNK = bytes(64 * 1024)
_REQUESTS = 500
_NODES = 10
_MESSAGES = 300
_MESSAGE_BYTES = 1024
_RATE_PER_S = 60.0


def figures() -> list[Figure]:
    """Two processes for streams and requests, ten nodes in one process for gossip."""
    with _server() as addresses:
        raw, stream, latencies_ms = trio.run(_as_client, *addresses)
    p50, p99 = median(latencies_ms), quantiles(latencies_ms, n=100)[98]
    gossip_ms, delivered = trio.run(_gossip)
    import_s, import_mb = _import_cost()
    return [
        Figure(
            figure="one stream, 64 KiB writes, two processes",
            value=stream / 1e6,
            unit="MB/s",
            peer="raw trio TCP",
            ratio=stream / raw,
            target="≥ 0.15",
            ok=stream / raw >= 0.15,
        ),
        Figure(
            figure="request on a new stream, p50",
            value=p50,
            unit="ms",
            peer="its own p99",
            ratio=p50 / p99,
            target="≤ 1 ms",
            ok=p50 <= 1.0,
        ),
        Figure(
            figure=f"gossip, {_NODES} nodes, {_RATE_PER_S:.0f}/s of 1 KiB: CPU per message and node",
            value=gossip_ms,
            unit="ms",
            target="≤ 1 ms",
            ok=gossip_ms <= 1.0,
        ),
        Figure(
            figure="the same: delivered",
            value=100 * delivered,
            unit="%",
            target="100 %",
            ok=delivered == 1.0,
        ),
        Figure(figure="import of the mesh, CPU", value=import_s, unit="s", target="≤ 0.8 s", ok=import_s <= 0.8),
        Figure(figure="import of the mesh, memory", value=import_mb, unit="MB", target="≤ 60 MB", ok=import_mb <= 60),
    ]


# -- streams and requests ---------------------------------------------------------------------------------------------


@contextmanager
def _server() -> Iterator[tuple[int, str]]:
    """Another process: the port of its raw TCP service and the address of its mesh."""
    command = [sys.executable, "-c", "from benchmarks.mesh import serve; serve()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port, multiaddr = process.stdout.readline().split()
            yield int(port), multiaddr
        finally:
            process.kill()


def serve() -> None:
    """The other process: floods whoever connects, by TCP or by stream, and echoes requests."""
    trio.run(_serve)


async def _serve() -> None:
    config = MeshConfig(limits=MeshLimits(opens_per_s=1e6))
    async with open_mesh(config, os.urandom(32)) as mesh, trio.open_nursery() as nursery:
        mesh.serve("/flood", _flood_stream, max_frame_bytes=1)
        mesh.serve("/echo", _echo, max_frame_bytes=1024, rate_per_s=1e6)
        (listener,) = await nursery.start(partial(trio.serve_tcp, _flood_tcp, 0, host="127.0.0.1"))
        print(listener.socket.getsockname()[1], mesh.addrs[0], flush=True)


async def _flood_stream(stream: MeshStream) -> None:
    while True:
        await stream.send_some(_CHUNK)


async def _flood_tcp(tcp: trio.SocketStream) -> None:
    try:
        while True:
            await tcp.send_all(_CHUNK)
    except trio.BrokenResourceError:
        return


async def _echo(stream: MeshStream) -> None:
    await stream.send_frame(await stream.receive_frame())


async def _as_client(port: int, multiaddr: str) -> tuple[float, float, list[float]]:
    """Bytes a second of raw TCP and of one stream, and the milliseconds of each request."""
    key, address = peer_of(multiaddr)
    async with open_mesh(MeshConfig(), os.urandom(32)) as mesh, await trio.open_tcp_stream("127.0.0.1", port) as tcp:
        mesh.add_addresses(key, [address])
        raw = await _bytes_per_s(tcp)
        await tcp.aclose()
        stream = await mesh.open_stream(key, "/flood", timeout_s=10, max_frame_bytes=1)
        rate = await _bytes_per_s(stream)
        await stream.reset()
        return raw, rate, [await _request_ms(mesh, key) for _ in range(_REQUESTS)]


async def _bytes_per_s(source: MeshStream | trio.SocketStream) -> float:
    total, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        total += len(await source.receive_some(256 * 1024))
    return total / (time.perf_counter() - began)


async def _request_ms(mesh: Mesh, key: bytes) -> float:
    began = time.perf_counter()
    await mesh.request(key, "/echo", bytes(100), deadline_s=10, max_reply_bytes=1024)
    return 1000 * (time.perf_counter() - began)


# -- gossip -----------------------------------------------------------------------------------------------------------


async def _gossip() -> tuple[float, float]:
    """CPU milliseconds per message and node, and the part of the messages that arrived."""
    async with AsyncExitStack() as stack:
        meshes = [await stack.enter_async_context(open_mesh(MeshConfig(), os.urandom(32))) for _ in range(_NODES)]
        channels = [mesh.subscribe("bench", _accept, queue=_MESSAGES) for mesh in meshes]
        for mesh in meshes[1:]:
            mesh.keep_connected(meshes[0].key, meshes[0].addrs)
        with trio.fail_after(60):
            for mesh in meshes:
                await mesh.wait_connected(6)
        await trio.sleep(3)  # until the topic's mesh has formed
        began = time.process_time()
        for number in range(_MESSAGES):
            await meshes[number % _NODES].publish("bench", os.urandom(_MESSAGE_BYTES))
            await trio.sleep(1 / _RATE_PER_S)
        await trio.sleep(1)
        spent_ms = 1000 * (time.process_time() - began)
        arrived = sum(channel.statistics().current_buffer_used for channel in channels)
    return spent_ms / _MESSAGES / _NODES, arrived / (_MESSAGES * (_NODES - 1))


def _accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


# -- import -----------------------------------------------------------------------------------------------------------


def _import_cost() -> tuple[float, float]:
    """CPU seconds and peak megabytes of a process that imports the mesh and nothing else."""
    script = (
        "import kaisar_p2p.mesh, time;"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'));"
        "print(time.process_time(), int(status['VmHWM'].split()[0]) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    seconds, megabytes = done.stdout.split()
    return float(seconds), float(megabytes)
