"""One encoding for each message, one message for each encoding, and nothing but DecodeError for everything else."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import (
    U8,
    U64,
    AtMost,
    Bytes32,
    Count,
    Planck,
    Text64,
    decode,
    decode_any,
    encode,
    is_line,
    message,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "vectors"))
from specimens import message_classes, specimen


@message(118)
@dataclass(frozen=True)
class Labelled:
    name: Text64


CLASSES = list(message_classes().values())


@message(126)
@dataclass(frozen=True)
class Inner:
    number: U8


@message(127)
@dataclass(frozen=True)
class Outer:
    number: U64
    amount: Planck
    name: Text64
    key: Bytes32
    inner: Inner
    many: Annotated[tuple[Inner, ...], Count(3)]
    free: Annotated[bytes, AtMost(5)]


INNERS = st.builds(Inner, st.integers(0, 255))
OUTERS = st.builds(
    Outer,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**128 - 1),
    st.text(max_size=16).filter(is_line),
    st.binary(min_size=32, max_size=32),
    INNERS,
    st.lists(INNERS, max_size=3).map(tuple),
    st.binary(max_size=5),
)


@given(OUTERS)
def test_what_is_encoded_decodes_to_itself(value: Outer) -> None:
    assert decode(Outer, encode(value)) == value


@given(st.binary(max_size=80))
def test_any_bytes_are_one_message_or_a_decode_error(data: bytes) -> None:
    for cls in (Inner, Outer):
        try:
            value = decode(cls, data)
        except DecodeError:
            continue
        assert encode(value) == data


@given(OUTERS, st.data())
def test_changed_bytes_are_another_message_or_a_decode_error(value: Outer, data: st.DataObject) -> None:
    encoded = bytearray(encode(value))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        other = decode(Outer, bytes(encoded))
    except DecodeError:
        return
    assert other != value and encode(other) == bytes(encoded)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@given(st.lists(PLAIN, max_size=8))
def test_any_msgpack_is_one_message_or_a_decode_error(items: list[Any]) -> None:
    for tag in (126, 127):
        data = msgpack.packb([tag, *items], use_bin_type=True)
        try:
            value = decode_any((Inner, Outer), data)
        except DecodeError:
            continue
        assert encode(value) == data


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("empty", b""),
        ("an integer in nine bytes", b"\x92\x7e\xcf" + (5).to_bytes(8, "big")),
        ("an array with a long length", b"\xdc\x00\x02\x7e\x05"),
        ("a byte behind it", b"\x92\x7e\x05\x00"),
        ("cut off", b"\x92\x7e"),
        ("another tag", b"\x92\x7f\x05"),
        ("a boolean for an integer", b"\x92\x7e\xc3"),
        ("a boolean for the tag", b"\x92\xc3\x05"),
        ("a float", b"\x92\x7e\xca\x40\xa0\x00\x00"),
        ("nil", b"\x92\x7e\xc0"),
        ("negative", b"\x92\x7e\xff"),
        ("too large", b"\x92\x7e\xcd\x01\x00"),
        ("a field too many", b"\x93\x7e\x05\x05"),
        ("no array", b"\x05"),
        ("a map", b"\x81\x7e\x05"),
        ("a reserved byte", b"\xc1"),
        ("a time stamp", b"\x92\x7e\xd6\xff\x00\x00\x00\x00"),
        ("a huge announced length", b"\xdd\xff\xff\xff\xff"),
        ("huge announced bytes", b"\xc6\xff\xff\xff\xff"),
        ("nested ten thousand deep", b"\x91" * 10_000 + b"\x00"),
        ("text that is not UTF-8", b"\x92\x7e\xa1\xff"),
    ],
)
def test_refused(why: str, data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(Inner, data)
    assert decode(Inner, b"\x92\x7e\x05") == Inner(5)


def test_an_amount_is_minimal() -> None:
    value = Outer(0, 256, "", bytes(32), Inner(0), (), b"")
    padded = encode(value).replace(b"\xc4\x02\x01\x00", b"\xc4\x03\x00\x01\x00")
    with pytest.raises(DecodeError, match="minimal"):
        decode(Outer, padded)


@pytest.mark.parametrize(
    "changes",
    [
        {"number": -1},
        {"number": 2**64},
        {"number": True},
        {"amount": 2**128},
        {"amount": -1},
        {"name": "x" * 65},
        {"name": b"x"},
        {"key": bytes(31)},
        {"inner": 5},
        {"inner": Inner(256)},
        {"many": (Inner(1),) * 4},
        {"many": [Inner(1)]},
        {"free": bytes(6)},
    ],
)
def test_our_own_mistakes_are_value_errors(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "number": 1, "amount": 1, "name": "n", "key": bytes(32), "inner": Inner(1), "many": (), "free": b""
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError)):
        encode(Outer(**(fields | changes)))


def test_a_tag_belongs_to_one_message() -> None:
    with pytest.raises(TypeError, match="taken"):

        @message(126)
        @dataclass(frozen=True)
        class Another:
            number: U8


def test_a_field_without_a_bound_cannot_be_encoded() -> None:
    @message(125)
    @dataclass(frozen=True)
    class Unbounded:
        number: int

    with pytest.raises(TypeError, match="no canonical encoding"):
        encode(Unbounded(1))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_message_of_the_network_round_trips_and_survives_mutation(cls: type[Any]) -> None:
    for index in range(2):
        value = specimen(cls, index)
        data = encode(value)
        assert decode(cls, data) == value
        for position in range(min(len(data), 150)):
            for bad in (data[:position], data[:position] + bytes([data[position] ^ 0x81]) + data[position + 1 :]):
                try:
                    other = decode(cls, bad)
                except DecodeError:
                    continue
                assert encode(other) == bad and other != value


@pytest.mark.parametrize("letter", ["\n", "\r", "\x1b", "\x07", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066"])
def test_text_for_people_does_not_steer_what_shows_it(letter: str) -> None:
    shown, hidden = encode(Labelled("name")), msgpack.packb((118, f"na{letter}me"))
    assert decode(Labelled, shown).name == "name"
    with pytest.raises(DecodeError):
        decode(Labelled, hidden)
    with pytest.raises(ValueError):
        encode(Labelled(f"na{letter}me"))
