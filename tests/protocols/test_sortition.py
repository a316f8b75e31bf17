"""Committees and lottery draws: the same on every node, in proportion to stake, in bounded time."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisar_p2p.wire.crypto import domain
from protocols.sortition import committee, draw, draw_committee

VECTOR_PATH = Path(__file__).parents[1] / "vectors"
VECTORS = json.loads((VECTOR_PATH / "popw.json").read_text())
NETWORK = bytes(range(32))
stakes_of_many = st.lists(st.integers(0, 10**27), max_size=40)


def noise(name: str, index: int, length: int) -> bytes:
    blocks = range(-(-length // 32))
    return b"".join(sha256(f"{name}/{index}/{block}".encode()).digest() for block in blocks)[:length]


def stakes_of(index: int, size: int) -> list[int]:
    numbers = (int.from_bytes(noise("stake", 1000 * index + i, 2), "big") for i in range(size - 1))
    return [number * 10**18 for number in numbers] + [10**22]


@pytest.mark.parametrize("index", range(len(VECTORS["committees"])))
def test_committees_agree_with_the_independent_implementation(index: int) -> None:
    vector = VECTORS["committees"][index]
    prefix, beacon, subject = (bytes.fromhex(vector[name]) for name in ("prefix", "beacon", "subject"))
    seats = draw_committee(prefix, beacon, subject, stakes_of(index, vector["size"]), vector["k"])
    assert list(seats) == vector["seats"]


@pytest.mark.parametrize("index", range(len(VECTORS["draws"])))
def test_draws_agree_with_the_independent_implementation(index: int) -> None:
    vector = VECTORS["draws"][index]
    stake, expected, total = int(vector["stake"]), vector["expected"], int(vector["total"])
    outputs = [noise("output", 100 * index + i, 64) for i in range(12)]
    assert [draw(output, b"label", stake, expected, total) for output in outputs] == vector["votes"]


@given(stakes_of_many, st.integers(0, 24), st.binary(max_size=32))
@settings(deadline=None)
def test_a_committee_has_different_members_with_stake(stakes: list[int], k: int, beacon: bytes) -> None:
    registry = [(bytes([index]) * 32, stake) for index, stake in enumerate(stakes)]
    seats = committee(beacon, b"worker", registry, k, network=NETWORK)
    assert len(seats) == len(set(seats)) == min(k, sum(stake > 0 for stake in stakes))
    assert all(stakes[index] > 0 for index in seats)
    assert seats == committee(beacon, b"worker", registry, k, network=NETWORK)
    assert seats[: k // 2] == committee(beacon, b"worker", registry, k // 2, network=NETWORK)


def test_a_committee_depends_on_beacon_subject_and_network() -> None:
    registry = [(bytes(32), 10**21)] * 200
    base = committee(b"b", b"s", registry, 16, network=NETWORK)
    assert base == draw_committee(domain("popw/draw", NETWORK), b"b", b"s", [10**21] * 200, 16)
    others = [
        committee(b"c", b"s", registry, 16, network=NETWORK),
        committee(b"b", b"t", registry, 16, network=NETWORK),
        committee(b"b", b"s", registry, 16, network=bytes(32)),
    ]
    assert base not in others and len(set(others)) == 3


def test_a_dominating_stake_cannot_stall_the_draw() -> None:
    seats = draw_committee(b"", b"", b"", [1, 10**27, 1, 0, 1], 24)
    assert seats[0] == 1 and sorted(seats) == [0, 1, 2, 4]


def test_seats_come_in_proportion_to_stake() -> None:
    stakes = [3] * 10 + [1] * 90  # a quarter of the stake on a tenth of the members
    firsts = [draw_committee(b"", index.to_bytes(4, "big"), b"", stakes, 1)[0] for index in range(4000)]
    rich = sum(first < 10 for first in firsts)
    assert abs(rich - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5


@given(st.binary(min_size=64, max_size=64), st.integers(0, 10**9), st.integers(1, 2000), st.integers(1, 10**9))
@settings(deadline=None)
def test_votes_lie_between_none_and_the_stake(output: bytes, stake: int, expected: int, total: int) -> None:
    if stake > total:
        with pytest.raises(ValueError, match="stake"):
            draw(output, b"", stake, expected, total)
        return
    votes = draw(output, b"", stake, expected, total)
    assert 0 <= votes <= stake
    assert votes == draw(output, b"", stake, expected, total)
    if expected >= total:
        assert votes == stake


def test_the_votes_are_binomial() -> None:
    stake, expected, total, tries = 50_000, 24, 1_000_000, 3000
    votes = [draw(noise("binomial", index, 64), b"", stake, expected, total) for index in range(tries)]
    mean, chance = stake * expected / total, expected / total
    assert abs(sum(votes) / tries - mean) < 5 * (mean * (1 - chance) / tries) ** 0.5
    none = (1 - chance) ** stake
    assert abs(votes.count(0) / tries - none) < 5 * (none * (1 - none) / tries) ** 0.5


@pytest.mark.parametrize(("stake", "total"), [(10**27, 10**27), (6 * 10**26, 10**27), (700, 700), (999, 1000)])
def test_a_member_with_most_of_the_stake_is_drawn_about_as_often(stake: int, total: int) -> None:
    """In 256 bits P(no vote) would be zero here, and the largest member would never be drawn."""
    mean = stake * 500 / total
    votes = [draw(noise("large", index, 64), b"", stake, 500, total) for index in range(20)]
    assert all(abs(vote - mean) < 6 * mean**0.5 for vote in votes)


def test_another_label_is_another_draw() -> None:
    outputs: list[Any] = [noise("label", index, 64) for index in range(20)]
    one, other = ([draw(output, label, 10**8, 400, 10**9) for output in outputs] for label in (b"1", b"2"))
    assert one != other
