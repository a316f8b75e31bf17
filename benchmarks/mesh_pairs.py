"""Two processes of one implementation: bulk streams, small writes, requests on new streams, dials.

All four implementations do the same operations (`benchmarks.peers.interface`), in turns, so that whatever else this
machine does meets all of them. CPU is that of both processes; of go-libp2p it is the daemons' alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.peers.interface import Peer
from benchmarks.peers.p2pd import go_peer
from benchmarks.peers.process import js_peer, kaisar_peer, stock_peer

OURS, JS, GO, STOCK = "kaisar", "js-libp2p", "go-libp2p", "py-libp2p"
START: dict[str, Callable[..., Any]] = {OURS: kaisar_peer, JS: js_peer, GO: go_peer, STOCK: stock_peer}

_MB = 1_000_000
_LARGE, _SMALL = 65_536, 1_024
_BULK_BYTES = {STOCK: 64 * _MB}  # the slow one sends less
_SMALL_BYTES = {STOCK: 4 * _MB}
_REQUESTS, _REQUEST_BYTES = 500, 100
_DIALS = {STOCK: 5}


@dataclass(frozen=True)
class Pair:
    """What one pair of processes did: MB/s, CPU seconds per GB of both ends, milliseconds."""

    bulk_mb_per_s: float
    cpu_s_per_gb: float
    small_mb_per_s: float
    request_p50_ms: float
    request_p99_ms: float
    dial_ms: float


async def measure(name: str) -> Pair:
    """Start a pair of processes of an implementation and measure them. Raises PeerFailed, Unavailable."""
    async with START[name]() as server, START[name]() as client:
        dials = await client.redial(server.addrs[0], _DIALS.get(name, 30))
        await client.dial(server.addrs[0])
        half_close = client.half_closes and server.half_closes
        await client.send(server.key, 4 * _MB, _LARGE, half_close=half_close)  # until both are warm
        await client.request(server.key, count=50, size=_REQUEST_BYTES, half_close=half_close)
        size, before = _BULK_BYTES.get(name, 512 * _MB), await _cpu_s(server, client)
        bulk_s = await client.send(server.key, size, _LARGE, half_close=half_close)
        cpu_s = await _cpu_s(server, client) - before
        small = _SMALL_BYTES.get(name, 32 * _MB)
        small_s = await client.send(server.key, small, _SMALL, half_close=half_close)
        requests = await client.request(server.key, count=_REQUESTS, size=_REQUEST_BYTES, half_close=half_close)
    return Pair(
        bulk_mb_per_s=size / bulk_s / _MB,
        cpu_s_per_gb=cpu_s / size * 1e9,
        small_mb_per_s=small / small_s / _MB,
        request_p50_ms=median(requests),
        request_p99_ms=quantiles(requests, n=100)[98],
        dial_ms=median(dials),
    )


async def _cpu_s(*peers: Peer) -> float:
    return sum([(await peer.cpu())[0] for peer in peers])


def middle(pairs: list[Pair]) -> Pair:
    """The median of each figure."""
    return Pair(**{name: median(getattr(pair, name) for pair in pairs) for name in Pair.__dataclass_fields__})
