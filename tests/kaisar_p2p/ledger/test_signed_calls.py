from __future__ import annotations

from typing import Any

import pytest
import sr25519
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import CallRejected, DecodeError, SignatureError
from kaisar_p2p.ledger import ED25519, PAYLOAD_BYTES, SR25519, open_call, sign_call
from kaisar_p2p.ledger.calls import SIGNED_CALL_BYTES, CallBody, SignedCall
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import domain

NETWORK = bytes(range(32))
payloads = st.binary(max_size=300)
nonces = st.integers(0, 2**64 - 1)


class Sr25519Wallet:
    scheme = SR25519

    def __init__(self) -> None:
        self.pair = sr25519.pair_from_seed(bytes(32))
        self.public_key = self.pair[0]

    def sign(self, message: bytes) -> bytes:
        return sr25519.sign(self.pair, message)


class BrowserWallet(Sr25519Wallet):
    def sign(self, message: bytes) -> bytes:
        return super().sign(b"<Bytes>" + message + b"</Bytes>")


@given(payload=payloads, nonce=nonces)
def test_what_is_signed_opens_as_it_was(wallet: Any, payload: bytes, nonce: int) -> None:
    call = open_call(sign_call(payload, nonce, wallet, NETWORK), NETWORK)
    assert call.body == CallBody(wallet.public_key, ED25519, nonce, payload)


@given(payload=payloads, nonce=nonces, data=st.data())
def test_any_flipped_bit_is_refused(wallet: Any, payload: bytes, nonce: int, data: st.DataObject) -> None:
    signed = bytearray(sign_call(payload, nonce, wallet, NETWORK))
    bit = data.draw(st.integers(0, 8 * len(signed) - 1))
    signed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((DecodeError, SignatureError)):
        open_call(bytes(signed), NETWORK)


@given(payload=payloads, cut=st.integers(1, 64), tail=st.binary(min_size=1, max_size=4))
def test_shortened_or_extended_calls_are_refused(wallet: Any, payload: bytes, cut: int, tail: bytes) -> None:
    signed = sign_call(payload, 0, wallet, NETWORK)
    for changed in (signed[:-cut], signed[cut:], signed + tail, tail + signed):
        with pytest.raises((DecodeError, SignatureError)):
            open_call(changed, NETWORK)


@given(noise=st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises((DecodeError, SignatureError)):
        open_call(noise, NETWORK)


def test_another_network_is_refused(wallet: Any) -> None:
    with pytest.raises(SignatureError):
        open_call(sign_call(b"pay", 0, wallet, NETWORK), bytes(32))


@pytest.mark.parametrize("make_signer", [Sr25519Wallet, BrowserWallet])
def test_sr25519_calls_open(make_signer: type[Sr25519Wallet]) -> None:
    signer = make_signer()
    signed = sign_call(b"pay", 7, signer, NETWORK)
    assert open_call(signed, NETWORK).body.account == signer.public_key
    for position in range(len(signed)):
        changed = signed[:position] + bytes([signed[position] ^ 1]) + signed[position + 1 :]
        with pytest.raises((DecodeError, SignatureError)):
            open_call(changed, NETWORK)


def test_a_key_of_one_scheme_does_not_sign_for_the_other(wallet: Any) -> None:
    body = CallBody(wallet.public_key, SR25519, 0, b"pay")
    signature = wallet.sign(domain("kaisar/call", NETWORK) + encode(body))
    with pytest.raises(SignatureError):
        open_call(encode(SignedCall(body, signature)), NETWORK)


def test_an_unknown_scheme_is_refused(wallet: Any) -> None:
    body = CallBody(wallet.public_key, 2, 0, b"pay")
    signature = wallet.sign(domain("kaisar/call", NETWORK) + encode(body))
    with pytest.raises(SignatureError):
        open_call(encode(SignedCall(body, signature)), NETWORK)


def test_the_largest_payload_passes_and_one_more_byte_does_not(wallet: Any) -> None:
    assert len(sign_call(bytes(PAYLOAD_BYTES), 2**64 - 1, wallet, NETWORK)) <= SIGNED_CALL_BYTES
    with pytest.raises(CallRejected, match="65537 bytes") as rejected:
        sign_call(bytes(PAYLOAD_BYTES + 1), 0, wallet, NETWORK)
    assert "split" in rejected.value.hint


def test_a_wallet_that_signs_wrongly_is_refused(make_wallet: Any) -> None:
    liar = make_wallet(1)
    liar.key = make_wallet(2).key
    honest_key = bytes(make_wallet(1).key.verify_key)
    broken = type("Broken", (), {"public_key": honest_key, "scheme": ED25519, "sign": lambda self, m: liar.sign(m)})()
    with pytest.raises(CallRejected, match="bad signature"):
        sign_call(b"pay", 0, broken, NETWORK)
    odd = type("Odd", (), {"public_key": b"short", "scheme": ED25519, "sign": lambda self, m: liar.sign(m)})()
    with pytest.raises(CallRejected, match="not a signable call"):
        sign_call(b"pay", 0, odd, NETWORK)
