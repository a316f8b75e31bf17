"""Accounts of peers and addresses: what leads to a ban, how long it lasts, what survives a restart."""

from __future__ import annotations

import contextlib
import time

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import StoreError
from kaisar_p2p.mesh.guard.reputation import (
    BAN_POINTS,
    FORWARDED_POINTS,
    HALF_LIFE_S,
    REJECTED_POINTS,
    STRIKE_HALF_LIFE_S,
    TOLERATED_POINTS,
    Reputation,
)
from kaisar_p2p.mesh.memory import Remembered

KEY, OTHER = b"k" * 32, b"o" * 32


def test_repetition_bans_and_time_heals() -> None:
    reputation = Reputation(ban_s=60.0)
    times = int(BAN_POINTS / REJECTED_POINTS)
    assert [reputation.penalise(KEY, REJECTED_POINTS, 0.0) for _ in range(times)] == [False] * (times - 1) + [True]
    assert reputation.is_banned(KEY, 59.0)
    assert not reputation.is_banned(KEY, 61.0)
    assert not reputation.is_banned(OTHER, 0.0)
    assert reputation.mesh_score(KEY, 10 * HALF_LIFE_S) == 0.0
    assert -1.0 < reputation.score(KEY, 10 * STRIKE_HALF_LIFE_S) <= 0.0
    slow = Reputation(ban_s=60.0)
    assert not any(slow.penalise(KEY, REJECTED_POINTS, number * HALF_LIFE_S) for number in range(1000))


def test_forwarding_costs_less_than_authoring() -> None:
    assert 2 * FORWARDED_POINTS < REJECTED_POINTS
    forwarder = Reputation(ban_s=60.0)
    assert not any(forwarder.penalise(KEY, FORWARDED_POINTS, 0.0) for _ in range(int(BAN_POINTS / REJECTED_POINTS)))


def test_each_ban_is_longer_than_the_last_up_to_a_limit() -> None:
    reputation, now, lengths = Reputation(60.0, 7200.0), 0.0, []
    for _ in range(6):
        lengths.append(reputation.ban(KEY, now))
        now += lengths[-1] + 1
    assert lengths[0] == 60
    assert 250 < lengths[1] <= 300
    assert 1000 < lengths[2] <= 1500
    assert lengths == sorted(lengths)
    assert lengths[-1] == 7200


def test_what_is_found_during_a_ban_is_no_further_strike() -> None:
    reputation = Reputation(60.0)
    reputation.ban(KEY, 0.0)
    assert reputation.ban(KEY, 1.0) == 59.0
    assert reputation.penalise(KEY, BAN_POINTS, 2.0)
    assert 60 < reputation.ban(KEY, 61.0) <= 300


def test_strikes_keep_a_peer_out_of_the_meshes_for_hours() -> None:
    reputation = Reputation(60.0)
    reputation.ban(KEY, 0.0)
    reputation.ban(KEY, 100.0)
    assert reputation.mesh_score(KEY, 3600.0) < 0
    assert reputation.mesh_score(KEY, 4 * STRIKE_HALF_LIFE_S) == 0


def test_new_keys_from_one_address_have_no_clean_sheet() -> None:
    where: dict[bytes, str] = {}
    reputation = Reputation(60.0, address_of=where.get)
    keys = [bytes([number]) * 32 for number in range(20)]
    where.update(dict.fromkeys(keys, "8.8.8.8/32"))
    assert reputation.ban(keys[0], 0.0) == 60
    assert not reputation.is_address_banned("8.8.8.8/32", 0.0)  # one may share an address with one attacker
    assert reputation.blame(b"", "8.8.8.8/32", 0.0) > 0
    banned = [reputation.ban(key, 1.0) for key in keys[1:]]
    assert max(banned) > 4 * 60
    assert reputation.is_address_banned("8.8.8.8/32", 2.0)
    assert not reputation.is_address_banned("8.8.8.8/32", 3603.0)
    assert not reputation.is_address_banned("9.9.9.9/32", 2.0)


def test_failed_handshakes_are_charged_to_their_address() -> None:
    reputation = Reputation(60.0)
    for _ in range(int(BAN_POINTS) + 1):
        reputation.penalise_address("8.8.8.8/32", 1.0, 0.0)
    assert reputation.is_address_banned("8.8.8.8/32", 1.0)


def test_a_flood_of_identities_does_not_wash_the_worst_away() -> None:
    reputation = Reputation(60.0, remembered=64)
    for _ in range(3):
        reputation.ban(KEY, 0.0)
    for number in range(2000):
        reputation.penalise(number.to_bytes(32, "big"), 2.0, 0.0)
    assert reputation.is_banned(KEY, 1.0)
    assert len(reputation._keys.records) <= 72


