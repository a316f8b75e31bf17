"""The main job: the demo's times, bytes and memory from a run of its own, proof and vote figures beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, cast

from benchmarks import Figure, proof, votes

WALL_TARGET_S = 90.0
MEMORY_TARGET_MB = 120.0
TIMEOUT_S = 300


def figures() -> list[Figure]:
    """Measure now, on this machine; the demo alone takes over a minute.

    The demo comes first, while nothing else has warmed the machine. RuntimeError when it does not observe every step.
    """
    return [*demo_figures(run_demo()), *cast(list[Figure], [*proof.figures(), *votes.figures()])]


def run_demo() -> dict[str, Any]:
    """The figures that a run of `kaisar demo --json` ends with."""
    command = [sys.executable, "-m", "node.cli", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"the demo ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    plain: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return plain


def demo_figures(plain: Mapping[str, Any]) -> list[Figure]:
    """The demo's object as figures."""
    delay, peaks = plain["slot_to_certificate_minus_work_ms"], plain["peak_memory_mb"]
    heaviest = max(peaks, key=peaks.__getitem__)
    return [
        _limit(f"demo, {plain['processes']} processes, wall time", plain["wall_s"], "s", WALL_TARGET_S),
        Figure(figure="slot start to certificate without the work, p50", value=delay["p50"], unit="ms"),
        Figure(figure=f"the same, p95 of {delay['count']}", value=delay["p95"], unit="ms"),
        Figure(figure="on-ledger bytes per check", value=plain["ledger_bytes_per_check"], unit="B"),
        Figure(figure="on-ledger bytes per epoch", value=max(plain["anchor_bytes"]), unit="B"),
        _limit(f"peak memory of a node ({heaviest})", peaks[heaviest], "MB", MEMORY_TARGET_MB),
        Figure(figure="HTTP request through the tunnel", value=plain["tunnel_request_ms"], unit="ms"),
    ]


def _limit(figure: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(
        figure=figure,
        value=value,
        unit=unit,
        peer="limit",
        ratio=round(value / limit, 3),
        target=f"≤ {limit:g} {unit}",
        ok=value <= limit,
    )
