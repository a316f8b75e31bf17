"""`python -m benchmarks NAME [--json]`: run one benchmark and print its figures.

Progress goes to stderr. With `--json` the last line of stdout is one JSON list of figures. The exit code says
whether everything was measured, not whether targets were met: 0 measured, 1 failed, 2 no such benchmark.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import Figure

KNOWN = {
    "spine": "proof of work, votes and the demo: time, bytes and memory",
    "ledger": "calls a second, with and without signature checks",
    "mesh": "streams, requests and gossip",
    "tunnel": "a tenant's TCP connection through the mesh",
    "index": "adverts and certificates held and queried",
    "proof": "the compute challenge on this machine's backends",
    "sim": "peers and events a second in virtual time",
}
"""The benchmarks: each is a module `benchmarks.<name>` with `figures() -> list[Figure]`."""


def load(name: str) -> list[Figure]:
    """Run benchmark `name` and return its figures; raise `typer.BadParameter` when there is none."""
    if name not in KNOWN:
        raise typer.BadParameter(f"no benchmark is called {name!r}; there are: {', '.join(KNOWN)}")
    if importlib.util.find_spec(f"benchmarks.{name}") is None:
        written = [known for known in KNOWN if importlib.util.find_spec(f"benchmarks.{known}")]
        raise typer.BadParameter(
            f"{name!r} ({KNOWN[name]}) is not written yet; these are: {', '.join(written) or 'none'}"
        )
    figures: list[Figure] = importlib.import_module(f"benchmarks.{name}").figures()
    return figures


def table(name: str, figures: Sequence[Figure], about: str = "") -> Table:
    """Lay figures out: value and unit, what they are compared with, and whether the target is met."""
    result = Table(title=f"{name}: {about or KNOWN[name]}", title_justify="left")
    for heading in ("figure", "value", "unit", "compared with", "ratio", "target", ""):
        result.add_column(heading, justify="right" if heading in ("value", "ratio") else "left")
    for figure in figures:
        mark = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[figure.get("ok")]
        result.add_row(
            figure["figure"],
            _number(figure["value"]),
            figure["unit"],
            figure.get("peer") or "",
            _number(figure.get("ratio")),
            figure.get("target") or "",
            mark,
        )
    return result


def _number(value: float | None) -> str:
    """Show four digits that matter, and nothing where there is no number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 or value == int(value) else f"{value:.4g}"


def main(name: str, as_json: bool = typer.Option(False, "--json", help="End with a JSON list.")) -> None:
    """Run the benchmark NAME and print its figures."""
    Console(stderr=True).print(f"measuring {name} ...")
    figures = load(name)
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        # Where nobody has a terminal, lines are as long as they need to be.
        Console(width=None if sys.stdout.isatty() else 200).print(table(name, figures))


if __name__ == "__main__":
    typer.run(main)
