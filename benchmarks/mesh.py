"""The mesh beside js-libp2p, go-libp2p (its daemon) and the stock py-libp2p, all in one run: medians of five.

Streams, small writes, requests and dials between two processes; gossip among ten; a bulk stream beside gossip; a
thousand idle connections. `KAISAR_BENCH_ROUNDS=1` makes it shorter, `KAISAR_BENCH_PARTS=pairs,gossip,ladder,bulk,idle`
chooses. It takes about a quarter of an hour and wants a quiet machine.
"""

from __future__ import annotations

import os
import sys
from statistics import median

import trio

from benchmarks import Figure, mesh_gossip, mesh_own, mesh_pairs
from benchmarks.mesh_gossip import NODES, Window
from benchmarks.mesh_pairs import GO, JS, OURS, STOCK, Pair

_ROUNDS = int(os.environ.get("KAISAR_BENCH_ROUNDS", "5"))
_PARTS = os.environ.get("KAISAR_BENCH_PARTS", "pairs,gossip,ladder,bulk,idle").split(",")
_WINDOW_S = 6.0
_RATE_PER_S = 300.0
_STOCK_RATE_PER_S = 15.0  # at more it is busy with losing messages
_LADDER = [30.0, 60.0, 100.0, 150.0, 200.0, 300.0, 400.0, 600.0, 800.0, 1000.0, 1300.0]


def figures() -> list[Figure]:
    """All parts that were asked for, one after the other."""
    return trio.run(_figures)


async def _figures() -> list[Figure]:
    found: list[Figure] = []
    if "pairs" in _PARTS:
        found += _of_pairs(await _pairs())
    if "gossip" in _PARTS or "ladder" in _PARTS:
        found += await _of_gossip()
    if "bulk" in _PARTS:
        found += await mesh_own.bulk_beside_gossip(_ROUNDS)
    if "idle" in _PARTS:
        found += await mesh_own.idle_connections()
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- pairs ------------------------------------------------------------------------------------------------------------


async def _pairs() -> dict[str, Pair]:
    rounds: dict[str, list[Pair]] = {name: [] for name in mesh_pairs.START}
    for number in range(_ROUNDS):
        for name, done in rounds.items():
            done.append(await mesh_pairs.measure(name))
            _say(f"round {number + 1} of {_ROUNDS}: {name} {done[-1]}")
    return {name: mesh_pairs.middle(done) for name, done in rounds.items()}


def _of_pairs(pairs: dict[str, Pair]) -> list[Figure]:
    ours, js, go, stock = (pairs[name] for name in (OURS, JS, GO, STOCK))
    bulk, small = "one stream, 64 KiB writes, two processes", "one stream, 1 KiB writes"
    request = "request on a new stream"
    return [
        _at_least(bulk, ours.bulk_mb_per_s, "MB/s", JS, js.bulk_mb_per_s, 1.4),
        _at_least(bulk, ours.bulk_mb_per_s, "MB/s", STOCK, stock.bulk_mb_per_s, 4.0),
        _at_most(f"{bulk}: CPU of both", ours.cpu_s_per_gb, "s/GB", GO, go.cpu_s_per_gb, 1.0),
        _at_least(small, ours.small_mb_per_s, "MB/s", JS, js.small_mb_per_s, 1.0),
        _at_most(f"{request}, p50", ours.request_p50_ms, "ms", JS, js.request_p50_ms, 1.0),
        _at_most(f"{request}, p99", ours.request_p99_ms, "ms", JS, js.request_p99_ms, 1.0),
        _at_most("dial, p50", ours.dial_ms, "ms", JS, js.dial_ms, 1.1),
        *(_for_comparison(f"{bulk}: {GO}", go.bulk_mb_per_s, "MB/s"),),
    ]


# -- gossip -----------------------------------------------------------------------------------------------------------


async def _of_gossip() -> list[Figure]:
    costs: dict[str, list[Window]] = {}
    ladders: dict[str, list[Window]] = {}
    for name in mesh_pairs.START:
        _say(f"gossip: {NODES} processes of {name} start")
        async with mesh_gossip.swarm(name) as peers:
            if "gossip" in _PARTS:
                rate = _STOCK_RATE_PER_S if name == STOCK else _RATE_PER_S
                costs[name] = [await mesh_gossip.window(peers, rate, _WINDOW_S) for _ in range(_ROUNDS)]
                _say(f"gossip: {name} {costs[name]}")
            if "ladder" in _PARTS:
                ladders[name] = await mesh_gossip.ladder(peers, _LADDER, _WINDOW_S)
                _say(f"gossip: {name} {ladders[name]}")
    return (_of_costs(costs) if costs else []) + (_of_ladders(ladders) if ladders else [])


def _of_costs(costs: dict[str, list[Window]]) -> list[Figure]:
    def cpu_ms(name: str) -> float:
        return median(window.cpu_ms / max(window.delivered, 1e-9) for window in costs[name])

    what = f"gossip 1 KiB, {NODES} processes, {_RATE_PER_S:.0f}/s: CPU per message and node"
    ours = costs[OURS]
    return [
        _at_most(what, cpu_ms(OURS), "ms", JS, cpu_ms(JS), 0.6),
        _at_most(what, cpu_ms(OURS), "ms", f"{STOCK} at {_STOCK_RATE_PER_S:.0f}/s", cpu_ms(STOCK), 0.12),
        _at_most(what, cpu_ms(OURS), "ms", GO, cpu_ms(GO), 1.2),
        _for_comparison("the same: delivered", 100 * median(window.delivered for window in ours), "%"),
        _for_comparison("the same: p99", median(window.p99_ms for window in ours), "ms"),
        *(
            _for_comparison(f"the same of {name}: delivered", 100 * median(w.delivered for w in costs[name]), "%")
            for name in (JS, GO)
        ),
    ]


def _of_ladders(ladders: dict[str, list[Window]]) -> list[Figure]:
    def held(name: str) -> float:
        return max((window.rate_per_s for window in ladders[name] if window.held), default=0.0)

    what = f"gossip rate with 100 % delivered and p99 ≤ {mesh_gossip.LATE_MS:.0f} ms"
    past = ladders[OURS][-1]
    found = [
        _at_least(what, held(OURS), "/s", JS, held(JS), 2.0),
        _at_least(what, held(OURS), "/s", STOCK, held(STOCK), 8.0),
        _at_least(what, held(OURS), "/s", GO, held(GO), 0.7),
    ]
    if not past.held:
        found.append(_for_comparison(f"delivered at {past.rate_per_s:.0f}/s, past that", 100 * past.delivered, "%"))
    return found


# -- figures ----------------------------------------------------------------------------------------------------------


def _at_least(figure: str, value: float, unit: str, peer: str, of_peer: float, times: float) -> Figure:
    ratio = value / of_peer if of_peer else float("inf")
    return Figure(
        figure=figure, value=value, unit=unit, peer=peer, ratio=ratio, target=f"≥ {times} ×", ok=ratio >= times
    )


def _at_most(figure: str, value: float, unit: str, peer: str, of_peer: float, times: float) -> Figure:
    ratio = value / of_peer
    return Figure(
        figure=figure, value=value, unit=unit, peer=peer, ratio=ratio, target=f"≤ {times} ×", ok=ratio <= times
    )


def _for_comparison(figure: str, value: float, unit: str) -> Figure:
    return Figure(figure=figure, value=value, unit=unit)
