"""The ledger's page names every call and part of the state (parameters: `test_specification.py`)."""

from __future__ import annotations

import dataclasses
import re

import pytest

from protocols.genesis import parse_genesis
from protocols.interpreter.calls import CALLS
from protocols.interpreter.state import State


@pytest.fixture
def page(repository) -> str:
    text = (repository / "protocols" / "README.md").read_text("utf-8")
    return text.split("\n## Ledger\n")[1].split("\n## ")[0]


def test_every_call_is_there(page):
    assert [cls.__name__ for cls in CALLS.values() if f"`{cls.__name__}`" not in page] == []


def test_every_part_of_the_state_is_there(page):
    head = {"network", "params", "number", "block_hash", "time_ms", "licences_sold"}
    parts = {item.name for item in dataclasses.fields(State)} - head
    assert [part for part in sorted(parts) if f"`{part}`" not in page] == []


def test_the_example_is_a_genesis_document(page):
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert parse_genesis(example.replace("<64 hex digits>", "ab" * 32).encode()).name == "demo-1"
