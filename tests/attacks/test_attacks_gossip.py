"""Connected peers, through gossip."""

from __future__ import annotations

import pytest

from tests.attacks.target import SECONDS

pytestmark = pytest.mark.attack


def test_gossip_that_nobody_reads(attack) -> None:
    attack("never_reads_gossip", seconds=SECONDS)


def test_a_hundred_and_twenty_thousand_subscriptions(attack) -> None:
    outcome = attack("subscription_flood", topics=120_000)
    assert outcome.told["all at once"]


@pytest.mark.parametrize("kind", ["ihave", "iwant", "graft", "prune"])
def test_a_flood_of_control(attack, kind: str) -> None:
    attack("control_flood", kind=kind, seconds=SECONDS)


def test_in_and_out_of_topic_meshes(attack) -> None:
    outcome = attack("graft_and_prune", seconds=SECONDS)
    assert outcome.told["ended"]


def test_offers_that_are_never_kept(attack) -> None:
    outcome = attack("broken_promises", seconds=SECONDS)
    assert outcome.told["asked_bytes"] < 46 * outcome.told["offered"]


def test_one_message_asked_for_a_thousand_times(attack) -> None:
    outcome = attack("iwant_amplification", seconds=SECONDS)
    assert outcome.told["times"] < 5


def test_replayed_messages_are_delivered_once(attack) -> None:
    outcome = attack("replay", seconds=SECONDS)
    assert outcome.messages("advert/accept") == outcome.told["different"]


def test_a_flood_of_adverts_by_eight_peers_delays_no_certificate(attack) -> None:
    attack("message_flood", name="advert", verdict="ok", peers=8, size=800, seconds=4.0)


def test_a_flood_of_large_messages(fresh, attack) -> None:
    attack("message_flood", name="heartbeat", verdict="ok", peers=2, size=200_000, seconds=SECONDS)


def test_rejected_messages_cost_the_connection(attack) -> None:
    outcome = attack("message_flood", name="advert", verdict="reject", peers=4, size=100, seconds=SECONDS)
    assert outcome.told["ended"] >= 4


def test_ignored_messages_cost_nothing(attack) -> None:
    outcome = attack("publishes", name="advert", count=50, rate_per_s=50)
    assert not outcome.told["ended"]


def test_malformed_gossip_costs_the_connection(attack) -> None:
    outcome = attack("malformed_gossip")
    assert all(outcome.told["ended"].values()), outcome.told


def test_interleaved_writes(attack) -> None:
    assert attack("interleaved_writes").told["ended"]


def test_a_reset_gossip_stream_is_opened_again(attack) -> None:
    outcome = attack("resets_gossip_streams")
    assert not outcome.told["ended"]
    assert outcome.told["heard"] > 2000


def test_validators_with_a_bug(attack) -> None:
    outcome = attack("raising_validators", count=50)
    assert not outcome.told["ended"], "our bug was held against the sender"
    assert outcome.messages("advert/ignore") >= 50
    assert outcome.messages("advert/accept") >= 1


def test_a_slow_consumer(attack, scene) -> None:
    """Our own reader of adverts stands still: its queue gives way, and nothing else waits for it."""
    scene.victim.ask("pause", topic="advert")
    outcome = attack("publishes", name="advert", count=1500, rate_per_s=600)
    assert not outcome.told["ended"]
    scene.victim.ask("resume", topic="advert")
