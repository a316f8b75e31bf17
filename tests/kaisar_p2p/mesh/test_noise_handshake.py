"""The Noise handshake and session, without a socket; the library's Noise as the other side."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey
from noise.connection import Keypair, NoiseConnection

from kaisar_p2p.mesh.transport import noise
from kaisar_p2p.mesh.transport.noise import READ_BYTES, SEALED_BYTES, WRITE_BYTES, Decryption, Encryption
from kaisar_p2p.mesh.transport.noise_handshake import (
    SIGNED_PREFIX,
    Established,
    Handshake,
    HandshakeFailed,
    Identity,
    nonce_of,
    read_payload,
)
from kaisar_p2p.mesh.transport.yamux_frames import ConnectionOver, NotAuthentic, ProtocolViolation

_KEY_A, _KEY_B = SigningKey(bytes(range(32))), SigningKey(bytes(range(1, 33)))


def identity(key: SigningKey, *muxers: str) -> Identity:
    static = X25519PrivateKey.generate()
    signature = key.sign(SIGNED_PREFIX + static.public_key().public_bytes_raw()).signature
    return Identity.of(static, bytes(key.verify_key), signature, muxers)


def handshaken() -> tuple[Established, Established]:
    a, b = Handshake(identity(_KEY_A, "/yamux/1.0.0")), Handshake(identity(_KEY_B, "/x", "/y"))
    b.read_first(a.first())
    a.read_second(b.second())
    third, ours = a.third()
    return ours, b.read_third(third)


def test_both_sides_agree() -> None:
    ours, theirs = handshaken()
    assert (ours.peer, theirs.peer) == (bytes(_KEY_B.verify_key), bytes(_KEY_A.verify_key))
    assert (ours.muxers, theirs.muxers) == (("/x", "/y"), ("/yamux/1.0.0",))
    for sender, receiver in ((ours, theirs), (theirs, ours)):
        assert receiver.receiving.decrypt(nonce_of(0), sender.sending.encrypt(nonce_of(0), b"hi", None), None) == b"hi"


def library(static: X25519PrivateKey, *, initiator: bool) -> NoiseConnection:
    state = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
    state.set_keypair_from_private_bytes(Keypair.STATIC, static.private_bytes_raw())
    (state.set_as_initiator if initiator else state.set_as_responder)()
    state.start_handshake()
    return state


def test_another_implementation_agrees_as_responder() -> None:
    ours, other = Handshake(identity(_KEY_A)), identity(_KEY_B)
    theirs = library(other.static, initiator=False)
    theirs.read_message(ours.first())
    ours.read_second(bytes(theirs.write_message(other.payload)))
    third, outcome = ours.third()
    assert read_payload(bytes(theirs.read_message(third)), ours._identity.static.public_key().public_bytes_raw())[
        0
    ] == (bytes(_KEY_A.verify_key))
    assert theirs.decrypt(outcome.sending.encrypt(nonce_of(0), b"hello", None)) == b"hello"
    assert outcome.receiving.decrypt(nonce_of(0), bytes(theirs.encrypt(b"hello")), None) == b"hello"


def test_another_implementation_agrees_as_initiator() -> None:
    ours, other = Handshake(identity(_KEY_A)), identity(_KEY_B)
    theirs = library(other.static, initiator=True)
    ours.read_first(bytes(theirs.write_message(b"")))
    theirs.read_message(ours.second())
    outcome = ours.read_third(bytes(theirs.write_message(other.payload)))
    assert outcome.peer == bytes(_KEY_B.verify_key)
    assert theirs.decrypt(outcome.sending.encrypt(nonce_of(0), b"hello", None)) == b"hello"


@pytest.mark.parametrize("at", [0, 31, 32, 79, 80, 100, -1])
def test_a_changed_second_message_fails(at: int) -> None:
    a, b = Handshake(identity(_KEY_A)), Handshake(identity(_KEY_B))
    b.read_first(a.first())
    message = bytearray(b.second())
    message[at] ^= 1
    with pytest.raises(HandshakeFailed):
        a.read_second(bytes(message))


@pytest.mark.parametrize("at", [0, 47, 48, -1])
def test_a_changed_third_message_fails(at: int) -> None:
    a, b = Handshake(identity(_KEY_A)), Handshake(identity(_KEY_B))
    b.read_first(a.first())
    a.read_second(b.second())
    message = bytearray(a.third()[0])
    message[at] ^= 1
    with pytest.raises(HandshakeFailed):
        b.read_third(bytes(message))


@given(st.binary(max_size=300), st.sampled_from(["first", "second", "third"]))
def test_no_bytes_raise_anything_else(data: bytes, which: str) -> None:
    handshake = Handshake(identity(_KEY_A))
    try:
        if which == "second":
            handshake.first()
            handshake.read_second(data)
        else:
            handshake.read_first(data if which == "first" else bytes(range(32)))
            handshake.second()
            handshake.read_third(data)
    except HandshakeFailed:
        pass


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little")])
def test_a_point_of_low_order_is_refused(point: bytes) -> None:
    handshake = Handshake(identity(_KEY_A))
    handshake.read_first(point)
    with pytest.raises(HandshakeFailed):
        handshake.second()


def test_a_key_that_somebody_else_signed_is_refused() -> None:
    static = X25519PrivateKey.generate()
    signature = _KEY_A.sign(SIGNED_PREFIX + static.public_key().public_bytes_raw()).signature
    stolen = Identity.of(static, bytes(_KEY_B.verify_key), signature, ())
    with pytest.raises(HandshakeFailed, match="not signed"):
        read_payload(stolen.payload, static.public_key().public_bytes_raw())
    short = Identity.of(static, bytes(_KEY_B.verify_key), signature[:10], ())
    with pytest.raises(HandshakeFailed):
        read_payload(short.payload, static.public_key().public_bytes_raw())


@given(st.binary(max_size=200))
def test_a_payload_of_any_bytes(payload: bytes) -> None:
    with pytest.raises(HandshakeFailed):
        read_payload(payload, bytes(32))


# -- the session ------------------------------------------------------------------------------------------------------


def seal(encryption: Encryption, data: bytes) -> bytes:
    buffer = bytearray(SEALED_BYTES)
    return bytes(buffer[: encryption.seal_into(data, buffer)])


@given(st.lists(st.integers(0, 70_000), max_size=6), st.lists(st.integers(1, 200_000), max_size=6))
def test_frames_survive_any_chunking(sizes: list[int], cuts: list[int]) -> None:
    ours, theirs = handshaken()
    encryption, decryption = Encryption(ours), Decryption(theirs, bytearray(READ_BYTES + 70_000))
    plain = [os.urandom(size) for size in sizes]
    stream = b"".join(seal(encryption, data) for data in plain)
    got, start = b"", 0
    for cut in [*cuts, len(stream)]:
        for begin in range(start, min(start + cut, len(stream)), READ_BYTES):
            got += decryption.feed(stream[begin : min(begin + READ_BYTES, start + cut)])
        start += cut
    assert got == b"".join(plain)


def test_as_much_as_is_written_at_once() -> None:
    ours, theirs = handshaken()
    data = os.urandom(WRITE_BYTES)
    sealed = seal(Encryption(ours), data)
    assert len(sealed) == SEALED_BYTES
    assert Decryption(theirs, bytearray(2 * READ_BYTES)).feed(sealed) == data


@pytest.mark.parametrize(
    "sealed", [b"\x00\x00", b"\x00\x0f" + bytes(15), b"\x00\x10" + bytes(16), b"\x01\x00" + bytes(256)]
)
def test_a_frame_that_the_peer_did_not_encrypt(sealed: bytes) -> None:
    with pytest.raises(NotAuthentic):
        Decryption(handshaken()[0], bytearray(READ_BYTES)).feed(sealed)


def test_replayed_and_reordered_frames_are_refused() -> None:
    ours, theirs = handshaken()
    encryption = Encryption(ours)
    first, second = encryption.seal_one(b"first"), encryption.seal_one(b"second")
    for wrong in (second + first, first + first):
        with pytest.raises(NotAuthentic):
            Decryption(theirs, bytearray(READ_BYTES)).feed(wrong)


def test_an_announced_frame_holds_only_what_arrived() -> None:
    decryption = Decryption(handshaken()[0], bytearray(READ_BYTES))
    assert decryption.feed(b"\xff\xff" + bytes(10)) == b""
    assert len(decryption._tail) == 12


def test_the_connection_ends_before_a_nonce_comes_twice() -> None:
    ours, theirs = handshaken()
    encryption, decryption = Encryption(ours), Decryption(theirs, bytearray(READ_BYTES))
    encryption.next_nonce = decryption.next_nonce = noise.LAST_NONCE
    assert decryption.feed(encryption.seal_one(b"last")) == b"last"
    with pytest.raises(ConnectionOver):
        encryption.seal_one(b"one more")
    with pytest.raises(ProtocolViolation):
        decryption.feed(b"\x00\x20" + bytes(32))
