"""Gossip in a swarm of processes of one implementation: what a message costs each node, how many arrive, how late.

Every process dials some others, the same ones in all implementations, subscribes, and publishes its part of the rate.
Latencies go from the publisher's clock to the receiver's, which is the same machine's. What go-libp2p's daemon
delivers passes through a client in this process, which costs it some of the machine; its CPU is the daemons' alone.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from statistics import quantiles

import trio

from benchmarks.mesh_pairs import START
from benchmarks.peers.interface import NETWORK, Peer

TOPIC = f"/kaisar/{NETWORK}/bench/1"
NODES = 10
MESSAGE_BYTES = 1024
LATE_MS = 100.0
_DIALS = 6
_FORM_S = 5.0  # until the topic's mesh has formed
_DRAIN_S = 2.0  # what is on its way may still arrive


@dataclass(frozen=True)
class Window:
    """A stretch of gossip at one rate; CPU is of all nodes, per message and node that it should have reached."""

    rate_per_s: float
    cpu_ms: float
    delivered: float
    p50_ms: float
    p99_ms: float

    @property
    def held(self) -> bool:
        """All of it arrived, in time."""
        return self.delivered == 1.0 and self.p99_ms <= LATE_MS


@asynccontextmanager
async def swarm(name: str, nodes: int = NODES) -> AsyncIterator[list[Peer]]:
    """`nodes` connected processes whose topic mesh has formed."""
    async with AsyncExitStack() as stack:
        peers: list[Peer] = [await stack.enter_async_context(START[name]()) for _ in range(nodes)]
        for number, peer in enumerate(peers):
            await peer.subscribe(TOPIC)
            others = [other for other in peers if other is not peer]
            for other in random.Random(number).sample(others, min(_DIALS, len(others))):
                await peer.dial(other.addrs[0])
        with trio.fail_after(60):
            for peer in peers:
                # A process of another implementation tells of no change: it has to be asked.
                while len(await peer.subscribers(TOPIC)) < min(_DIALS, nodes - 1):  # noqa: ASYNC110
                    await trio.sleep(0.1)
        await trio.sleep(_FORM_S)
        yield peers


async def window(peers: list[Peer], rate_per_s: float, seconds: float) -> Window:
    """Publish `rate_per_s` messages in all for some seconds."""
    each = max(1, round(rate_per_s * seconds / len(peers)))
    for peer in peers:
        await peer.received(TOPIC, clear=True)
    before = await _cpu_s(peers)
    async with trio.open_nursery() as nursery:
        for number, peer in enumerate(peers):
            nursery.start_soon(_publish, peer, number / rate_per_s, each, rate_per_s / len(peers))
    await trio.sleep(_DRAIN_S)
    spent_s = await _cpu_s(peers) - before
    latencies = [ms for peer in peers for ms in (await peer.received(TOPIC, clear=True))[1]]
    expected = each * len(peers) * (len(peers) - 1)
    cuts = quantiles(latencies, n=100) if len(latencies) > 1 else [float("inf")] * 99
    return Window(
        rate_per_s=rate_per_s,
        cpu_ms=1000 * spent_s / (each * len(peers)) / len(peers),
        delivered=len(latencies) / expected,
        p50_ms=cuts[49],
        p99_ms=cuts[98],
    )


async def _publish(peer: Peer, delay_s: float, count: int, rate_per_s: float) -> None:
    await trio.sleep(delay_s)  # the nodes do not publish all at once
    await peer.publish_many(TOPIC, count=count, size=MESSAGE_BYTES, rate_per_s=rate_per_s)


async def _cpu_s(peers: list[Peer]) -> float:
    return sum([(await peer.cpu())[0] for peer in peers])


async def ladder(peers: list[Peer], rates: list[float], seconds: float) -> list[Window]:
    """The windows at growing rates, up to the first rate that fails twice."""
    found: list[Window] = []
    for rate in rates:
        tries = [await window(peers, rate, seconds)]
        if not tries[-1].held:
            tries.append(await window(peers, rate, seconds))
        found.append(tries[-1])
        if not tries[-1].held:
            break
    return found
