from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.attacks.scene import Outcome, Scene, check


@pytest.fixture(scope="module")
def scenes() -> Iterator[Callable[[], Scene]]:
    """The module's processes; started again when an attack has succeeded."""
    with ExitStack() as processes:
        current: list[Scene] = []

        def scene() -> Scene:
            if not current or not current[0].victim.is_alive or current[0].is_spent:
                processes.close()
                current[:] = [Scene(processes)]
            return current[0]

        yield scene


@pytest.fixture
def scene(scenes: Callable[[], Scene]) -> Scene:
    return scenes()


@pytest.fixture
def fresh(scenes: Callable[[], Scene]) -> None:
    """To be named before `attack`: memory is counted from a victim that no other flood has made grow."""
    current = scenes()
    current.is_spent = current.attacked


@pytest.fixture
def attack(scene: Scene) -> Callable[..., Outcome]:
    """Run an attack, check what holds after each, and print what it cost."""

    def run(name: str, /, **arguments: Any) -> Outcome:
        outcome = scene.attacked_by(name, **arguments)
        print(f"{name}: {outcome}")
        scene.is_spent = scene.attacked = True
        check(scene, outcome)
        scene.is_spent = False
        return outcome

    return run
