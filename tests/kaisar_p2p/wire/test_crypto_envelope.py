"""A signature is for one purpose, one network and one message; only a checked one makes a Verified message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire.codec import U32, decode, encode, message
from kaisar_p2p.wire.crypto import KeyPair, domain, verify
from kaisar_p2p.wire.envelope import Signed, Verified, open_signed, seal

NETWORK, OTHER = bytes(range(32)), bytes(32)
KEYS = KeyPair.from_seed(b"k" * 32)


@message(124)
@dataclass(frozen=True)
class Ping:
    DOMAIN: ClassVar[str] = "test/ping"
    value: U32


@message(123)
@dataclass(frozen=True)
class Pong:
    DOMAIN: ClassVar[str] = "test/pong"
    value: U32


def test_an_envelope_opens_for_its_class_and_network() -> None:
    verified = open_signed(Ping, seal(Ping(7), KEYS, NETWORK), NETWORK)
    assert (verified.message, verified.signer) == (Ping(7), KEYS.public_key)
    assert open_signed((Pong, Ping), verified.envelope, NETWORK).message == Ping(7)


def test_another_network_another_class_another_domain_are_refused() -> None:
    envelope = seal(Ping(7), KEYS, NETWORK)
    with pytest.raises(SignatureError):
        open_signed(Ping, envelope, OTHER)
    with pytest.raises(DecodeError):
        open_signed(Pong, envelope, NETWORK)
    body = encode(Pong(7))
    crossed = encode(Signed(body, KEYS.public_key, KEYS.sign(Ping.DOMAIN, NETWORK, body)))
    with pytest.raises(SignatureError):
        open_signed(Pong, crossed, NETWORK)


@given(st.integers(0), st.integers(1, 255))
def test_no_changed_byte_opens(position: int, flip: int) -> None:
    envelope = bytearray(seal(Ping(7), KEYS, NETWORK))
    envelope[position % len(envelope)] ^= flip
    with pytest.raises((DecodeError, SignatureError)):
        open_signed(Ping, bytes(envelope), NETWORK)


@given(st.binary(max_size=300))
def test_any_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises((DecodeError, SignatureError)):
        open_signed(Ping, data, NETWORK)


def test_somebody_elses_signature_under_my_name_is_refused() -> None:
    signed = decode(Signed, seal(Ping(7), KEYS, NETWORK))
    stranger = KeyPair.from_seed(b"s" * 32)
    with pytest.raises(SignatureError):
        open_signed(Ping, encode(Signed(signed.body, stranger.public_key, signed.signature)), NETWORK)


def test_verified_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError, match="only open_signed"):
        Verified(Ping(7), KEYS.public_key, b"", object())


def test_secrets_do_not_show() -> None:
    assert KEYS.seed == b"k" * 32
    assert KEYS.seed.hex() not in repr(KEYS) and repr(KEYS.secret) not in repr(KEYS)


@pytest.mark.parametrize("tag", ["", "a-domain-of-17-by"])
def test_a_domain_has_one_to_sixteen_bytes(tag: str) -> None:
    with pytest.raises(ValueError, match="domain"):
        domain(tag, NETWORK)
    with pytest.raises(ValueError, match="domain"):
        domain("fine", NETWORK[:31])


def test_signatures_of_other_lengths_and_keys_are_false_not_errors() -> None:
    signature = KEYS.sign("test/ping", NETWORK, b"x")
    assert verify(KEYS.public_key, "test/ping", NETWORK, b"x", signature)
    assert not verify(KEYS.public_key, "test/ping", NETWORK, b"x", signature[:63])
    assert not verify(KEYS.public_key[:31], "test/ping", NETWORK, b"x", signature)
    assert not verify(bytes(32), "test/ping", NETWORK, b"x", signature)
    assert not verify(b"\xff" * 32, "test/ping", NETWORK, b"x", signature)
