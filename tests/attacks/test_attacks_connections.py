"""Strangers and half strangers: before, in and right after the handshake."""

from __future__ import annotations

import pytest

from tests.attacks.target import SECONDS

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("at", ["tcp", "multistream", "noise"])
def test_slowloris(attack, at: str) -> None:
    outcome = attack("slowloris", at=at, connections=40, seconds=SECONDS)
    assert outcome.told["refused"] + outcome.told["ended"] > 0 or outcome.refused("handshakes", "origin")


def test_silent_connections_are_let_go(attack) -> None:
    """Nobody who says nothing is waited for longer than a handshake may take."""
    outcome = attack("silent_connections", connections=200)
    assert outcome.told["ended"] == outcome.told["held"]
    assert outcome.told["seconds"] < 8


def test_a_flood_of_connections(attack, scene) -> None:
    """20,000 made the stock package start 11,000 tasks."""
    outcome = attack("connection_flood", count=20_000, seconds=4.0)
    assert outcome.told["made"] + outcome.told["failed"] > 300
    assert scene.victim.ask("figures")["tasks"] < outcome.before["tasks"] + 300


def test_hundreds_of_connections_in_a_life(attack) -> None:
    """The stock package takes 250 and never another one."""
    outcome = attack("handshake_flood", identities=300, held=False)
    assert outcome.told["echoed"]


def test_more_peers_than_there_is_room_for(attack) -> None:
    outcome = attack("handshake_flood", identities=250, held=True)
    assert outcome.told["echoed"]
    assert outcome.told["alive"] < 250


def test_announced_gigabytes(attack) -> None:
    outcome = attack("huge_lengths")
    assert all(outcome.told["ended"].values()), outcome.told


def test_garbage(attack) -> None:
    assert attack("garbage", seconds=SECONDS).told["tried"] > 50


def test_one_key_in_ten_places(attack) -> None:
    outcome = attack("two_places")
    assert outcome.told["back"]
    assert outcome.told["alive"] < 10


def test_peers_that_crash_do_not_stay(attack, scene) -> None:
    outcome = attack("resets", count=40)
    assert scene.victim.ask("figures")["connections"] <= outcome.before["connections"]


def test_a_peer_that_starts_anew_is_heard(attack) -> None:
    """Numbers of messages may go back: with the stock package nothing of it is heard for a while."""
    outcome = attack("restarts")
    assert outcome.messages("advert/accept") == outcome.told["published"]
