"""`just fuzz mesh [--inputs 1000000] [--seed N] [--target NAME]`: hostile bytes for every parser of the mesh."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import trio
import typer

from tests.fuzz.engine import FuzzFailure, Tally, Target, fuzz, save, try_one
from tests.fuzz.targets import FAMILIES, opened_targets

_FOUND = Path(".fuzz")


def _progress(done: int, seconds: float) -> None:
    sys.stderr.write(f"\r{done:,} inputs, {done / seconds:,.0f}/s ")
    sys.stderr.flush()


async def _search(wanted: str, inputs: int, seed: int) -> dict[str, Tally]:
    async with opened_targets(wanted) as targets:
        return await fuzz(targets, inputs, seed, _progress)


async def _replay(wanted: str, data: bytes) -> None:
    async with opened_targets(wanted) as targets:
        for target in targets:
            await try_one(target, data, Tally())
            print(f"{target.name}: as it should be")


def _input(replay: str) -> bytes:
    """What `--replay` names: a file, or the digits themselves."""
    try:
        return bytes.fromhex(Path(replay).read_text() if Path(replay).is_file() else replay)
    except (ValueError, OSError):
        raise typer.BadParameter(f"{replay!r:.80} is neither a file nor hex digits", param_hint="--replay") from None


def main(
    inputs: int = typer.Option(1_000_000, min=1, help="In all."),
    seed: int = typer.Option(0, help="The same seed, the same inputs; 0 takes a new one."),
    target: str = typer.Option("all", help="One of: all, " + ", ".join(FAMILIES)),
    replay: str = typer.Option("", help="Run one input, in hex, or the file that has it."),
) -> None:
    """Try many inputs; the exit code is 1 when one of them raised what it must not, took memory, or hung."""
    names = ["all", *dict.fromkeys(name for family in FAMILIES.items() for name in (family[0], *family[1]))]
    if target not in names:
        raise typer.BadParameter(f"there is no {target!r}; there are: {', '.join(names)}", param_hint="--target")
    data = _input(replay)
    seed = seed or time.time_ns() % 1_000_000_007
    began = time.monotonic()
    try:
        if replay:
            trio.run(_replay, target, data)
            return
        tallies = trio.run(_search, target, inputs, seed)
    except FuzzFailure as failure:
        path = save(failure.finding, _FOUND)
        again = f"just fuzz mesh --target {failure.finding.target} --replay {path}"
        print(f"\n{failure}\n  again: {again}\n  the whole run: --seed {seed}", file=sys.stderr)
        raise typer.Exit(1) from failure
    _tell(tallies, time.monotonic() - began, seed)


def _tell(tallies: dict[str, Tally], seconds: float, seed: int) -> None:
    print(f"\r{'target':14}{'inputs':>10}{'refused':>10}{'per s':>9}  errors")
    for name, tally in tallies.items():
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(tally.kinds.items()))
        rate = tally.inputs / max(tally.seconds, 1e-9)
        print(f"{name:14}{tally.inputs:>10,}{tally.refused:>10,}{rate:>9,.0f}  {kinds}")
    total = sum(tally.inputs for tally in tallies.values())
    print(f"{total:,} inputs in {seconds:.0f} s, {total / seconds:,.0f}/s, seed {seed}: nothing found")


__all__ = ["Target"]

if __name__ == "__main__":
    typer.run(main)
