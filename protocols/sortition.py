"""Who is drawn: the public committee of a subject, and the secret lottery that fills large committees.

Both are pure integer arithmetic, so every node derives the same members on every platform.

* `committee` is public: anybody computes it from the beacon. It is unpredictable because the beacon is.
* `draw` is private: each node feeds its own VRF output, and shows the proof when it is drawn (Gilad et al.,
  "Algorand: Scaling Byzantine Agreements for Cryptocurrencies", SOSP 2017, §5).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate

from kaisar_p2p.wire.crypto import domain

_REJECTIONS = 4096
_FRACTION_BITS = 256
_SPARE_BITS = 128


def committee(
    beacon: bytes, subject: bytes, registry: Sequence[tuple[bytes, int]], k: int, *, network: bytes
) -> tuple[int, ...]:
    """Draw k members of the registry without replacement, with chances in proportion to stake.

    Args:
        beacon: the slot's or block's 32-byte beacon.
        subject: whom or what the committee is for, such as a worker's key or an order's id.
        registry: (public key, stake in planck) in the registry's order; who has no stake is never drawn.
        k: seats; fewer are filled when fewer members have stake.
        network: the 32-byte network id.

    Returns:
        Indices into the registry, in seat order.
    """
    return draw_committee(domain("popw/draw", network), beacon, subject, [stake for _, stake in registry], k)


def draw_committee(prefix: bytes, beacon: bytes, subject: bytes, stakes: Sequence[int], k: int) -> tuple[int, ...]:
    """`committee` under an explicit domain prefix.

    Points on the line of all stake are hashed from a counter, and points on members already seated are thrown
    away. One member may hold nearly all the stake, so after 4096 points the seated are taken off the line
    instead: the same distribution, in bounded time.
    """
    base = sha256(prefix + beacon + subject).digest()
    stakes = [max(stake, 0) for stake in stakes]
    seats: list[int] = []
    ends, seated, wanted = list(accumulate(stakes)), set[int](), min(k, sum(stake > 0 for stake in stakes))
    counter = 0
    while len(seats) < wanted:
        if counter >= _REJECTIONS:
            ends = list(accumulate(0 if index in seated else stake for index, stake in enumerate(stakes)))
        point = int.from_bytes(sha256(base + struct.pack("<I", counter)).digest(), "little") % ends[-1]
        counter += 1
        member = bisect_right(ends, point)
        if member not in seated:
            seated.add(member)
            seats.append(member)
    return tuple(seats)


def draw(output: bytes, label: bytes, stake: int, expected: int, total: int) -> int:
    """Votes that a VRF output wins for `stake` when `expected` votes out of `total` stake are drawn.

    The number is binomial(stake, expected / total), found by inverting its distribution at a uniform point
    hashed from `output` and `label`. Splitting stake over several keys gains nothing.

    Args:
        output: 64-byte VRF output of the member.
        label: what is drawn (epoch, role).
        stake: the member's stake, in the same unit as `total`.
        expected: votes to draw on average, over everybody (τ).
        total: stake of everybody.

    Returns:
        0 to `stake`.

    Raises:
        ValueError: the member has more stake than everybody together.
    """
    if stake > total:
        raise ValueError(f"stake {stake} of a total of {total}")
    if stake <= 0 or expected <= 0:
        return 0
    if expected >= total:
        return stake
    point = int.from_bytes(sha256(b"popw/sort" + label + output).digest(), "big")
    extra = _extra_bits(stake, expected, total)
    return _invert_binomial(point << extra, stake, expected, total, _FRACTION_BITS + extra)


def _extra_bits(stake: int, expected: int, total: int) -> int:
    """Fraction bits beyond 256 that keep P(no vote) from vanishing for a member with much of the stake.

    P(0) = (1 − p)^stake, and −log2(1 − p) ≤ 2p for p ≤ 1/2. For larger p the total is below 2·expected, and
    (1 − p) ≥ 1/total bounds it.
    """
    small = 2 * expected <= total
    bits = 2 * stake * expected // total if small else stake * total.bit_length()
    return bits if bits > _SPARE_BITS else 0


def _invert_binomial(point: int, stake: int, expected: int, total: int, bits: int) -> int:
    """Smallest j with point < P(votes ≤ j), in fixed point with `bits` of fraction."""
    one = 1 << bits
    chance = (expected << bits) // total
    against = one - chance
    probability = _power(against, stake, bits)
    cumulative, votes = probability, 0
    while point >= cumulative and votes < stake and probability:
        probability = probability * (stake - votes) * chance // ((votes + 1) * against)
        votes += 1
        cumulative += probability
    return votes


def _power(base: int, exponent: int, bits: int) -> int:
    """base ** exponent in fixed point, by squaring."""
    result = 1 << bits
    while exponent:
        if exponent & 1:
            result = result * base >> bits
        base = base * base >> bits
        exponent >>= 1
    return result
