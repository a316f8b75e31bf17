"""SS58: a public key as text with a network prefix and a checksum.

Source: "SS58 address format" of the Substrate documentation, and its `ss58-registry`.
Address = base58(prefix ‖ 32-byte public key ‖ first 2 bytes of blake2b-512("SS58PRE" ‖ prefix ‖ public key)).
"""

from __future__ import annotations

import hashlib

import base58

from kaisar_p2p.errors import IdentityError

KAISAR_PREFIX = 42
KEY_BYTES = 32
_CHECKSUM_BYTES = 2
_MAX_PREFIX = 16383
_RESERVED_PREFIXES = (46, 47)
_MAX_ADDRESS_CHARS = 64


def ss58_encode(public_key: bytes, prefix: int = KAISAR_PREFIX) -> str:
    """The address of a 32-byte public key; ValueError for another length or a prefix outside 0…16383."""
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"a public key has {KEY_BYTES} bytes, not {len(public_key)}")
    body = _encode_prefix(prefix) + public_key
    return base58.b58encode(body + _checksum(body)).decode("ascii")


def ss58_decode(address: str, prefix: int | None = KAISAR_PREFIX) -> bytes:
    """The 32-byte public key of an address.

    With `prefix` None, an address of any network is accepted. IdentityError for anything that is not the one
    correct spelling of an address: alphabet, length, checksum, prefix.
    """
    raw = _base58(address)
    found, prefix_bytes = _decode_prefix(address, raw)
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if len(body) != prefix_bytes + KEY_BYTES:
        raise _not_an_address(address, f"it holds {len(raw)} bytes")
    if checksum != _checksum(body):
        raise _not_an_address(address, "its checksum is wrong")
    if prefix is not None and found != prefix:
        raise _not_an_address(address, f"it is for network prefix {found}, not {prefix}")
    return body[prefix_bytes:]


def _base58(address: str) -> bytes:
    if len(address) > _MAX_ADDRESS_CHARS or not address.isascii():
        raise _not_an_address(address, "it is too long or has letters outside ASCII")
    if address != address.strip():
        raise _not_an_address(address, "it has spaces around it")
    try:
        return base58.b58decode(address)
    except ValueError:
        raise _not_an_address(address, "it is not base58") from None


def _encode_prefix(prefix: int) -> bytes:
    if not 0 <= prefix <= _MAX_PREFIX or prefix in _RESERVED_PREFIXES:
        raise ValueError(f"{prefix} is not an SS58 prefix")
    if prefix < 64:
        return bytes([prefix])
    return bytes([(prefix & 0b1111_1100) >> 2 | 0b0100_0000, prefix >> 8 | (prefix & 0b11) << 6])


def _decode_prefix(address: str, raw: bytes) -> tuple[int, int]:
    """Prefix and its length in bytes."""
    if len(raw) < 2:
        raise _not_an_address(address, "it is too short")
    if raw[0] < 64:
        return raw[0], 1
    if raw[0] > 127:
        raise _not_an_address(address, "its prefix is reserved")
    prefix = (raw[0] & 0b0011_1111) << 2 | raw[1] >> 6 | (raw[1] & 0b0011_1111) << 8
    if prefix < 64:
        raise _not_an_address(address, "its prefix is not in shortest form")
    return prefix, 2


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(b"SS58PRE" + body, digest_size=64).digest()[:_CHECKSUM_BYTES]


def _not_an_address(address: str, why: str) -> IdentityError:
    shown = address if len(address) <= _MAX_ADDRESS_CHARS else address[:16] + "…"
    return IdentityError(
        f"{shown!r} is not an address: {why}",
        hint="copy the whole address; Kaisar addresses start with 5, as `kaisar wallet list` shows them",
    )
