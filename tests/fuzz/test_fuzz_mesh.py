"""A quick turn of `just fuzz mesh`, the fuzzer itself, and every input that it has found something with."""

from __future__ import annotations

import random

import pytest
import trio
import typer
from typer.testing import CliRunner

from tests.fuzz.__main__ import main
from tests.fuzz.engine import FuzzFailure, Tally, Target, chunks, fuzz, make_input, try_one
from tests.fuzz.targets import FAMILIES, opened_targets

INPUTS = 20_000

FOUND = [
    ("multistream", "05fffefdfc0a"),  # a header that is not text
    ("gossip", "ffffffff07" + "00" * 100),  # a gigabyte is announced
    ("framing", "ffffffff" + "00" * 10),
]
"""Target and input, in hex, of what was found and mended, here or in the library."""


@pytest.mark.parametrize("family", FAMILIES)
async def test_hostile_bytes_raise_nothing_but_typed_errors(family: str) -> None:
    async with opened_targets(family) as targets:
        tallies = await fuzz(targets, INPUTS // len(FAMILIES), seed=1)
    assert all(tally.inputs > 100 for tally in tallies.values())


@pytest.mark.parametrize(("name", "data"), FOUND)
async def test_what_was_found_stays_mended(name: str, data: str) -> None:
    async with opened_targets(name) as (target,):
        await try_one(target, bytes.fromhex(data), Tally())


async def test_valid_examples_are_accepted() -> None:
    """Otherwise the fuzzer would only ever see the first check."""
    async with opened_targets("all") as targets:
        for target in targets:
            if target.name in ("request", "handshake", "yamux"):  # their examples are for several parsers, or end it
                continue
            tally = Tally()
            for seed in target.seeds:
                await try_one(target, seed, tally)
            assert tally.refused < tally.inputs, target.name


async def _nothing(data: bytes) -> None:
    if b"\xff" in data:
        raise ValueError("expected")
    if b"\x00" in data:
        raise RuntimeError("a bug")


async def test_an_unexpected_error_is_found_and_told_with_its_input() -> None:
    target = Target("sample", [b"abc" * 10], _nothing, (ValueError,))
    with pytest.raises(FuzzFailure) as caught:
        await fuzz([target], 10_000, seed=5)
    finding = caught.value.finding
    assert b"\x00" in finding.data and finding.data[:50].hex() in str(finding)
    with pytest.raises(FuzzFailure):
        await try_one(target, finding.data, Tally())


async def _hungry(data: bytes) -> None:
    bytes(bytearray(256 * 1024 * 1024))


async def test_memory_taken_by_one_input_is_found() -> None:
    with pytest.raises(FuzzFailure, match="took"):
        await try_one(Target("sample", [b"x"], _hungry, ()), b"x", Tally())


def test_the_same_seed_gives_the_same_inputs() -> None:
    target = Target("sample", [b"hello", bytes(100)], trio.sleep, ())  # type: ignore[arg-type]
    first, second = ([make_input(random.Random(f"{n}"), target) for n in range(200)] for _ in range(2))
    assert first == second and len(set(first)) > 100
    for data in first:
        assert b"".join(chunks(data)) == data


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--target", "nope"], "there is no 'nope'"),
        (["--target", "framing", "--replay", "no-such-file"], "neither a file"),
    ],
)
def test_what_cannot_be_run_is_told_without_a_traceback(arguments: list[str], cause: str) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERM": "dumb"})
    assert (result.exit_code, cause in result.output) == (2, True)
