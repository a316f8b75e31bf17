"""Keys, addresses and phrases, held against substrate-interface and known addresses."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys

import base58
import pytest
import sr25519
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import VerifyKey

from kaisar_p2p.errors import IdentityError
from kaisar_p2p.identity import MachineKey, Scheme, SecretKey, Wallet, generate_mnemonic, ss58_decode, ss58_encode
from kaisar_p2p.identity.mnemonic import normalise_mnemonic, parse_seed, seed_of_mnemonic
from kaisar_p2p.wire.crypto import KeyPair

# Substrate's public development phrase.
DEV_PHRASE = "bottom drive obey lake curtain smoke basket hold race lonely fit walk"
DEV_SEED = "fac7959dbfe72f052e5a0c3c8d6530f202b02fd8f9f5ca3580ec8deb7797479e"


def wallet_of(secret: SecretKey) -> Wallet:
    return Wallet("w", secret.scheme, secret.public_key, secret)


def test_schemes_are_numbered_as_in_multisignature() -> None:
    assert [(s.value, s.label) for s in Scheme] == [(0, "ed25519"), (1, "sr25519")]
    assert Scheme.from_label("sr25519") is Scheme.SR25519
    with pytest.raises(IdentityError, match="ecdsa"):
        Scheme.from_label("ecdsa")


@pytest.mark.parametrize(
    ("scheme", "address"),
    [
        (Scheme.SR25519, "5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV"),
        (Scheme.ED25519, "5DFJF7tY4bpbpcKPJcBTQaKuCDEPCpiz8TRjpmLeTtweqmXL"),
    ],
)
def test_the_development_phrase_has_its_known_address(scheme: Scheme, address: str) -> None:
    seed = seed_of_mnemonic(DEV_PHRASE)
    assert seed.hex() == DEV_SEED
    assert ss58_encode(SecretKey.from_seed(scheme, seed).public_key) == address


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("words", [12, 24])
def test_a_new_phrase_gives_the_account_that_substrate_interface_finds(scheme: Scheme, words: int) -> None:
    from substrateinterface import Keypair

    phrase = generate_mnemonic(words)
    assert len(phrase.split()) == words
    other = Keypair.create_from_mnemonic(phrase, crypto_type=int(scheme))
    secret = SecretKey.from_seed(scheme, seed_of_mnemonic(normalise_mnemonic(phrase)))
    wallet = wallet_of(secret)
    assert (wallet.public_key, wallet.address) == (other.public_key, other.ss58_address)
    assert other.verify(b"pay 1 KAI", wallet.sign(b"pay 1 KAI"))
    assert not other.verify(b"pay 2 KAI", wallet.sign(b"pay 1 KAI"))


def test_phrases_are_random() -> None:
    assert generate_mnemonic() != generate_mnemonic()


def test_a_phrase_may_be_typed_carelessly() -> None:
    assert normalise_mnemonic("  " + DEV_PHRASE.upper().replace(" ", "\n ") + "\n") == DEV_PHRASE


@pytest.mark.parametrize(
    "phrase",
    [
        "",
        "walk",
        DEV_PHRASE.replace("walk", "walkk"),
        " ".join(reversed(DEV_PHRASE.split())),
        DEV_PHRASE + " walk",
        DEV_PHRASE + "//Alice",
        "bottom " * 12,
    ],
)
def test_a_bad_phrase_is_refused_without_quoting_it(phrase: str) -> None:
    with pytest.raises(IdentityError) as caught:
        normalise_mnemonic(phrase)
    assert caught.value.hint
    assert not any(word in str(caught.value).split() for word in ("bottom", "walk", "walkk", "lonely"))
    assert caught.value.__cause__ is None


def test_phrases_have_12_or_24_words() -> None:
    with pytest.raises(IdentityError, match="13 words"):
        generate_mnemonic(13)


@given(st.binary(min_size=32, max_size=32))
def test_a_seed_is_read_as_it_is_written(seed: bytes) -> None:
    assert parse_seed("0x" + seed.hex()) == parse_seed(seed.hex().upper() + "\n") == seed


@pytest.mark.parametrize("text", ["", "0x", "0x" + "0" * 63, "0x" + "0" * 65, "0x" + "g" * 64, "0X" + "0" * 64])
def test_a_bad_seed_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(IdentityError, match="64 hexadecimal") as caught:
        parse_seed(text)
    assert len(text) < 3 or text not in str(caught.value)


def test_ed25519_signatures_are_those_of_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    machine = MachineKey(KeyPair.from_seed(seed))
    wallet = wallet_of(SecretKey.from_seed(Scheme.ED25519, seed))
    assert machine.public_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert machine.sign(b"") == wallet.sign(b"")
    assert machine.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155")
    assert machine.address == wallet.address
    VerifyKey(machine.public_key).verify(b"message", machine.sign(b"message"))


def test_sr25519_signatures_verify() -> None:
    wallet = wallet_of(SecretKey.from_seed(Scheme.SR25519, bytes(range(32))))
    assert len(wallet.sign(b"message")) == 64
    assert sr25519.verify(wallet.sign(b"message"), b"message", wallet.public_key)


def test_the_peer_id_is_libp2ps() -> None:
    # Peer id of an ed25519 key: the vector of the libp2p peer-id specification's encoding rules.
    public_key = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    machine = MachineKey(KeyPair(public_key, bytes(64)))
    assert machine.peer_id.startswith("12D3KooW")
    assert base58.b58decode(machine.peer_id) == bytes.fromhex("002408011220") + public_key


def test_a_seed_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SecretKey.from_seed(Scheme.SR25519, bytes(31))


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_secret_shows_nowhere_and_does_not_travel(scheme: Scheme) -> None:
    seed = bytes(range(100, 132))
    secret = SecretKey.from_seed(scheme, seed, DEV_PHRASE)
    machine = MachineKey(KeyPair.from_seed(seed))
    for shown in (secret, wallet_of(secret), machine, machine.key_pair):
        for text in (repr(shown), str(shown), f"{shown}", f"{[shown]}"):
            assert seed.hex() not in text
            assert repr(seed)[2:-1] not in text
            assert secret.key.hex() not in text
            assert "bottom" not in text
    for leak in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="never"):
            leak(wallet_of(secret))


def test_wallets_are_equal_by_their_public_parts() -> None:
    one, two = (wallet_of(SecretKey.from_seed(Scheme.ED25519, bytes(32))) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


# Addresses


@given(st.binary(min_size=32, max_size=32), st.integers(0, 16383).filter(lambda p: p not in (46, 47)))
def test_an_address_holds_key_and_prefix(public_key: bytes, prefix: int) -> None:
    address = ss58_encode(public_key, prefix)
    assert ss58_decode(address, prefix) == ss58_decode(address, None) == public_key
    with pytest.raises(IdentityError, match="network prefix"):
        ss58_decode(address, prefix + 1)


@given(st.binary(min_size=32, max_size=32), st.sampled_from([0, 2, 42, 63, 64, 255, 1284, 16383]))
def test_addresses_equal_those_of_scalecodec(public_key: bytes, prefix: int) -> None:
    from scalecodec.utils.ss58 import ss58_encode as other

    assert ss58_encode(public_key, prefix) == other(public_key, ss58_format=prefix)


@given(st.binary(min_size=32, max_size=32), st.data())
def test_a_mistyped_address_is_refused(public_key: bytes, data: st.DataObject) -> None:
    address = ss58_encode(public_key)
    at = data.draw(st.integers(0, len(address) - 1))
    letter = data.draw(st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"))
    mistyped = address[:at] + letter + address[at + 1 :]
    try:
        assert ss58_decode(mistyped) == public_key  # the same letter again
        assert mistyped == address
    except IdentityError as error:
        assert mistyped != address
        assert error.hint


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_clear_error(text: str) -> None:
    try:
        assert ss58_encode(ss58_decode(text)) == text
    except IdentityError as error:
        assert "is not an address" in error.message


@given(st.binary(max_size=40))
def test_any_bytes_decode_to_one_spelling_or_to_an_error(raw: bytes) -> None:
    text = base58.b58encode(raw).decode()
    with contextlib.suppress(IdentityError):
        assert ss58_encode(ss58_decode(text)) == text


@pytest.mark.parametrize(
    "address", [" 5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV", "0x" + "00" * 32, "5" * 100_000]
)
def test_addresses_have_one_spelling(address: str) -> None:
    with pytest.raises(IdentityError, match="is not an address") as caught:
        ss58_decode(address)
    assert len(str(caught.value)) < 300


def test_encoding_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        ss58_encode(bytes(33))
    for prefix in (-1, 46, 16384):
        with pytest.raises(ValueError, match="prefix"):
            ss58_encode(bytes(32), prefix)


def test_a_node_does_not_load_substrate_interface_or_the_bindings() -> None:
    names = ("substrateinterface", "sr25519", "bip39")
    code = f"import sys, kaisar_p2p.identity; print([name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
