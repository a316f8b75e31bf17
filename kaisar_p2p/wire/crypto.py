"""Hashes and domain-separated ed25519 signatures (RFC 8032, through libsodium).

Signed bytes = 16-byte domain ‖ 32-byte network id ‖ canonical message. A signature made for one purpose, or for one
network, is worthless for another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

from nacl import bindings
from nacl.exceptions import BadSignatureError

DOMAIN_BYTES = 16
NETWORK_BYTES = 32


def sha256(*parts: bytes) -> bytes:
    """SHA-256 of the concatenated parts (32 bytes)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


@lru_cache(maxsize=256)
def domain(tag: str, network: bytes) -> bytes:
    """The 48-byte prefix of everything signed or hashed for one purpose on one network."""
    name = tag.encode("ascii")
    if not 0 < len(name) <= DOMAIN_BYTES or len(network) != NETWORK_BYTES:
        raise ValueError(f"domain {tag!r} needs 1 to {DOMAIN_BYTES} ASCII bytes and a {NETWORK_BYTES}-byte network id")
    return name.ljust(DOMAIN_BYTES, b"\0") + network


def domain_hash(tag: str, network: bytes, *parts: bytes) -> bytes:
    """SHA-256 under a domain: the identity of a message, a seed, a beacon."""
    return sha256(domain(tag, network), *parts)


@dataclass(frozen=True)
class KeyPair:
    """An ed25519 key pair; the secret never shows in `repr`."""

    public_key: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """From a 32-byte seed; ValueError for another length."""
        if len(seed) != 32:
            raise ValueError("an ed25519 seed has 32 bytes")
        public, secret = bindings.crypto_sign_seed_keypair(seed)
        return cls(public, secret)

    @property
    def seed(self) -> bytes:
        """The 32-byte seed, as the VRF needs it."""
        return self.secret[:32]

    def sign(self, tag: str, network: bytes, body: bytes) -> bytes:
        """64-byte signature of `body` under a domain; deterministic (RFC 8032)."""
        return bindings.crypto_sign(domain(tag, network) + body, self.secret)[:64]


def verify(public_key: bytes, tag: str, network: bytes, body: bytes, signature: bytes) -> bool:
    """True if `signature` (64 bytes) over `body` under the domain is by `public_key` (32 bytes); never raises."""
    if len(public_key) != 32 or len(signature) != 64:
        return False
    try:
        bindings.crypto_sign_open(signature + domain(tag, network) + body, public_key)
    except BadSignatureError:
        return False
    return True
