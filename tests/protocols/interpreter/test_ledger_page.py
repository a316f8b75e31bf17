"""The ledger's page names every call, parameter and part of the state, with the numbers of the code."""

from __future__ import annotations

import dataclasses
import re

import pytest

from protocols.genesis import parse_genesis
from protocols.interpreter.calls import CALLS
from protocols.interpreter.state import State
from protocols.params import KAI, MAINNET


@pytest.fixture
def page(repository) -> str:
    text = (repository / "protocols" / "README.md").read_text("utf-8")
    return text.split("<!-- ledger -->")[1].split("<!-- /ledger -->")[0]


def test_every_call_is_there(page):
    assert [cls.__name__ for cls in CALLS.values() if f"`{cls.__name__}`" not in page] == []


def test_every_part_of_the_state_is_there(page):
    head = {"network", "params", "number", "block_hash", "time_ms", "licences_sold"}
    parts = {item.name for item in dataclasses.fields(State)} - head
    assert [part for part in sorted(parts) if f"`{part}`" not in page] == []


def test_parameters_are_those_of_mainnet(page):
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", page, re.MULTILINE)
    checked = 0
    for names, numbers in rows:
        for name, number in zip(re.findall(r"`(\w+)`", names), re.split(r", (?=\d)", numbers), strict=False):
            if not hasattr(MAINNET, name):
                continue
            digits = int(re.match(r"[\d,]+", number)[0].replace(",", ""))
            unit = KAI if "KAI" in number else 86_400 if "days" in number else 1
            assert getattr(MAINNET, name) == digits * unit, name
            checked += 1
    assert checked == 18


def test_the_example_is_a_genesis_document(page):
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert parse_genesis(example.replace("<64 hex digits>", "ab" * 32).encode()).name == "demo-1"
