"""Secrets under a passphrase: Argon2id (RFC 9106), then XChaCha20-Poly1305, both of libsodium.

The default cost is 32 MiB and 10 passes: about 0.1 s. More passes over less memory than RFC 9106's second choice
(64 MiB, 3 passes) keep a node's peak memory low at the same order of work for a guesser; OWASP's floor is 19 MiB
and 2 passes. The memory is returned as soon as the key is derived.
"""

from __future__ import annotations

import secrets
import unicodedata
from dataclasses import dataclass

from nacl import bindings
from nacl.exceptions import CryptoError

from kaisar_p2p.errors import IdentityError, WrongPassphrase

METHOD = "argon2id+xchacha20poly1305"
SALT_BYTES = 16
NONCE_BYTES = 24
MAX_PASSES = 64
MIN_MEMORY_BYTES = 8 * 1024
MAX_MEMORY_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class KdfCost:
    """Argon2id's cost: passes, and memory in bytes. IdentityError outside the bounds, whoever asks."""

    passes: int = 10
    memory_bytes: int = 32 * 1024 * 1024

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= MAX_PASSES:
            raise IdentityError(f"a key derivation of {self.passes} passes is outside 1…{MAX_PASSES}")
        if not MIN_MEMORY_BYTES <= self.memory_bytes <= MAX_MEMORY_BYTES:
            bounds = f"{MIN_MEMORY_BYTES}…{MAX_MEMORY_BYTES}"
            raise IdentityError(f"a key derivation in {self.memory_bytes} bytes is outside {bounds}")


INTERACTIVE = KdfCost()


@dataclass(frozen=True)
class Encryption:
    """How one secret is sealed: cost, 16-byte salt, 24-byte nonce. All of it is public."""

    cost: KdfCost
    salt: bytes
    nonce: bytes

    @classmethod
    def fresh(cls, cost: KdfCost) -> Encryption:
        """New random salt and nonce."""
        return cls(cost, secrets.token_bytes(SALT_BYTES), secrets.token_bytes(NONCE_BYTES))


def seal(plaintext: bytes, passphrase: str, encryption: Encryption, associated: bytes) -> bytes:
    """Ciphertext and 16-byte tag; `associated` is authenticated with it and must be the same on opening."""
    key = _derive(passphrase, encryption)
    return bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plaintext, associated, encryption.nonce, key)


def open_sealed(ciphertext: bytes, passphrase: str, encryption: Encryption, associated: bytes) -> bytes:
    """The plaintext; WrongPassphrase when passphrase, ciphertext or associated data differ."""
    key = _derive(passphrase, encryption)
    try:
        return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, associated, encryption.nonce, key)
    except CryptoError:
        raise WrongPassphrase(
            "the passphrase does not open the key, or its file was changed",
            hint="check the passphrase, and KAISAR_PASSPHRASE if it is set",
        ) from None


def _derive(passphrase: str, encryption: Encryption) -> bytes:
    if not passphrase:
        raise IdentityError(
            "the passphrase is empty", hint="choose one, or say --no-passphrase to store keys unencrypted"
        )
    # The same characters typed on another system may arrive composed differently.
    password = unicodedata.normalize("NFKC", passphrase).encode("utf-8", "surrogatepass")
    cost = encryption.cost
    try:
        return bindings.crypto_pwhash_alg(
            32, password, encryption.salt, cost.passes, cost.memory_bytes, bindings.crypto_pwhash_ALG_ARGON2ID13
        )
    except RuntimeError:  # libsodium's only failure here is that it gets no memory
        raise IdentityError(
            f"opening the key needs {cost.memory_bytes >> 20} MiB of memory for a moment", hint="free some memory"
        ) from None
