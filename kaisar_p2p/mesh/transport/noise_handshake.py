"""The handshake of libp2p's Noise transport, without a socket: Noise_XX_25519_ChaChaPoly_SHA256.

Own code, on `cryptography`, because the library's takes a millisecond of interpreter per connection on each side, signs
the same static key in every handshake and lets any exception escape. Sources: https://noiseprotocol.org/noise.html
(revision 34, chapters 5 to 7) and https://github.com/libp2p/specs/blob/master/noise/README.md.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.transport.yamux_frames import ProtocolViolation

from google.protobuf.message import DecodeError  # isort: skip
from libp2p.security.noise.pb import noise_pb2  # isort: skip

SIGNED_PREFIX = b"noise-libp2p-static-key:"
_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"  # 32 bytes: the first hash is the name itself
_ED25519 = bytes.fromhex("08011220")  # protobuf of a public key: type ed25519, 32 bytes
_KEY_BYTES, _TAG_BYTES = 32, 16
_MUXERS = 16  # names of muxers that are looked at


class HandshakeFailed(ProtocolViolation):
    """The peer did not complete the handshake, or is not who it should be."""


@dataclass(frozen=True)
class Identity:
    """What a node proves in each handshake: its static key signed by its machine key, and the muxers it speaks."""

    static: X25519PrivateKey
    payload: bytes

    @classmethod
    def of(cls, static: X25519PrivateKey, key: bytes, signature: bytes, muxers: tuple[str, ...]) -> Identity:
        """`signature` is the machine key's, of `SIGNED_PREFIX` and the static public key."""
        payload = noise_pb2.NoiseHandshakePayload(identity_key=_ED25519 + key, identity_sig=signature)
        payload.extensions.stream_muxers.extend(muxers)
        return cls(static, payload.SerializeToString())


@dataclass(frozen=True)
class Established:
    """The outcome of a handshake: two ciphers, the peer's machine key, and the muxers that the peer named."""

    sending: ChaCha20Poly1305
    receiving: ChaCha20Poly1305
    peer: bytes
    muxers: tuple[str, ...]


