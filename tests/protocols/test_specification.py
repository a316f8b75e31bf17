"""The specification names every module, and every number with the value that `mainnet` has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from protocols.params import KAI, MAINNET, Params

PACKAGE = Path(__file__).parents[2] / "protocols"
TEXT = (PACKAGE / "README.md").read_text("utf-8")
UNITS = {"": 1, "KAI": KAI, "s": 1, "days": 86_400}
MS_PER = {"s": 1_000, "min": 60_000}


def rows() -> Iterator[tuple[str, str]]:
    """Name and value of every parameter in a table of parameters."""
    for table in re.findall(r"\| name \| mainnet \| \w+ \|\n\|[-|]+\n((?:\|.*\n)+)", TEXT):
        for row in table.splitlines():
            names, values = (cell.strip() for cell in row.split("|")[1:3])
            if names.startswith("`"):
                yield from zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True)


def number(name: str, value: str) -> int:
    """The value in the parameter's own unit."""
    digits, _, unit = value.partition(" ")
    return int(digits.replace(",", "")) * (MS_PER[unit] if unit and name.endswith("_ms") else UNITS[unit])


def test_every_parameter_is_named() -> None:
    assert [each.name for each in fields(Params) if f"`{each.name}`" not in TEXT] == []


def test_the_tables_say_what_mainnet_has() -> None:
    found = list(rows())
    assert len(found) > 40
    assert found == [(name, value) for name, value in found if number(name, value) == getattr(MAINNET, name)]


def test_every_module_is_named() -> None:
    missing = [path.name for path in PACKAGE.rglob("*.py") if f"`{path.name}`" not in TEXT]
    assert set(missing) <= {"__init__.py"}


def test_the_pages_that_modules_refer_to_exist() -> None:
    headings = set(re.findall(r"^#+ (.*)$", TEXT, re.M))
    named = {
        page
        for path in PACKAGE.rglob("*.py")
        for page in re.findall(r'README\.md`, "([^"]+)"', path.read_text("utf-8"))
    }
    assert named and named <= headings
