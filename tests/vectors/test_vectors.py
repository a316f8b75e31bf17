"""The recipe still prints the stored vectors."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vector_recipe", FOLDER / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["popw", "vrf", "merkle", "messages"])
def test_recipe_prints_the_stored_vectors(name: str) -> None:
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    assert json.loads(json.dumps(recipe().RECIPES[name]())) == stored
