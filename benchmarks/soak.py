"""`python -m benchmarks.soak [--minutes 30] [--cycles 10000] [--json]`: does a mesh node stay as large as it is?

One node in its own process; others connect `cycles` times (identify, ping, request, gossip; half of them leave without
a goodbye, some are garbage), then use it for `minutes` as a swarm does. Its resident memory, open files and tasks are
sampled from outside; the slope is a least-squares line over what comes after the warm-up, the first half of the cycles
(every identity has come ten times by then, so caches are full) and the first quarter of the minutes (at least five of
them, or half).

It is flat, and the exit code 0, when nothing failed and

* memory grows by less than 64 KiB per 1,000 cycles and 64 KiB a minute, or by less than 1 MiB in all, which is what an
  allocator takes in one step; below ten minutes of traffic that part is only measured, because what a node remembers
  for minutes still grows;
* open files at the end are at most 2 more than before, and their slope in the mixed part is below 0.2 a minute;
* tasks at the end are at most 4 more than before.

Ctrl-C prints what was measured until then.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import linear_regression, quantiles
from typing import Any

import typer
from rich.console import Console

from benchmarks import Figure
from benchmarks.__main__ import table
from benchmarks.subject_process import ROOT, SubjectProcess, subject

_SAMPLE_S = 0.25
_SLOPE_KIB = 64.0
_GRAIN_KIB = 1024.0  # growth that one step of the allocator explains
_FILES_PER_MINUTE = 0.2
_SETTLE_S = 12.0  # what was cut off without a word is found by then
_P99_WINDOWS = 6
_CACHES_MIN = 5.0  # minutes until what is remembered for minutes (messages seen, authors) is as large as it gets


@dataclass(frozen=True)
class Sample:
    """The subject at one moment. `at` is cycles done or minutes passed."""

    at: float
    rss_kib: float
    files: int
    tasks: int


class Load:
    """A load process, and what it has told so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.cycles = 0
        self.bulk_bytes = 0
        self.failures: dict[str, int] = {}
        self.latencies: list[tuple[float, float]] = []  # when it was told, round trip; s
        self._process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            told = json.loads(line)
            self.cycles, self.failures, self.bulk_bytes = told["cycles"], told["failures"], told["bulk_bytes"]
            self.latencies += [(time.monotonic(), latency) for latency in told["latencies"]]

    @property
    def runs(self) -> bool:
        """It has not finished."""
        return self._process.poll() is None

    def finish(self) -> int:
        """Everything that it said has been read; its exit code."""
        self._reader.join(10)
        return self._process.wait(10)


@contextmanager
def load(kind: str, node: SubjectProcess, amount: float) -> Iterator[Load]:
    """A load process for as long as the context lasts."""
    command = [sys.executable, "-m", "benchmarks.mesh_load", kind, node.key, node.addresses[0], str(amount)]
    # Its own session: Ctrl-C is for the program that tells what was measured.
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield Load(process)
        finally:
            process.kill()