# -- over restarts ----------------------------------------------------------------------------------------------------


def test_what_is_known_survives_a_restart_and_goes_on_decaying() -> None:
    before = Reputation(60.0)
    before.ban(KEY, 1000.0)
    before.penalise(OTHER, 30.0, 1000.0)
    before.penalise_address("8.8.8.8/32", 99.5, 1000.0)
    after = Reputation(60.0)
    assert after.load(before.dump(1000.0), 30.0, 5.0) == 3
    assert 29 < after.ban_left_s(KEY, 5.0) < 31
    assert not after.is_banned(KEY, 36.0)
    assert after.score(KEY, 5.0) < -TOLERATED_POINTS
    assert after.score(OTHER, 5.0) == pytest.approx(-30 * 0.5 ** (30 / HALF_LIFE_S))
    after.penalise_address("8.8.8.8/32", 5.0, 5.0)
    assert after.is_address_banned("8.8.8.8/32", 5.0)
    much_later = Reputation(60.0)
    much_later.load(before.dump(1000.0), 1e9, 5.0)
    assert much_later.score(KEY, 5.0) == pytest.approx(0.0)
    assert len(much_later.dump(5.0)) == 8


def test_what_is_saved_is_bounded() -> None:
    reputation = Reputation(60.0, remembered=50)
    for number in range(500):
        reputation.ban(number.to_bytes(32, "big"), 0.0)
    assert len(reputation.dump(0.0)) <= 8 + 50 * 62


@given(st.binary(max_size=200))
def test_any_blob_is_taken_over_or_refused(blob: bytes) -> None:
    for data in (blob, b"KRP1" + blob, b"KRP1\x00\x00\x00\x01" + blob):
        with contextlib.suppress(ValueError):
            Reputation(60.0).load(data, 0.0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 120), st.floats(0, 1e5)), max_size=40), st.floats(0, 1e6))
def test_a_restart_changes_no_judgement(offences: list[tuple[int, float, float]], passed_s: float) -> None:
    before, now = Reputation(60.0), 0.0
    keys = [bytes([number]) * 32 for number in range(6)]
    for number, points, step in offences:
        now += step
        before.penalise(keys[number], points, now)
    after = Reputation(60.0)
    after.load(before.dump(now), passed_s, 7.0)
    for key in keys:
        then = before.score(key, now + passed_s)
        assert after.score(key, 7.0) == pytest.approx(then, rel=1e-3, abs=2.5)  # what is small is not saved
        left_s = before.ban_left_s(key, now + passed_s)
        assert after.ban_left_s(key, 7.0) == pytest.approx(left_s, rel=1e-3, abs=0.1)


class Shelf:
    """A memory that can fail."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.saves = 0
        self.broken = False

    def load(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def save(self, name: str, blob: bytes) -> None:
        if self.broken:
            raise StoreError("the disk is full")
        self.saves += 1
        self.kept[name] = blob


async def test_bans_run_on_by_the_wall_clock_while_the_node_is_down() -> None:
    shelf, first = Shelf(), Reputation(60.0)
    remembered = Remembered(first, shelf, lambda: 1000.0)
    await remembered.load()
    first.ban(KEY, trio.current_time())
    await remembered.save()
    await remembered.save()
    assert shelf.saves == 1  # nothing new, nothing written
    for later, banned in ((1030.0, True), (1061.0, False), (500.0, True)):  # the last: a clock that was set back
        second = Reputation(60.0)
        await Remembered(second, shelf, lambda later=later: later).load()
        assert second.is_banned(KEY, trio.current_time()) == banned


async def test_a_memory_that_fails_costs_a_warning(caplog) -> None:
    shelf = Shelf()
    shelf.kept["reputation"] = b"what another version wrote"
    reputation = Reputation(60.0)
    remembered = Remembered(reputation, shelf)
    await remembered.load()
    assert "starting anew" in caplog.text
    reputation.ban(KEY, trio.current_time())
    shelf.broken = True
    await remembered.save()
    assert "disk is full" in caplog.text
    shelf.broken = False
    await remembered.save()
    assert shelf.saves == 1


async def test_it_is_saved_now_and_then(autojump_clock) -> None:
    shelf, reputation = Shelf(), Reputation(60.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Remembered(reputation, shelf).run)
        await trio.sleep(200)
        assert shelf.saves == 0
        reputation.ban(KEY, trio.current_time())
        await trio.sleep(61)
        while shelf.saves == 0:
            await trio.to_thread.run_sync(time.sleep, 0.001)
        assert shelf.saves == 1
        nursery.cancel_scope.cancel()
