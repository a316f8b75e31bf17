"""RFC 9381 vectors, and that nothing but the one right proof verifies."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings

from kaisar_p2p.wire import vrf

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "vrf.json").read_text())

# RFC 9381, appendix B.3, examples 16 to 18: seed, public key, alpha, proof, output.
RFC_EXAMPLES = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "8657106690b5526245a92b003bb079ccd1a92130477671f6fc01ad16f26f723f26f8a57ccaed74ee1b190bed1f479d97"
        "27d2d0f9b005a6e456a35d4fb0daab1268a1b0db10836d9826a528ca76567805",
        "90cf1df3b703cce59e2a35b925d411164068269d7b2d29f3301c03dd757876ff"
        "66b71dda49d2de59d03450451af026798e8f81cd2e333de5cdf4f3e140fdd8ae",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "f3141cd382dc42909d19ec5110469e4feae18300e94f304590abdced48aed5933bf0864a62558b3ed7f2fea45c92a465"
        "301b3bbf5e3e54ddf2d935be3b67926da3ef39226bbc355bdc9850112c8f4b02",
        "eb4440665d3891d668e7e0fcaf587f1b4bd7fbfe99d0eb2211ccec90496310eb"
        "5e33821bc613efb94db5e5b54c70a848a0bef4553a41befc57663b56373a5031",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "9bc0f79119cc5604bf02d23b4caede71393cedfbb191434dd016d30177ccbf8096bb474e53895c362d8628ee9f9ea3c0"
        "e52c7a5c691b6c18c9979866568add7a2d41b00b05081ed0f58ee5e31b3a970e",
        "645427e5d00c62a23fb703732fa5d892940935942101e456ecca7bb217c61c45"
        "2118fec1219202a0edcf038bb6373241578be7217ba85a2687f7a0310b2df19f",
    ),
]
EXAMPLES = [tuple(map(bytes.fromhex, example)) for example in RFC_EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES)
def test_agrees_with_the_rfc(example: tuple[bytes, ...]) -> None:
    seed, public, alpha, proof, output = example
    assert vrf.public_key(seed) == public
    assert vrf.prove(seed, alpha) == proof
    assert vrf.verify(public, alpha, proof) == output
    assert vrf.output(seed, alpha) == output
    assert vrf.proof_to_hash(proof) == output


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_flipped_bit_verifies(example: tuple[bytes, ...]) -> None:
    _, public, alpha, proof, _ = example
    for bit in range(8 * vrf.PROOF_BYTES):
        assert vrf.verify(public, alpha, flip(proof, bit)) is None, bit


@pytest.mark.parametrize("vector", VECTORS)
def test_agrees_with_the_independent_implementation(vector: dict[str, str]) -> None:
    seed, public, alpha, proof, output = (
        bytes.fromhex(vector[name]) for name in ("seed", "public", "alpha", "proof", "output")
    )
    assert vrf.public_key(seed) == public
    assert vrf.prove(seed, alpha) == proof
    assert vrf.verify(public, alpha, proof) == output


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=100), st.integers(0, 255))
def test_proof_belongs_to_one_key_and_one_input(seed: bytes, alpha: bytes, bit: int) -> None:
    proof, public = vrf.prove(seed, alpha), vrf.public_key(seed)
    assert vrf.verify(public, alpha, proof) == vrf.output(seed, alpha)
    assert vrf.verify(public, alpha + b"\0", proof) is None
    assert vrf.verify(vrf.public_key(flip(seed, bit)), alpha, proof) is None


# Points of small order (RFC 7748 and the ed25519 literature), and encodings at or above the field prime.
SMALL_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
]
NON_CANONICAL = [
    b"\xff" * 32,
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    b"\x01" + bytes(30) + b"\x80",
]


@pytest.mark.parametrize("bad", SMALL_ORDER + NON_CANONICAL)
def test_refuses_small_order_and_non_canonical_points(bad: bytes) -> None:
    _, public, alpha, proof, _ = EXAMPLES[0]
    assert vrf.verify(bad, alpha, proof) is None
    assert vrf.verify(public, alpha, bad + proof[32:]) is None


@pytest.mark.parametrize("torsion", SMALL_ORDER[2:])
def test_refuses_keys_and_proofs_with_a_torsion_component(torsion: bytes) -> None:
    _, public, alpha, proof, _ = EXAMPLES[0]
    assert vrf.verify(bindings.crypto_core_ed25519_add(public, torsion), alpha, proof) is None
    assert vrf.verify(public, alpha, bindings.crypto_core_ed25519_add(proof[:32], torsion) + proof[32:]) is None


def test_refuses_a_response_that_is_not_reduced() -> None:
    _, public, alpha, proof, _ = EXAMPLES[0]
    order = 2**252 + 27742317777372353535851937790883648493
    response = int.from_bytes(proof[48:], "little") + order
    assert vrf.verify(public, alpha, proof[:48] + response.to_bytes(32, "little")) is None


@given(st.binary(max_size=120), st.binary(max_size=120))
def test_never_raises_on_what_a_peer_sends(public: bytes, proof: bytes) -> None:
    assert vrf.verify(public, b"", proof) is None


def test_output_of_an_impossible_proof_is_an_error() -> None:
    with pytest.raises(ValueError, match="curve point"):
        vrf.proof_to_hash(bytes(79))
    with pytest.raises(ValueError, match="curve point"):
        vrf.proof_to_hash(b"\xff" * 80)
    with pytest.raises(ValueError, match="curve point"):
        vrf.proof_to_hash(b"\x02" + bytes(79))


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
