"""polkadot-js account files, version 3: what its extension and apps export and import.

`encoded` is base64 (older files: 0x-hexadecimal) of a PKCS#8-like body, `header ‖ secret ‖ divider ‖ public key`,
as it is (`type: ["none"]`) or sealed: `salt(32) ‖ N ‖ p ‖ r (u32 little-endian) ‖ nonce(24) ‖ XSalsa20-Poly1305`.
An sr25519 secret is written in ed25519's expanded form. Source: `@polkadot/keyring` pair/encode, decode;
`@polkadot/util-crypto` json, scrypt.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time

from nacl import bindings
from nacl.exceptions import CryptoError

from kaisar_p2p.errors import IdentityError, WrongPassphrase
from kaisar_p2p.identity.keys import SECRET_KEY_BYTES, SEED_BYTES, Scheme, SecretKey
from kaisar_p2p.identity.ss58 import ss58_decode, ss58_encode

MAX_FILE_CHARS = 16 * 1024
_HEADER = bytes.fromhex("3053020101300506032b657004220420")
_DIVIDER = bytes.fromhex("a123032100")
_SALT_BYTES = 32
_NONCE_BYTES = 24
# (N, p, r) that polkadot-js itself accepts; anything else could ask for gigabytes.
_SCRYPT_ALLOWED = {
    (1 << 13, 10, 8),
    (1 << 14, 5, 8),
    (1 << 15, 3, 8),
    (1 << 15, 1, 8),
    (1 << 16, 2, 8),
    (1 << 17, 1, 8),
}
# What every release of polkadot-js can read, in 32 MiB; its own default now takes 128 MiB.
_SCRYPT_EXPORT = (1 << 15, 1, 8)
_SCRYPT_MAX_MEMORY_BYTES = 160 * 1024 * 1024


def export_polkadot_json(secret: SecretKey, name: str, passphrase: str) -> str:
    """The account as a polkadot-js file, encrypted; ValueError for an empty passphrase."""
    if not passphrase:
        raise ValueError("an exported file needs a passphrase")
    body = _HEADER + _expanded(secret) + _DIVIDER + secret.public_key
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    key = _scrypt(passphrase, salt, _SCRYPT_EXPORT)
    sealed = bindings.crypto_secretbox(body, nonce, key)
    parameters = b"".join(number.to_bytes(4, "little") for number in _SCRYPT_EXPORT)
    return json.dumps(
        {
            "encoded": base64.b64encode(salt + parameters + nonce + sealed).decode("ascii"),
            "encoding": {
                "content": ["pkcs8", secret.scheme.label],
                "type": ["scrypt", "xsalsa20-poly1305"],
                "version": "3",
            },
            "address": ss58_encode(secret.public_key),
            "meta": {"name": name, "whenCreated": int(time.time() * 1000)},
        }
    )


def import_polkadot_json(text: str, passphrase: str | None) -> SecretKey:
    """The account in a polkadot-js file.

    `passphrase` is that of the file, None when it is not encrypted. WrongPassphrase; IdentityError when the file
    is damaged, of another version or scheme (ecdsa), or its key is not that of its address.
    """
    document = _parse(text)
    encoding = document.get("encoding")
    if not isinstance(encoding, dict) or encoding.get("version") != "3":
        raise _unusable("it is not of version 3")
    scheme = _scheme(encoding.get("content"))
    body = _decrypt(_bytes(document.get("encoded")), encoding.get("type"), passphrase)
    secret, public_key = _decode_body(scheme, body)
    if secret.public_key != public_key:
        raise _unusable("its secret and public key do not match")
    address = document.get("address")
    if address is not None and (not isinstance(address, str) or ss58_decode(address, None) != public_key):
        raise _unusable("its key is not that of its address")
    return secret


def _parse(text: str) -> dict[str, object]:
    if len(text) > MAX_FILE_CHARS:
        raise _unusable("it is too large")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise _unusable("it is not JSON") from None
    if not isinstance(document, dict):
        raise _unusable("it is not a JSON object")
    return document


def _scheme(content: object) -> Scheme:
    for scheme in Scheme:
        if content == ["pkcs8", scheme.label]:
            return scheme
    raise _unusable("it holds no ed25519 or sr25519 account")


def _bytes(encoded: object) -> bytes:
    if not isinstance(encoded, str):
        raise _unusable("it has no encoded key")
    try:
        if encoded.startswith("0x"):
            return bytes.fromhex(encoded[2:])
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        raise _unusable("its encoded key is neither base64 nor hexadecimal") from None


def _decrypt(encoded: bytes, method: object, passphrase: str | None) -> bytes:
    if method in (["none"], "none"):
        return encoded
    if method != ["scrypt", "xsalsa20-poly1305"]:
        raise _unusable("its encryption is unknown")
    if passphrase is None:
        raise WrongPassphrase(
            "the polkadot-js file is encrypted and no passphrase was given", hint="give the file's passphrase"
        )
    salt, rest = encoded[:_SALT_BYTES], encoded[_SALT_BYTES + 12 :]
    numbers = [int.from_bytes(encoded[at : at + 4], "little") for at in range(_SALT_BYTES, _SALT_BYTES + 12, 4)]
    parameters = (numbers[0], numbers[1], numbers[2])
    if len(rest) < _NONCE_BYTES + 16 or parameters not in _SCRYPT_ALLOWED:
        raise _unusable("its encryption parameters are not ones that polkadot-js writes")
    key = _scrypt(passphrase, salt, parameters)
    try:
        return bindings.crypto_secretbox_open(rest[_NONCE_BYTES:], rest[:_NONCE_BYTES], key)
    except CryptoError:
        raise WrongPassphrase(
            "the passphrase does not open the polkadot-js file", hint="use the one chosen at its export"
        ) from None


def _decode_body(scheme: Scheme, body: bytes) -> tuple[SecretKey, bytes]:
    """The secret key and the public key that the body claims."""
    for secret_bytes in (SECRET_KEY_BYTES, SEED_BYTES):  # the oldest files kept a seed
        secret_end = len(_HEADER) + secret_bytes
        divider_end = secret_end + len(_DIVIDER)
        framed = body.startswith(_HEADER) and body[secret_end:divider_end] == _DIVIDER
        if framed and len(body) == divider_end + 32:
            return _secret(scheme, body[len(_HEADER) : secret_end]), body[divider_end:]
    raise _unusable("its key is not in PKCS#8 form")


def _secret(scheme: Scheme, raw: bytes) -> SecretKey:
    if scheme is Scheme.ED25519 or len(raw) == SEED_BYTES:
        return SecretKey.from_seed(scheme, raw[:SEED_BYTES])
    import sr25519

    try:
        _, key = sr25519.pair_from_ed25519_secret_key(raw)
    except ValueError:
        raise _unusable("its secret is not an sr25519 key") from None
    return SecretKey.from_sr25519_key(key)


def _expanded(secret: SecretKey) -> bytes:
    if secret.scheme is Scheme.ED25519:
        return secret.key
    import sr25519

    return bytes(sr25519.convert_secret_key_to_ed25519(secret.key))


def _scrypt(passphrase: str, salt: bytes, parameters: tuple[int, int, int]) -> bytes:
    n, p, r = parameters
    password = passphrase.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=_SCRYPT_MAX_MEMORY_BYTES, dklen=32)


def _unusable(why: str) -> IdentityError:
    return IdentityError(
        f"the polkadot-js file cannot be used: {why}", hint="export the account again from polkadot-js"
    )
