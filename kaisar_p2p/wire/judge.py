"""The first and the last step of the rules for messages: look without believing, and check the signature."""

from __future__ import annotations

from typing import TypeVar

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire.codec import decode
from kaisar_p2p.wire.envelope import Signed, Verified, open_signed
from kaisar_p2p.wire.verdict import Verdict

M = TypeVar("M")


def peek(cls: type[M], data: bytes, most: int) -> M | None:
    """The message in a frame; None when it has more than `most` bytes or is malformed; never raises."""
    if len(data) > most:
        return None
    try:
        return decode(cls, data)
    except DecodeError:
        return None


def peek_signed(cls: type[M], data: bytes, most: int) -> tuple[bytes, M] | None:
    """Signer and message of an envelope **before** its signature is checked, for the cheap rules.

    None when it has more than `most` bytes or is malformed; never raises.
    """
    signed = peek(Signed, data, most)
    body = peek(cls, signed.body, most) if signed is not None else None
    return (signed.signer, body) if signed is not None and body is not None else None


def judge_signature(cls: type[M], data: bytes, network: bytes) -> tuple[Verdict, str, Verified[M] | None]:
    """ACCEPT with the verified message, or REJECT with the reason; never raises."""
    try:
        return Verdict.ACCEPT, "", open_signed(cls, data, network)
    except (DecodeError, SignatureError) as error:
        return Verdict.REJECT, error.message, None