class Soak:
    """One run; `figures` may be called at any time."""

    def __init__(self, cycles: int, minutes: float) -> None:
        self._cycles, self._minutes = cycles, minutes
        self._cycle_samples: list[Sample] = []
        self._mixed_samples: list[Sample] = []
        self._latencies: list[tuple[float, float]] = []
        self._failures: Counter[str] = Counter()
        self._bounds: dict[str, tuple[int, int]] = {}  # before and after
        self.last: dict[str, Any] = {}

    def run(self, console: Console) -> None:
        """Both parts."""
        with subject({"limits": {"connections_per_address": 160, "handshakes_per_s": 1000}}) as node:
            before = _sample(node, 0)
            if self._cycles:
                console.print(f"{self._cycles} connection cycles ...")
                with load("cycles", node, self._cycles) as cycles:
                    self._watch(node, cycles, self._cycle_samples, lambda _passed_s: float(cycles.cycles))
            if self._minutes:
                console.print(f"mixed traffic for {self._minutes:g} min ...")
                with load("mixed", node, 60 * self._minutes) as mixed:
                    self._watch(node, mixed, self._mixed_samples, lambda passed_s: passed_s / 60)
            console.print(f"{_SETTLE_S:g} s of silence ...")
            after = self._settle(node, before)
            self._bounds = {"open files": (before.files, after.files), "tasks": (before.tasks, after.tasks)}

    def _watch(self, node: SubjectProcess, running: Load, samples: list[Sample], position: Any) -> None:
        began = time.monotonic()
        try:
            while running.runs:
                time.sleep(_SAMPLE_S)
                samples.append(_sample(node, position(time.monotonic() - began)))
            if running.finish():
                self._failures["the load process failed"] += 1
        finally:
            self._latencies += running.latencies
            self._failures.update(running.failures)
            self.last = node.ask("figures") if node.is_alive else {}

    def _settle(self, node: SubjectProcess, before: Sample) -> Sample:
        end = time.monotonic() + _SETTLE_S
        while True:
            after = _sample(node, 0)
            if time.monotonic() > end or (after.files <= before.files and after.tasks <= before.tasks):
                return after
            time.sleep(_SAMPLE_S)

    # -- figures ------------------------------------------------------------------------------------------------------

    def figures(self) -> list[Figure]:
        """Slopes, ends and percentiles of what was measured so far."""
        found: list[Figure] = []
        steady = [s for s in self._cycle_samples if s.at >= self._cycles / 2]
        found += _memory("memory per 1,000 connection cycles", steady, 1000)
        steady = [s for s in self._mixed_samples if s.at >= min(self._minutes / 2, max(self._minutes / 4, _CACHES_MIN))]
        # A run that ends before the caches are full cannot tell them from a leak: it is measured and not judged.
        found += _memory("memory per minute of mixed traffic", steady, 1, judged=self._minutes >= 2 * _CACHES_MIN)
        found += _files(steady)
        for name, (first, last) in self._bounds.items():
            slack = 2 if name == "open files" else 4
            limit = f"≤ {first + slack}"
            found.append(
                Figure(figure=f"{name} at the end", value=last, unit="", target=limit, ok=last <= first + slack)
            )
        found += self._percentiles()
        bad = self._failures.total()
        found.append(Figure(figure="failed cycles and requests", value=bad, unit="", target="0", ok=not bad))
        return found

    def _percentiles(self) -> Iterator[Figure]:
        """p99 of requests over time, in windows of equal numbers."""
        round_trips = [latency * 1e3 for _at, latency in sorted(self._latencies)]
        size = len(round_trips) // _P99_WINDOWS
        if size < 20:
            return
        for number in range(_P99_WINDOWS):
            window = round_trips[number * size : (number + 1) * size]
            name = f"request p99, part {number + 1} of {_P99_WINDOWS}"
            yield Figure(figure=name, value=quantiles(window, n=100)[98], unit="ms")

    @property
    def failures(self) -> dict[str, int]:
        """What went wrong, by kind."""
        return dict(self._failures)

    def series(self) -> dict[str, list[list[float]]]:
        """The samples as they are, for whoever wants to draw them."""
        named = {"cycles": self._cycle_samples, "minutes": self._mixed_samples}
        return {name: [[s.at, s.rss_kib, s.files, s.tasks] for s in samples] for name, samples in named.items()}


def _sample(node: SubjectProcess, at: float) -> Sample:
    tasks = node.ask("figures")["tasks"]
    return Sample(at=at, rss_kib=node.rss_bytes / 1024, files=node.open_files, tasks=tasks)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the least-squares line; None when there are too few points."""
    if len(points) < 4 or len({x for x, _y in points}) < 2:
        return None
    return float(linear_regression(*zip(*points, strict=True)).slope)


def _memory(name: str, samples: Sequence[Sample], scale: float, *, judged: bool = True) -> Iterator[Figure]:
    found = slope([(s.at, s.rss_kib) for s in samples])
    if found is None:
        return
    growth_kib = found * (samples[-1].at - samples[0].at)
    yield Figure(
        figure=name,
        value=found * scale,
        unit="KiB",
        target=f"< {_SLOPE_KIB:g} KiB, or < {_GRAIN_KIB / 1024:g} MiB in all" if judged else None,
        ok=found * scale < _SLOPE_KIB or growth_kib < _GRAIN_KIB if judged else None,
    )
    yield Figure(figure="the same: growth in all", value=growth_kib, unit="KiB")


def _files(samples: Sequence[Sample]) -> Iterator[Figure]:
    found = slope([(s.at, s.files) for s in samples])
    if found is None:
        return
    # A connection more at the end than at the start of a short run is no leak.
    ok = found < _FILES_PER_MINUTE or found * (samples[-1].at - samples[0].at) < 2
    yield Figure(figure="open files per minute", value=found, unit="", target=f"< {_FILES_PER_MINUTE:g}", ok=ok)


def main(
    minutes: float = typer.Option(30.0, min=0, help="Of mixed traffic."),
    cycles: int = typer.Option(10_000, min=0, help="Connections made and ended before."),
    as_json: bool = typer.Option(False, "--json", help="End with a line of JSON: figures, failures, samples."),
) -> None:
    """Load one mesh node for a long time, and say whether it grows."""
    console, soak = Console(stderr=True), Soak(cycles, minutes)
    interrupted = False
    try:
        soak.run(console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted; measured so far:")
    figures = soak.figures()
    if as_json:
        told = {"figures": figures, "failures": soak.failures, "samples": soak.series(), "node": soak.last}
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table("soak", figures, "one node under load"))
        for what, times in soak.failures.items():
            console.print(f"{times} × {what}")
    raise typer.Exit(130 if interrupted else int(any(figure.get("ok") is False for figure in figures)))


if __name__ == "__main__":
    typer.run(main)
