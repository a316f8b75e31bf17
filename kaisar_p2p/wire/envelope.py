"""`Signed` bytes → `Verified` message: the only way to come by a `Verified` is `open_signed`.

An envelope is the canonical array of (message bytes, signer's machine key, signature); the signature covers the
message's own domain, the network id and the message bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from kaisar_p2p.errors import SignatureError
from kaisar_p2p.wire.codec import AtMost, Bytes32, Bytes64, decode, decode_any, encode, message
from kaisar_p2p.wire.crypto import KeyPair, verify

M = TypeVar("M")
MESSAGE_BYTES = 1 << 20
_TOKEN = object()


@message(1)
@dataclass(frozen=True)
class Signed:
    """A message as it travels, not yet believed."""

    body: Annotated[bytes, AtMost(MESSAGE_BYTES)]
    signer: Bytes32
    signature: Bytes64


class Verified(Generic[M]):
    """A message whose signature was checked; functions that count or act take nothing else."""

    __slots__ = ("envelope", "message", "signer")

    def __init__(self, message: M, signer: bytes, envelope: bytes, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("only open_signed() makes a Verified message")
        self.message = message
        self.signer = signer
        self.envelope = envelope

    def __repr__(self) -> str:
        return f"Verified({self.message!r}, signer={self.signer[:4].hex()})"


def seal(value: Any, keys: KeyPair, network: bytes) -> bytes:
    """Sign a message whose class has a `DOMAIN`; returns the envelope's bytes."""
    body = encode(value)
    return encode(Signed(body, keys.public_key, keys.sign(type(value).DOMAIN, network, body)))


def open_signed(classes: type[M] | tuple[type[M], ...], data: bytes, network: bytes) -> Verified[M]:
    """Decode and verify an envelope; DecodeError or SignatureError, and nothing else."""
    signed = decode(Signed, data)
    value: M = decode_any(classes if isinstance(classes, tuple) else (classes,), signed.body)
    tag: str = value.DOMAIN  # type: ignore[attr-defined]
    if not verify(signed.signer, tag, network, signed.body, signed.signature):
        raise SignatureError(f"bad signature on {type(value).__name__} by {signed.signer[:4].hex()}")
    return Verified(value, signed.signer, data, _TOKEN)
