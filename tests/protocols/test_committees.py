"""Sizes of committees, and what a certificate must hold."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from protocols.committees import (
    check_committee,
    check_size,
    deploy_committee,
    deploy_size,
    epoch_members,
    header_stake,
    is_supermajority,
    verify_certificate,
)
from protocols.epochs import EpochCertificate
from protocols.interpreter.state import State
from protocols.params import DEMO, MAINNET
from protocols.quorum import Committee, QuorumCertificate, ReadyCore

NETWORK = bytes(32)
PAIRS = [KeyPair.from_seed(sha256(bytes([seat])).digest()) for seat in range(7)]
COMMITTEE = Committee(tuple(pair.public_key for pair in PAIRS), 5)
CORE = ReadyCore(bytes(32), bytes(32))


def certificate(seats, core=CORE):
    signatures = tuple(PAIRS[seat].sign(core.DOMAIN, NETWORK, encode(core)) for seat in seats)
    return QuorumCertificate(core, sum(1 << seat for seat in seats), signatures)


@pytest.mark.parametrize(
    ("eligible", "size"),
    [
        (0, (0, 0)), (1, (1, 1)), (2, (2, 2)), (3, (3, 3)), (4, (4, 3)), (7, (7, 5)), (15, (15, 11)),
        (16, (16, 11)), (17, (16, 11)), (99, (16, 11)), (100, (24, 16)), (10**6, (24, 16)),
    ],
)  # fmt: skip
def test_check_sizes(eligible, size):
    assert check_size(MAINNET, eligible) == size


@given(st.integers(1, 10**6))
def test_two_quorums_share_a_third_of_the_seats(eligible):
    for k, threshold in (check_size(MAINNET, eligible), deploy_size(MAINNET, eligible)):
        assert 0 < threshold <= k and 3 * (2 * threshold - k) >= k


@pytest.mark.parametrize(
    ("eligible", "size"),
    [(0, (0, 0)), (1, (1, 1)), (3, (3, 3)), (4, (4, 3)), (6, (6, 5)), (7, (7, 5)), (99, (7, 5))],
)
def test_deploy_sizes(eligible, size):
    assert deploy_size(MAINNET, eligible) == size


def test_a_committee_needs_its_beacon_and_registry():
    registry = tuple((bytes([index]) * 32, 10 + index) for index in range(30))
    state = State(NETWORK, DEMO, beacons=Map({5: bytes([5]) * 32}), registries=Map({1: registry, 2: ()}))
    drawn = check_committee(state, 5, bytes(32))
    assert drawn is not None and len(set(drawn.seats)) == 16 and drawn.threshold == 11
    assert check_committee(state, 5, bytes([1]) * 32) != drawn
    assert check_committee(state, 6, bytes(32)) is None
    assert check_committee(replace(state, registries=Map({2: registry})), 5, bytes(32)) is None
    assert check_committee(replace(state, registries=Map({1: ()})), 5, bytes(32)) is None


def test_an_order_without_checkers_has_no_committee():
    assert deploy_committee(DEMO, (), bytes(32), bytes(32), network=NETWORK) is None
    drawn = deploy_committee(DEMO, ((bytes([1]) * 32, 5),), bytes(32), bytes(32), network=NETWORK)
    assert drawn == Committee((bytes([1]) * 32,), 1)


@given(st.sets(st.integers(0, 6)))
def test_a_certificate_needs_the_threshold(seats):
    assert verify_certificate(certificate(sorted(seats)), COMMITTEE, NETWORK) == (len(seats) >= 5)


def test_certificates_that_do_not_hold():
    good = certificate(range(5))
    assert verify_certificate(good, COMMITTEE, NETWORK)
    for wrong in (
        replace(good, mask=0b111110),
        replace(good, mask=0b1111),
        replace(good, mask=0b10001111 << 3),
        replace(good, mask=(1 << 64) - 1),
        replace(good, signatures=good.signatures[:4]),
        replace(good, signatures=(bytes(64), *good.signatures[1:])),
        replace(good, core=replace(CORE, worker=bytes([1]) * 32)),
    ):
        assert not verify_certificate(wrong, COMMITTEE, NETWORK)
    assert not verify_certificate(good, COMMITTEE, bytes([1]) * 32)
    assert not verify_certificate(QuorumCertificate(CORE, 0, ()), Committee((), 0), NETWORK)


def test_the_stake_behind_a_mask():
    registry = ((bytes([1]) * 32, 10), (bytes([2]) * 32, 20), (bytes([3]) * 32, 30))
    two = (bytes(64),) * 2
    assert header_stake(EpochCertificate(b"\x05", two), registry) == (40, 60)
    assert header_stake(EpochCertificate(b"\x05\x00", two), registry) == (40, 60)
    assert header_stake(EpochCertificate(b"\x01", two), registry) == (0, 60)
    assert header_stake(EpochCertificate(b"\x09", two), registry) == (0, 60)
    assert header_stake(EpochCertificate(b"", ()), registry) == (0, 60)


def test_two_thirds():
    assert is_supermajority(40, 60)
    assert not is_supermajority(39, 60)
    assert not is_supermajority(0, 0)


def test_a_large_registry_can_still_be_certified():
    """Its epochs are signed by the 256 largest stakes: keys are free to grind, so their order must not decide."""
    cheap = [(index.to_bytes(32, "big"), 100) for index in range(300)]
    honest = [(b"\xff" * 31 + bytes([index]), 5_000) for index in range(40)]
    registry = tuple(cheap + honest)
    members = epoch_members(registry)
    assert len(members) == 256 and set(honest) <= set(members) <= set(registry)
    assert list(members) == sorted(members)
    everybody = EpochCertificate(b"\xff" * 32, (bytes(64),) * 256)
    signed, total = header_stake(everybody, registry)
    assert signed == total == 40 * 5_000 + 216 * 100
    only_honest = EpochCertificate(bytes(27) + b"\xff" * 5, (bytes(64),) * 40)
    assert is_supermajority(*header_stake(only_honest, registry))
    assert epoch_members(registry[:256]) == registry[:256]
    assert epoch_members(tuple((key, 1) for key, _ in registry)) == tuple((key, 1) for key, _ in registry[:256])
