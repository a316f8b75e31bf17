"""What is remembered of messages and authors: bounded, and no honest author is muted for long."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.gossip.seen import AuthorSequences, SeenMessages

A = b"a" * 32
S = 10**9
HOUR_S = 3600
NOW_NS = time.time_ns()


def authors(*, most: int = 10) -> AuthorSequences:
    return AuthorSequences(most, 120.0, 600.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 40)), max_size=80))
def test_seen_messages_are_kept_for_their_time_and_bounded(steps: list[tuple[int, float]]) -> None:
    seen, added, now = SeenMessages(1000, 60.0), {}, 0.0
    for number, pause_s in steps:
        now += pause_s
        seen.expire(now)
        seen.add(b"%d" % number, now)
        added[number] = now
        assert all(b"%d" % known in seen for known, at in added.items() if now - at < 60.0)


def test_seen_messages_are_bounded_by_number_and_age() -> None:
    seen = SeenMessages(100, 60.0)
    for number in range(1000):
        seen.add(b"%d" % number, 1.0)
        assert len(seen) <= 100
    assert b"999" in seen and b"960" in seen
    for now in (70.0, 140.0):
        seen.expire(now)
    assert len(seen) == 0


def test_an_old_message_is_a_replay_when_the_seen_cache_has_forgotten_it() -> None:
    known = authors()
    for second in range(0, 300, 10):
        assert not known.is_replay(A, NOW_NS + second * S, float(second))
        known.accepted(A, NOW_NS + second * S, float(second))
    assert known.is_replay(A, NOW_NS, 290.0)
    assert not known.is_replay(A, NOW_NS + 200 * S, 290.0)  # the seen-cache knows this one
    assert known.is_replay(A, NOW_NS + 200 * S, 350.0)
    assert known.is_replay(A, NOW_NS + 290 * S, 420.0)  # the newest one too
    assert not known.is_replay(b"b" * 32, NOW_NS, 290.0)


@given(st.integers(-HOUR_S, HOUR_S), st.lists(st.floats(0.001, 1000), max_size=20))
def test_no_clock_that_is_wrong_all_the_time_mutes_its_author(skew_s: int, pauses_s: list[float]) -> None:
    known, now = authors(), 0.0
    for pause_s in pauses_s:
        now += pause_s
        sequence = NOW_NS + skew_s * S + int(now * S)
        assert not known.is_replay(A, sequence, now)
        known.accepted(A, sequence, now)


def test_a_clock_that_was_set_back_mutes_its_author_for_a_while_only() -> None:
    known = authors()
    known.accepted(A, NOW_NS + HOUR_S * S, 0.0)
    assert known.is_replay(A, NOW_NS + 1 * S, 1.0)
    assert known.is_replay(A, NOW_NS + 599 * S, 599.0)
    assert not known.is_replay(A, NOW_NS + 601 * S, 601.0)
    known.accepted(A, NOW_NS + 601 * S, 601.0)
    assert not known.is_replay(A, NOW_NS + 602 * S, 602.0)
    assert known.is_replay(A, NOW_NS + 100 * S, 700.0)


def test_a_clock_that_was_set_back_by_less_than_the_window_mutes_nobody() -> None:
    known = authors()
    known.accepted(A, NOW_NS, 0.0)
    for second in range(1, 100):
        assert not known.is_replay(A, NOW_NS - 60 * S + second * S, float(second) / 10)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_random_numbers_as_javascript_has_them_are_left_to_the_seen_cache(numbers: list[int]) -> None:
    known = authors()
    known.accepted(A, 2**63 + 1, 0.0)  # one that cannot be a time, which nearly all are
    for now, number in enumerate(numbers):
        assert not known.is_replay(A, number, float(now))
        known.accepted(A, number, float(now))


def test_numbers_that_count_from_the_start_as_in_go_are_never_replays() -> None:
    known, start = authors(), NOW_NS - 48 * HOUR_S * S
    for number in range(20):
        assert not known.is_replay(A, start + number, number * 300.0)
        known.accepted(A, start + number, number * 300.0)
    assert known.is_replay(A, start + 3, 19 * 300.0 + 130)


def test_authors_are_bounded() -> None:
    known = authors(most=10)
    for number in range(100):
        known.accepted(b"%d" % number, NOW_NS, 0.0)
    assert len(known) == 10
