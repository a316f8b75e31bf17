"""The soak: what counts as flat, and one short run with real processes."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.soak import Sample, Soak, main, slope


def test_the_slope_is_that_of_the_line_with_the_least_squares() -> None:
    assert slope([(0, 1), (1, 3), (2, 5), (3, 7)]) == pytest.approx(2)
    assert slope([(0, 1), (1, 3), (2, 3), (3, 1)]) == pytest.approx(0)
    assert slope([(0, 1), (1, 3)]) is None
    assert slope([(1, 1)] * 10) is None


def _verdicts(rss_kib_per_cycle: float, files_per_minute: float) -> dict[str, bool | None]:
    soak = Soak(cycles=10_000, minutes=30)
    soak._cycle_samples = [Sample(n, 60_000 + rss_kib_per_cycle * n, 12, 40) for n in range(0, 10_000, 100)]
    soak._mixed_samples = [Sample(m, 60_000, int(12 + files_per_minute * m), 40) for m in range(31)]
    return {figure["figure"]: figure.get("ok") for figure in soak.figures()}


def test_a_node_that_stays_as_it_is_is_flat() -> None:
    assert False not in _verdicts(0.0, 0.0).values()


def test_growth_after_the_warm_up_is_not_flat() -> None:
    assert _verdicts(0.5, 0.0)["memory per 1,000 connection cycles"] is False
    assert _verdicts(0.0, 1.0)["open files per minute"] is False


@pytest.mark.parametrize(("minutes", "verdict"), [(1, None), (30, False)])
def test_caches_that_fill_are_no_leak_of_a_short_run(minutes: int, verdict: bool | None) -> None:
    soak = Soak(cycles=0, minutes=minutes)
    soak._mixed_samples = [Sample(minutes * n / 60, 60_000 + 3000 * minutes * n / 60, 12, 40) for n in range(61)]
    judged = {figure["figure"]: figure.get("ok") for figure in soak.figures()}
    assert judged["memory per minute of mixed traffic"] is verdict


def test_a_short_run() -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--minutes", "0.03", "--cycles", "40", "--json"])
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["failures"] == {}
    assert {figure["figure"] for figure in told["figures"]} >= {"open files at the end", "failed cycles and requests"}
    assert told["node"]["messages"]["advert/accept"] > 0
    # So short a run says nothing about memory, but what was opened is closed again.
    assert {figure["figure"]: figure.get("ok") for figure in told["figures"]}["open files at the end"]
    assert result.exit_code in (0, 1)
