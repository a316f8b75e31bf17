"""The key file, version 1: a JSON object whose header is public and whose `secret` is sealed (or marked as not).

::

    {"format": "kaisar-key", "version": 1, "kind": "wallet" | "machine", "name": …, "scheme": …, "address": …,
     "encryption": {"method": "argon2id+xchacha20poly1305", "passes": …, "memory_bytes": …, "salt": hex, "nonce": hex}
                 | {"method": "none"},
     "secret": hex}

Everything but `secret` is authenticated with it: a file renamed to another wallet, or with another address or
cost, does not open. The secret is the JSON object `{"seed": hex | null, "key": hex | null, "mnemonic": text | null}`;
`key` is there only when there is no seed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal

from kaisar_p2p.errors import IdentityError, WrongPassphrase
from kaisar_p2p.identity.keys import Scheme, SecretKey
from kaisar_p2p.identity.sealed import METHOD, Encryption, KdfCost, open_sealed, seal
from kaisar_p2p.identity.ss58 import ss58_decode, ss58_encode

FORMAT = "kaisar-key"
VERSION = 1
MAX_FILE_BYTES = 16 * 1024
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

Kind = Literal["wallet", "machine"]


@dataclass(frozen=True)
class KeyFile:
    """One parsed key file, still locked unless `encryption` is None."""

    kind: Kind
    name: str
    scheme: Scheme
    address: str
    encryption: Encryption | None
    secret: bytes = field(repr=False)

    @classmethod
    def lock(cls, kind: Kind, name: str, secret: SecretKey, passphrase: str | None, cost: KdfCost) -> KeyFile:
        """Seal a secret key under the passphrase, or keep it in the clear when that is None."""
        encryption = None if passphrase is None else Encryption.fresh(cost)
        header = cls(kind, name, secret.scheme, ss58_encode(secret.public_key), encryption, b"")
        sealed = _encode_secret(secret)
        if passphrase is not None and encryption is not None:
            sealed = seal(sealed, passphrase, encryption, header._associated())
        return cls(kind, name, secret.scheme, header.address, encryption, sealed)

    def unlock(self, passphrase: str | None) -> SecretKey:
        """The secret key; WrongPassphrase, or IdentityError when the content is not what the header says.

        The passphrase of a file that is not encrypted is ignored.
        """
        plain = self.secret
        if self.encryption is not None:
            if passphrase is None:
                raise WrongPassphrase(
                    f"{self._title()} is encrypted and no passphrase was given",
                    hint="give --passphrase-file or set KAISAR_PASSPHRASE",
                )
            plain = open_sealed(self.secret, passphrase, self.encryption, self._associated())
        secret = _decode_secret(self.scheme, plain)
        if ss58_encode(secret.public_key) != self.address:
            raise IdentityError(f"{self._title()} does not hold the key of its address", hint=_RESTORE)
        return secret

    def encode(self) -> bytes:
        """The file's bytes."""
        return (json.dumps({**self._header(), "secret": self.secret.hex()}, indent=2) + "\n").encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> KeyFile:
        """Parse a file's bytes; IdentityError with the reason when they are no key file."""
        found = _object(data, "the file")
        if found.get("format") != FORMAT:
            raise _corrupt(f"it does not say format = {FORMAT}")
        if found.get("version") != VERSION:
            raise IdentityError(
                "the key file has another version", hint="it was made by a newer kaisar; update this one"
            )
        _expect_keys(found, {"format", "version", "kind", "name", "scheme", "address", "encryption", "secret"})
        name, address = _text(found, "name"), _text(found, "address")
        if not NAME.fullmatch(name):
            raise _corrupt("its name is not a wallet name")
        ss58_decode(address)
        scheme = Scheme.from_label(_text(found, "scheme"))
        encryption = _decode_encryption(found["encryption"])
        return cls(_kind(found), name, scheme, address, encryption, _hex(found, "secret"))

    def _header(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "name": self.name,
            "scheme": self.scheme.label,
            "address": self.address,
            "encryption": _encode_encryption(self.encryption),
        }

    def _associated(self) -> bytes:
        return json.dumps(self._header(), sort_keys=True, separators=(",", ":")).encode("ascii")

    def _title(self) -> str:
        return "the machine key" if self.kind == "machine" else f"wallet {self.name!r}"


_RESTORE = "restore the file from a backup, or import the wallet again from its phrase"


def _encode_encryption(encryption: Encryption | None) -> dict[str, object]:
    if encryption is None:
        return {"method": "none"}
    return {
        "method": METHOD,
        "passes": encryption.cost.passes,
        "memory_bytes": encryption.cost.memory_bytes,
        "salt": encryption.salt.hex(),
        "nonce": encryption.nonce.hex(),
    }


def _decode_encryption(found: object) -> Encryption | None:
    if not isinstance(found, dict):
        raise _corrupt("its encryption is not an object")
    if found == {"method": "none"}:
        return None
    _expect_keys(found, {"method", "passes", "memory_bytes", "salt", "nonce"})
    if found["method"] != METHOD:
        raise _corrupt("its encryption method is unknown")
    cost = KdfCost(_integer(found, "passes"), _integer(found, "memory_bytes"))
    return Encryption(cost, _hex(found, "salt", 16), _hex(found, "nonce", 24))


def _encode_secret(secret: SecretKey) -> bytes:
    seed = secret.seed.hex() if secret.seed is not None else None
    key = None if secret.seed is not None else secret.key.hex()
    return json.dumps({"seed": seed, "key": key, "mnemonic": secret.mnemonic}).encode("ascii")


def _decode_secret(scheme: Scheme, plain: bytes) -> SecretKey:
    found = _object(plain, "its secret")
    _expect_keys(found, {"seed", "key", "mnemonic"})
    mnemonic = None if found["mnemonic"] is None else _text(found, "mnemonic")
    if found["seed"] is not None:
        return SecretKey.from_seed(scheme, _hex(found, "seed", 32), mnemonic)
    if scheme is not Scheme.SR25519:
        raise _corrupt("its secret has no seed")
    try:
        return SecretKey.from_sr25519_key(_hex(found, "key", 64))
    except ValueError:
        raise _corrupt("its secret is not an sr25519 key") from None


def _object(data: bytes, what: str) -> dict[str, object]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        # `from None`: the parser's own error quotes the document, which may be a secret.
        raise _corrupt(f"{what} is not JSON") from None
    if not isinstance(found, dict):
        raise _corrupt(f"{what} is not a JSON object")
    return found


def _expect_keys(found: dict[str, object], expected: set[str]) -> None:
    if set(found) != expected:
        raise _corrupt("a field is missing or one too many")


def _kind(found: dict[str, object]) -> Kind:
    match found["kind"]:
        case "wallet":
            return "wallet"
        case "machine":
            return "machine"
        case _:
            raise _corrupt("its kind is unknown")


def _text(found: dict[str, object], key: str) -> str:
    value = found[key]
    if not isinstance(value, str):
        raise _corrupt(f"its {key} is not text")
    return value


def _integer(found: dict[str, object], key: str) -> int:
    value = found[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise _corrupt(f"its {key} is not a whole number")
    return value


def _hex(found: dict[str, object], key: str, size: int | None = None) -> bytes:
    text = _text(found, key)
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", text) or (size is not None and len(text) != 2 * size):
        raise _corrupt(f"its {key} is not the hexadecimal form expected")
    return bytes.fromhex(text)


def _corrupt(why: str) -> IdentityError:
    return IdentityError(f"the key file cannot be used: {why}", hint=_RESTORE)
