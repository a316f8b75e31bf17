"""Honest peers whose clocks are wrong by an hour, each way."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.attacks.scene import Scene, check

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0])
def test_a_victim_whose_clock_is_wrong(offset_s: float) -> None:
    """Its peers are an hour away from it: they connect, ask, and hear each other as ever."""
    with ExitStack() as processes:
        scene = Scene(processes, clock_offset_s=offset_s)
        outcome = scene.attacked_by("wrong_clock")
        print(outcome)
        check(scene, outcome)
        assert outcome.after["known_peers"] >= 2
