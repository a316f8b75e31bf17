"""`python -m benchmarks`: what it prints, and how it ends."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import Figure
from benchmarks.__main__ import KNOWN, main

FIGURES: list[Figure] = [
    {"figure": "proof", "value": 1.25, "unit": "s", "peer": "GEMM", "ratio": 1.04, "target": "≤ 1.05", "ok": True},
    {"figure": "calls", "value": 12345.0, "unit": "calls/s", "target": "≥ 20,000", "ok": False},
    {"figure": "memory", "value": 96, "unit": "MB"},
]


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command, with a benchmark `spine` that measures nothing."""
    spine = ModuleType("benchmarks.spine")
    spine.__spec__ = importlib_spec = sys.modules["benchmarks"].__spec__
    assert importlib_spec is not None
    spine.figures = lambda: FIGURES  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.spine", spine)
    command = typer.Typer()
    command.command()(main)
    return command


def test_json_is_the_last_line_of_stdout(runner: CliRunner, app: typer.Typer) -> None:
    result = runner.invoke(app, ["spine", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1]) == FIGURES
    assert "measuring spine" in result.stderr


def test_the_table_shows_values_and_missed_targets_without_failing(runner: CliRunner, app: typer.Typer) -> None:
    result = runner.invoke(app, ["spine"])
    assert result.exit_code == 0
    for text in ("1.25", "12,345", "calls/s", "GEMM", "met", "missed", "96"):
        assert text in result.stdout


def test_an_unknown_benchmark_lists_the_known_ones(runner: CliRunner, app: typer.Typer) -> None:
    result = runner.invoke(app, ["nope"])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in KNOWN)


def test_a_benchmark_that_is_not_written_says_so(
    runner: CliRunner, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "unwritten", "nothing")
    result = runner.invoke(app, ["unwritten"])
    assert result.exit_code == 2
    assert "not written yet" in result.stderr
