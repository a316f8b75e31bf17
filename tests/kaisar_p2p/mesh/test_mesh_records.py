from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.mesh.discovery.records import (
    MAX_ADDRESSES,
    MAX_LIFETIME_S,
    RECORD_BYTES,
    SKEW_S,
    AddressRecord,
    OwnRecord,
    network_id,
    open_record,
)
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Signed, seal

NETWORK = network_id("test")
ALICE, MALLORY = KeyPair.from_seed(b"a" * 32), KeyPair.from_seed(b"m" * 32)
NOW = 1_800_000_000


def record(**changes: object) -> AddressRecord:
    plain = AddressRecord(ALICE.public_key, 1, ("/ip4/192.0.2.1/tcp/4001",), NOW, 3600, 0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_record_is_opened_by_anybody() -> None:
    opened = open_record(seal(record(), ALICE, NETWORK), NETWORK, NOW)
    assert opened.message == record()
    assert opened.signer == ALICE.public_key


def test_only_another_process_with_our_key_proves_that_there_is_one() -> None:
    clock = [float(NOW)]
    own, twin = (
        OwnRecord(ALICE, NETWORK, lambda: ("/ip4/192.0.2.1/tcp/4001",), 3600, lambda: clock[0]) for _ in range(2)
    )
    before = open_record(twin.envelope(), NETWORK, NOW).message
    clock[0] += 10
    told = [open_record(one.envelope(), NETWORK, NOW).message for one in (own, own)]
    own.services = 1
    told.append(open_record(own.envelope(), NETWORK, NOW).message)
    twin.services = 2
    assert [own.proves_twin(each) for each in told] == [False, False, False]
    assert not own.proves_twin(before), "as old as this process: it may be from before a restart"
    assert not own.proves_twin(replace(told[0], issued_at=NOW + 5000)), "a clock that was ahead then"
    assert own.proves_twin(open_record(twin.envelope(), NETWORK, NOW).message)


def test_nobody_signs_for_another_key() -> None:
    with pytest.raises(SignatureError):
        open_record(seal(record(), MALLORY, NETWORK), NETWORK, NOW)
    genuine = decode(Signed, seal(record(), MALLORY, NETWORK))
    with pytest.raises(SignatureError):
        open_record(encode(replace(genuine, signer=ALICE.public_key)), NETWORK, NOW)


def test_a_record_of_another_network_is_none() -> None:
    with pytest.raises(SignatureError):
        open_record(seal(record(), ALICE, network_id("other")), NETWORK, NOW)


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_breaks_it(place: int, change: int) -> None:
    data = bytearray(seal(record(), ALICE, NETWORK))
    data[place % len(data)] ^= change
    with pytest.raises((SignatureError, DecodeError)):
        open_record(bytes(data), NETWORK, NOW)


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises((SignatureError, DecodeError)):
        open_record(data, NETWORK, NOW)


@given(st.integers(-3600, 3600), st.integers(-3600, 3600))
def test_clocks_may_be_off_by_an_hour_each(signers: int, readers: int) -> None:
    envelope = seal(record(issued_at=NOW + signers), ALICE, NETWORK)
    assert open_record(envelope, NETWORK, NOW + readers).message.key == ALICE.public_key


@pytest.mark.parametrize(
    "changes",
    [
        {"issued_at": NOW - 3600 - SKEW_S - 1},  # replayed, long after
        {"issued_at": NOW + SKEW_S + 1},
        {"lifetime_s": 0},
        {"lifetime_s": MAX_LIFETIME_S + 1},
    ],
)
def test_a_record_has_its_time(changes: dict[str, int]) -> None:
    with pytest.raises(DecodeError):
        open_record(seal(record(**changes), ALICE, NETWORK), NETWORK, NOW)


def test_size_is_bounded() -> None:
    with pytest.raises(ValueError, match="at most 16"):
        seal(record(addresses=("/ip4/192.0.2.1/tcp/1",) * (MAX_ADDRESSES + 1)), ALICE, NETWORK)
    longest = own(Clock(), ["x" * 200] * 5 + ["y" * 60] * 20)
    longest.surpass(2**64 - 3)
    assert RECORD_BYTES - 200 < len(longest.envelope()) <= RECORD_BYTES
    assert longest.envelope() == longest.envelope()
    with pytest.raises(DecodeError):
        open_record(b"\0" * (RECORD_BYTES + 1), NETWORK, NOW)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def own(clock: Clock, addresses: list[str]) -> OwnRecord:
    return OwnRecord(ALICE, NETWORK, lambda: addresses, 3600, clock)


def sequence_of(envelope: bytes) -> int:
    return open_record(envelope, NETWORK, NOW).message.sequence


def test_our_record_changes_with_what_it_says_and_with_time() -> None:
    clock, addresses = Clock(), ["/ip4/192.0.2.1/tcp/4001"]
    mine = own(clock, addresses)
    first = mine.envelope()
    clock.now += 800
    assert mine.envelope() == first
    addresses.append("/ip4/192.0.2.2/tcp/4001")
    second = mine.envelope()
    assert sequence_of(second) > sequence_of(first)
    mine.services = 1
    third = mine.envelope()
    assert sequence_of(third) > sequence_of(second)
    clock.now += 901
    assert sequence_of(mine.envelope()) > sequence_of(third)


def test_a_clock_that_went_back_does_not_make_us_unheard() -> None:
    clock = Clock()
    before_restart = sequence_of(own(clock, ["/ip4/192.0.2.1/tcp/1"]).envelope())
    clock.now -= 3000
    mine = own(clock, ["/ip4/192.0.2.2/tcp/1"])
    assert sequence_of(mine.envelope()) < before_restart
    assert mine.surpass(before_restart)  # a peer still had the old one, and told
    assert sequence_of(mine.envelope()) > before_restart
    assert not mine.surpass(before_restart)


def test_what_does_not_fit_is_left_out() -> None:
    mine = own(Clock(), ["x" * 1000, *(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 50))])
    told = open_record(mine.envelope(), NETWORK, NOW).message.addresses
    assert len(told) == MAX_ADDRESSES
    assert "x" * 1000 not in told
