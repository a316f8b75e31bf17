"""A verifiable random function over ordinary ed25519 keys (RFC 9381).

Suite ECVRF-EDWARDS25519-SHA512-TAI (0x03): for every key and input `alpha` there is exactly one output, which
only the holder of the key can compute and anybody can check. Keys are 32 bytes, proofs 80, outputs 64.

Stricter than the RFC in one point: libsodium refuses non-canonical encodings and points outside the
prime-order subgroup, so a public key or proof point with a torsion component never verifies. Nothing honest
has one. Secret scalars pass only through libsodium's constant-time functions; hashing to the curve takes
variable time, but its input is public.
"""

from __future__ import annotations

from hashlib import sha512

from nacl import bindings
from nacl.exceptions import CryptoError

PROOF_BYTES = 80

_SUITE = b"\x03"
_GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
_FIELD_PRIME = 2**255 - 19
_IDENTITY = b"\x01" + bytes(31)

_add = bindings.crypto_core_ed25519_add
_subtract = bindings.crypto_core_ed25519_sub
_multiply = bindings.crypto_scalarmult_ed25519_noclamp
_multiply_base = bindings.crypto_scalarmult_ed25519_base_noclamp
_reduce = bindings.crypto_core_ed25519_scalar_reduce

# How PyNaCl reports that libsodium refused a point or a length.
_REFUSED = (CryptoError, ValueError, TypeError, RuntimeError)


def public_key(seed: bytes) -> bytes:
    """The 32-byte ed25519 public key of a 32-byte seed."""
    return bytes(bindings.crypto_sign_seed_keypair(seed)[0])


def prove(seed: bytes, alpha: bytes) -> bytes:
    """The 80-byte proof of the output for `alpha` (RFC 9381 §5.1). `seed` is the 32-byte ed25519 seed."""
    secret, nonce_prefix = _expand(seed)
    public = public_key(seed)
    point = _encode_to_curve(public, alpha)
    gamma = _multiply(secret, point)
    nonce = _reduce(sha512(nonce_prefix + point).digest())
    challenge = _challenge(public, point, gamma, _multiply_base(nonce), _multiply(nonce, point))
    product = bindings.crypto_core_ed25519_scalar_mul(challenge + bytes(16), _reduce(secret + bytes(32)))
    return bytes(gamma + challenge + bindings.crypto_core_ed25519_scalar_add(nonce, product))


def verify(public: bytes, alpha: bytes, proof: bytes) -> bytes | None:
    """The 64-byte output if `proof` is the proof of `public` for `alpha`, else None (RFC 9381 §5.3)."""
    if len(public) != 32 or len(proof) != PROOF_BYTES:
        return None
    gamma, challenge, response = proof[:32], proof[32:48], proof[48:]
    if int.from_bytes(response, "little") >= _GROUP_ORDER:
        return None
    try:
        point = _encode_to_curve(public, alpha)
        scalar = challenge + bytes(16)
        u = _subtract(_multiply_base(response), _multiply(scalar, public))
        v = _subtract(_multiply(response, point), _multiply(scalar, gamma))
        if _challenge(public, point, gamma, u, v) != challenge:
            return None
        return _gamma_to_hash(gamma)
    except _REFUSED:
        return None


def output(seed: bytes, alpha: bytes) -> bytes:
    """The 64-byte output without its proof: what a node computes to see whether it is drawn."""
    secret, _ = _expand(seed)
    return _gamma_to_hash(_multiply(secret, _encode_to_curve(public_key(seed), alpha)))


def proof_to_hash(proof: bytes) -> bytes:
    """The output that a **verified** proof stands for (RFC 9381 §5.2).

    Raises:
        ValueError: the proof has the wrong length or does not begin with a curve point.
    """
    if len(proof) != PROOF_BYTES or not _is_canonical(proof[:32]):
        raise ValueError(f"a VRF proof is a curve point and 48 more bytes, {PROOF_BYTES} in all")
    try:
        return _gamma_to_hash(proof[:32])
    except _REFUSED as refused:
        raise ValueError("the VRF proof does not begin with a curve point") from refused


def _expand(seed: bytes) -> tuple[bytes, bytes]:
    """Secret scalar and nonce prefix of an ed25519 seed (RFC 8032 §5.1.5)."""
    digest = sha512(seed).digest()
    scalar = bytearray(digest[:32])
    scalar[0] &= 248
    scalar[31] = (scalar[31] & 127) | 64
    return bytes(scalar), digest[32:]


def _encode_to_curve(salt: bytes, alpha: bytes) -> bytes:
    """Try and increment (RFC 9381 §5.4.1.1): the first hash that decodes to a point, times the cofactor."""
    for counter in range(256):
        candidate = sha512(_SUITE + b"\x01" + salt + alpha + bytes([counter, 0])).digest()[:32]
        if not _is_canonical(candidate):
            continue
        try:
            point = _times_cofactor(candidate)
        except _REFUSED:
            continue
        if point != _IDENTITY:
            return point
    raise ValueError("no curve point for this input")  # each try fails with probability 1/2: never seen


def _is_canonical(point: bytes) -> bool:
    return int.from_bytes(point, "little") & (2**255 - 1) < _FIELD_PRIME


def _times_cofactor(point: bytes) -> bytes:
    for _ in range(3):
        point = _add(point, point)
    return bytes(point)


def _challenge(*points: bytes) -> bytes:
    return sha512(_SUITE + b"\x02" + b"".join(points) + b"\x00").digest()[:16]


def _gamma_to_hash(gamma: bytes) -> bytes:
    return sha512(_SUITE + b"\x03" + _times_cofactor(gamma) + b"\x00").digest()
