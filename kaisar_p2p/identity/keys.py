"""Key pairs in memory: the machine key and owner wallets. A secret shows in no `repr`, and cannot be pickled."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NoReturn

import base58
from nacl import bindings

from kaisar_p2p.errors import IdentityError
from kaisar_p2p.identity.ss58 import ss58_encode
from kaisar_p2p.wire.crypto import KeyPair

SEED_BYTES = 32
SECRET_KEY_BYTES = 64

# A libp2p peer id of an ed25519 key: identity multihash (0x00, 36 bytes) of the protobuf {type = ed25519, 32-byte key}.
_PEER_ID_HEADER = bytes.fromhex("002408011220")


class Scheme(enum.IntEnum):
    """Signature schemes, numbered as in Substrate's `MultiSignature`."""

    ED25519 = 0
    SR25519 = 1

    @property
    def label(self) -> str:
        """`ed25519` or `sr25519`, as in files and on the command line."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Scheme:
        """The scheme with that label; IdentityError for another."""
        for scheme in cls:
            if scheme.label == label:
                return scheme
        raise IdentityError(f"{label[:20]!r} is not a signature scheme", hint="use ed25519 or sr25519")


class SecretKey:
    """The private half of an account.

    `key` has 64 bytes: seed ‖ public key for ed25519 (as libsodium and polkadot-js keep it), scalar ‖ nonce for
    sr25519 (schnorrkel's form). `seed` (32 bytes) is None for an sr25519 key that came from a polkadot-js file,
    because such a file keeps no seed. `mnemonic` is kept only so that its owner can see it again.
    """

    __slots__ = ("key", "mnemonic", "public_key", "scheme", "seed")

    def __init__(self, scheme: Scheme, key: bytes, public_key: bytes, seed: bytes | None, mnemonic: str | None) -> None:
        self.scheme = scheme
        self.key = key
        self.public_key = public_key
        self.seed = seed
        self.mnemonic = mnemonic

    @classmethod
    def from_seed(cls, scheme: Scheme, seed: bytes, mnemonic: str | None = None) -> SecretKey:
        """From a 32-byte seed (sr25519: the mini-secret); ValueError for another length."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
        if scheme is Scheme.ED25519:
            public_key, key = bindings.crypto_sign_seed_keypair(seed)
        else:
            import sr25519

            public_key, key = sr25519.pair_from_seed(seed)
        return cls(scheme, key, public_key, seed, mnemonic)

    @classmethod
    def from_sr25519_key(cls, key: bytes) -> SecretKey:
        """From the 64-byte sr25519 key when its seed is unknown; ValueError when it is not one."""
        import sr25519

        return cls(Scheme.SR25519, key, sr25519.public_from_secret_key(key), None, None)

    def sign(self, message: bytes) -> bytes:
        """64-byte signature of the raw message. sr25519 signatures are randomised, ed25519 ones are not."""
        if self.scheme is Scheme.ED25519:
            return bindings.crypto_sign(message, self.key)[:64]
        import sr25519

        return bytes(sr25519.sign((self.public_key, self.key), message))

    def __repr__(self) -> str:
        return f"SecretKey({self.scheme.label}, hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is never pickled or copied")


@dataclass(frozen=True)
class Wallet:
    """An unlocked owner wallet; `public_key` (32 bytes) is the account id."""

    name: str
    scheme: Scheme
    public_key: bytes
    _secret: SecretKey = field(repr=False, compare=False)

    @property
    def address(self) -> str:
        """SS58 address of the account."""
        return ss58_encode(self.public_key)

    def sign(self, message: bytes) -> bytes:
        """64-byte signature of the raw message; the caller prepends domain and network."""
        return self._secret.sign(message)


@dataclass(frozen=True)
class MachineKey:
    """A node's own ed25519 key: peer id, votes, VRF."""

    key_pair: KeyPair

    @property
    def public_key(self) -> bytes:
        """32 bytes."""
        return self.key_pair.public_key

    @property
    def seed(self) -> bytes:
        """The 32-byte secret seed, for libp2p and the VRF."""
        return self.key_pair.seed

    @property
    def address(self) -> str:
        """SS58 address, should the machine key be an account too."""
        return ss58_encode(self.public_key)

    @property
    def peer_id(self) -> str:
        """libp2p peer id in base58 (`12D3KooW…`), as the last part of a multiaddr."""
        return base58.b58encode(_PEER_ID_HEADER + self.public_key).decode("ascii")

    def sign(self, message: bytes) -> bytes:
        """64-byte signature of the raw message; for protocol messages use `key_pair.sign`, which takes a domain."""
        return bindings.crypto_sign(message, self.key_pair.secret)[:64]
