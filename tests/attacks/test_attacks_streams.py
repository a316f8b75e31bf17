"""Connected peers, below gossip."""

from __future__ import annotations

import pytest

from tests.attacks.target import SECONDS

pytestmark = pytest.mark.attack


def test_answers_that_nobody_reads(attack) -> None:
    attack("never_reads", peers=4, seconds=SECONDS)


def test_streams_on_which_nothing_is_said(attack) -> None:
    outcome = attack("never_sends", streams=300, wait_s=7)
    assert outcome.told["ended"] or outcome.told["resets"] >= 300


def test_requests_that_come_byte_by_byte(attack) -> None:
    outcome = attack("slow_requests", seconds=5.5)
    assert outcome.told["ended"] or outcome.told["resets"] > 100


def test_more_than_the_windows_allow(attack) -> None:
    """300 MB made the stock package grow by 290."""
    outcome = attack("window_flood", megabytes=300, peers=1)
    assert outcome.told["ended"] == 1


def test_all_windows_filled(attack) -> None:
    """Everything that the windows of many peers allow, where nobody reads it."""
    outcome = attack("fills_windows", peers=6)
    assert outcome.told["resets"] or outcome.told["ended"]


def test_twenty_thousand_streams(attack, scene) -> None:
    outcome = attack("open_flood", count=20_000)
    assert outcome.told["ended"] or outcome.told["resets"] > 1000
    assert scene.victim.ask("figures")["tasks"] < outcome.before["tasks"] + 600


def test_streams_opened_and_reset(attack) -> None:
    attack("open_and_reset", seconds=SECONDS)


@pytest.mark.parametrize("read", [True, False])
def test_a_flood_of_pings(attack, read: bool) -> None:
    attack("ping_flood", seconds=SECONDS, read=read)


def test_updates_of_streams_that_do_not_exist(attack) -> None:
    attack("acks_for_nothing", seconds=SECONDS)


def test_frames_that_nobody_sends(attack) -> None:
    outcome = attack("odd_frames")
    assert all(outcome.told["ended"].values()), outcome.told


def test_negotiations_that_are_none(attack) -> None:
    """A header that is not UTF-8 ended the stock package's process."""
    outcome = attack("bad_negotiation")
    assert outcome.told["ended"] or outcome.told["resets"] >= 150


def test_handlers_with_a_bug(attack) -> None:
    outcome = attack("failing_handlers", count=100)
    assert outcome.told["echoed"]
    assert outcome.after["failed_handlers"]["/fails"] >= 50


def test_a_flood_of_requests(attack) -> None:
    outcome = attack("request_flood", seconds=SECONDS)
    assert outcome.told["ended"] or outcome.told["resets"] > 0


@pytest.mark.parametrize("prefix", ["8.8.", "10.1."])
def test_identify_with_ten_thousand_addresses(attack, prefix: str) -> None:
    outcome = attack("lying_identify", addresses=10_000, prefix=prefix)
    assert outcome.after["addresses"] <= outcome.before["addresses"] + 16
    assert outcome.after["peerstore"] <= outcome.before["peerstore"] + 2


def test_a_flood_of_questions_for_peers(attack) -> None:
    outcome = attack("exchange_flood", seconds=SECONDS)
    assert outcome.told["ended"] or outcome.told["resets"] > 0