class Handshake:
    """One handshake of three messages, initiator's and responder's side. Every reader raises HandshakeFailed only."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._hash = self._chain = _NAME
        self._cipher: ChaCha20Poly1305 | None = None
        self._nonce = 0
        self._ephemeral = X25519PrivateKey.generate()
        self._their_ephemeral: X25519PublicKey | None = None
        self._peer: tuple[bytes, tuple[str, ...]] | None = None
        self._mix_hash(b"")  # the prologue

    # -- initiator ----------------------------------------------------------------------------------------------------

    def first(self) -> bytes:
        """-> e"""
        message = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(message)
        self._mix_hash(b"")
        return message

    def read_second(self, message: bytes) -> None:
        """<- e, ee, s, es"""
        _at_least(message, _KEY_BYTES + 2 * _TAG_BYTES + _KEY_BYTES)
        ephemeral = self._read_ephemeral(message)
        self._mix_key(self._ephemeral, ephemeral)
        static = self._read_static(message[32:80])
        self._mix_key(self._ephemeral, static)
        self._read_payload(message[80:], static)

    def third(self) -> tuple[bytes, Established]:
        """-> s, se"""
        assert self._their_ephemeral is not None
        message = self._seal(self._identity.static.public_key().public_bytes_raw())
        self._mix_key(self._identity.static, self._their_ephemeral)
        message += self._seal(self._identity.payload)
        ours, theirs = _derive(self._chain, b"")
        return message, self._established(ours, theirs)

    # -- responder ----------------------------------------------------------------------------------------------------

    def read_first(self, message: bytes) -> None:
        """-> e"""
        _at_least(message, _KEY_BYTES)
        self._read_ephemeral(message)
        self._mix_hash(message[_KEY_BYTES:])

    def second(self) -> bytes:
        """<- e, ee, s, es"""
        assert self._their_ephemeral is not None
        message = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(message)
        self._mix_key(self._ephemeral, self._their_ephemeral)
        message += self._seal(self._identity.static.public_key().public_bytes_raw())
        self._mix_key(self._identity.static, self._their_ephemeral)
        return message + self._seal(self._identity.payload)

    def read_third(self, message: bytes) -> Established:
        """-> s, se"""
        _at_least(message, _KEY_BYTES + 2 * _TAG_BYTES)
        static = self._read_static(message[:48])
        self._mix_key(self._ephemeral, static)
        self._read_payload(message[48:], static)
        theirs, ours = _derive(self._chain, b"")
        return self._established(ours, theirs)

    # -- the state of a handshake -------------------------------------------------------------------------------------

    def _established(self, ours: bytes, theirs: bytes) -> Established:
        assert self._peer is not None
        return Established(ChaCha20Poly1305(ours), ChaCha20Poly1305(theirs), *self._peer)

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_key(self, ours: X25519PrivateKey, theirs: X25519PublicKey) -> None:
        try:
            shared = ours.exchange(theirs)
        except ValueError:  # a point of low order
            raise HandshakeFailed("the peer's key is not usable") from None
        self._chain, key = _derive(self._chain, shared)
        self._cipher, self._nonce = ChaCha20Poly1305(key), 0

    def _next_nonce(self) -> bytes:
        nonce = nonce_of(self._nonce)
        self._nonce += 1
        return nonce

    def _seal(self, plaintext: bytes) -> bytes:
        assert self._cipher is not None
        sealed = self._cipher.encrypt(self._next_nonce(), plaintext, self._hash)
        self._mix_hash(sealed)
        return sealed

    def _open(self, sealed: bytes) -> bytes:
        assert self._cipher is not None
        try:
            plaintext = self._cipher.decrypt(self._next_nonce(), sealed, self._hash)
        except InvalidTag:
            raise HandshakeFailed("a message of the Noise handshake does not authenticate") from None
        self._mix_hash(sealed)
        return plaintext

    def _read_ephemeral(self, message: bytes) -> X25519PublicKey:
        key = self._their_ephemeral = X25519PublicKey.from_public_bytes(message[:_KEY_BYTES])
        self._mix_hash(message[:_KEY_BYTES])
        return key

    def _read_static(self, sealed: bytes) -> X25519PublicKey:
        return X25519PublicKey.from_public_bytes(self._open(sealed))

    def _read_payload(self, sealed: bytes, static: X25519PublicKey) -> None:
        self._peer = read_payload(self._open(sealed), static.public_bytes_raw())


def read_payload(payload: bytes, static: bytes) -> tuple[bytes, tuple[str, ...]]:
    """The machine key that signed `static`, and the muxers offered; raises HandshakeFailed."""
    try:
        message = noise_pb2.NoiseHandshakePayload.FromString(payload)
    except DecodeError:
        raise HandshakeFailed("the payload of the Noise handshake is malformed") from None
    identity = message.identity_key
    if len(identity) != 36 or not identity.startswith(_ED25519):
        raise HandshakeFailed("the peer's identity is not an ed25519 key")
    try:
        Ed25519PublicKey.from_public_bytes(identity[4:]).verify(message.identity_sig, SIGNED_PREFIX + static)
    except (InvalidSignature, ValueError):
        raise HandshakeFailed("the peer's key is not signed by its identity") from None
    return identity[4:], tuple(message.extensions.stream_muxers[:_MUXERS])


def nonce_of(counter: int) -> bytes:
    """The nonce of ChaCha20-Poly1305 in Noise: 4 zero bytes, then the counter, little-endian."""
    return b"\0\0\0\0" + counter.to_bytes(8, "little")


def _derive(chain: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """HKDF with two outputs."""
    key = hmac.digest(chain, secret, "sha256")
    first = hmac.digest(key, b"\x01", "sha256")
    return first, hmac.digest(key, first + b"\x02", "sha256")


def _at_least(message: bytes, size: int) -> None:
    if len(message) < size:
        raise HandshakeFailed("a message of the Noise handshake is too short")
