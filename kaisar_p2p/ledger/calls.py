"""Signed calls: what a wallet signs, and the one place where that signature is checked.

Signed bytes = domain "kaisar/call" ‖ network id ‖ canonical `CallBody`. Nonces count 0, 1, 2, … for each account, so
that a call can be neither repeated nor moved past another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from nacl import bindings
from nacl.exceptions import CryptoError

from kaisar_p2p.errors import CallRejected, SignatureError
from kaisar_p2p.ledger.interface import CallSigner
from kaisar_p2p.wire.codec import U8, U64, AtMost, Bytes32, Bytes64, decode, encode, message
from kaisar_p2p.wire.crypto import domain
from kaisar_p2p.wire.ids import short

CALL_DOMAIN = "kaisar/call"
PAYLOAD_BYTES = 64 * 1024
SIGNED_CALL_BYTES = PAYLOAD_BYTES + 256  # an upper bound of the encoding around the payload
ED25519, SR25519 = 0, 1

_PREFIX_BYTES = 2  # array header, tag
_SUFFIX_BYTES = 66  # two bytes of header, 64 of signature


@message(120)
@dataclass(frozen=True)
class CallBody:
    """What a wallet signs; scheme is 0 for ed25519 and 1 for sr25519."""

    account: Bytes32
    scheme: U8
    nonce: U64
    payload: Annotated[bytes, AtMost(PAYLOAD_BYTES)]


@message(121)
@dataclass(frozen=True)
class SignedCall:
    """A call as the ledger keeps it."""

    body: CallBody
    signature: Bytes64


def sign_call(payload: bytes, nonce: int, signer: CallSigner, network: bytes) -> bytes:
    """Canonical bytes of a signed call.

    Raises:
        CallRejected: the payload is too large, or the signer's signature does not verify under its own key.
    """
    if len(payload) > PAYLOAD_BYTES:
        raise CallRejected(
            f"the payload has {len(payload)} bytes, the limit is {PAYLOAD_BYTES}", hint="split it into several calls"
        )
    body = CallBody(signer.public_key, int(signer.scheme), nonce, payload)
    try:
        to_sign = domain(CALL_DOMAIN, network) + encode(body)
    except ValueError as error:
        raise CallRejected(f"not a signable call: {error}", hint="check the wallet's account and scheme") from error
    signature = signer.sign(to_sign)
    if not _verifies(body, to_sign, signature):
        raise CallRejected(
            f"bad signature by {short(signer.public_key)}", hint="the wallet's key, scheme and signature do not match"
        )
    return encode(SignedCall(body, signature))


def read_call(signed: bytes) -> SignedCall:
    """Decode without checking the signature; raises DecodeError."""
    return decode(SignedCall, signed)


def open_call(signed: bytes, network: bytes) -> SignedCall:
    """Decode and check the signature; raises DecodeError or SignatureError, and nothing else."""
    call = decode(SignedCall, signed)
    # Canonical encoding puts the body's own encoding between the header and the signature: no need to encode it again.
    to_verify = domain(CALL_DOMAIN, network) + signed[_PREFIX_BYTES:-_SUFFIX_BYTES]
    if not _verifies(call.body, to_verify, call.signature):
        raise SignatureError(f"bad signature on a call by {short(call.body.account)}")
    return call


def _verifies(body: CallBody, signed: bytes, signature: bytes) -> bool:
    """As Substrate does it: browser wallets sign the message between <Bytes> tags, others as it is."""
    if len(body.account) != 32 or len(signature) != 64:
        return False
    verify = {ED25519: _verify_ed25519, SR25519: _verify_sr25519}.get(body.scheme)
    if verify is None:
        return False
    return verify(body.account, signed, signature) or verify(body.account, b"<Bytes>" + signed + b"</Bytes>", signature)


def _verify_ed25519(account: bytes, signed: bytes, signature: bytes) -> bool:
    try:
        bindings.crypto_sign_open(signature + signed, account)
    except CryptoError:
        return False
    return True


def _verify_sr25519(account: bytes, signed: bytes, signature: bytes) -> bool:
    import sr25519  # takes time to load, and most wallets are ed25519

    verify: Any = sr25519.verify
    try:
        return bool(verify(signature, signed, account))
    except (ValueError, TypeError):  # not a point of the curve
        return False
