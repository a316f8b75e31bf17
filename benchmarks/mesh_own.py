"""Figures of our own mesh that need no other implementation: gossip beside a bulk stream, idle connections."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AsyncExitStack
from functools import partial
from statistics import median

import trio

from benchmarks import Figure
from benchmarks.mesh_gossip import TOPIC, swarm, window
from benchmarks.mesh_pairs import OURS, START
from benchmarks.peers.interface import Peer, PeerConfig

_RATE_PER_S = 60.0
_WINDOW_S = 6.0
_BULK_BYTES, _CHUNK = 64_000_000, 65_536
_IDLE, _DIALERS = 1000, 4
_SETTLE_S, _IDLE_S = 90.0, 30.0
_MOST_MB, _MOST_CORE = 150.0, 0.02


async def bulk_beside_gossip(rounds: int) -> list[Figure]:
    """Gossip among four nodes, alone and while two of them have a stream at full speed."""
    idle, busy = [], []
    async with swarm(OURS, 4) as peers:
        for _ in range(rounds):
            idle.append((await window(peers, _RATE_PER_S, _WINDOW_S)).p99_ms)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_for_ever, peers[0], peers[1].key)
                busy.append((await window(peers, _RATE_PER_S, _WINDOW_S)).p99_ms)
                nursery.cancel_scope.cancel()
    ratio = median(busy) / median(idle)
    return [
        Figure(
            figure="gossip p99 beside a bulk stream, 4 processes, 60/s",
            value=median(busy),
            unit="ms",
            peer=f"its p99 alone, {median(idle):.1f} ms",
            ratio=ratio,
            target="≤ 3 ×",
            ok=ratio <= 3,
        )
    ]


async def _send_for_ever(peer: Peer, key: str) -> None:
    while True:
        await peer.send(key, _BULK_BYTES, _CHUNK)


async def idle_connections() -> list[Figure]:
    """A node with a thousand connections on which nothing happens: its memory, and its CPU as part of a core.

    What is left then are pings, and what each second costs. Beforehand every newcomer asks, at intervals that double
    from 5 s to ten minutes, to be dialed back: with one peer it never learns whether others can dial it. We wait until
    a newcomer has done so five times; a thousand that go on to ask every ten minutes cost 0.1 % of a core.
    """
    limits = {"connections": _IDLE + 100, "connections_per_address": _IDLE + 100, "connections_per_subnet": _IDLE + 100}
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(START[OURS](PeerConfig(limits=limits)))
        await peer.subscribe(TOPIC)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        for _ in range(_DIALERS):
            await _dialers(nursery, peer.addrs[0])
        await trio.sleep(_SETTLE_S)
        before, _ = await peer.cpu()
        await trio.sleep(_IDLE_S)
        after, rss_bytes = await peer.cpu()
        connected = len(await peer.peers())
    core, megabytes = (after - before) / _IDLE_S, rss_bytes / 1e6
    return [
        Figure(
            figure=f"{connected} idle connections: memory",
            value=megabytes,
            unit="MB",
            peer="the limit",
            ratio=megabytes / _MOST_MB,
            target=f"≤ {_MOST_MB:.0f} MB",
            ok=connected >= _IDLE and megabytes <= _MOST_MB,
        ),
        Figure(
            figure=f"{connected} idle connections: CPU",
            value=100 * core,
            unit="% of a core",
            peer="the limit",
            ratio=core / _MOST_CORE,
            target="≤ 2 %",
            ok=connected >= _IDLE and core <= _MOST_CORE,
        ),
    ]


async def _dialers(nursery: trio.Nursery, multiaddr: str) -> None:
    """One process full of nodes that are connected with the peer."""
    command = [sys.executable, "-m", "benchmarks.idle_dialers", multiaddr, str(_IDLE // _DIALERS)]
    start = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
    process = await nursery.start(start)
    with trio.fail_after(120):
        if not await process.stdout.receive_some(100):
            raise RuntimeError("the idle connections could not be made; the error is above")
