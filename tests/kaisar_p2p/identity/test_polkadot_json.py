"""polkadot-js account files, exchanged with substrate-interface in both directions."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from substrateinterface import Keypair

from kaisar_p2p.errors import IdentityError, WrongPassphrase
from kaisar_p2p.identity import KdfCost, Keystore, Scheme, SecretKey
from kaisar_p2p.identity.polkadot_json import export_polkadot_json, import_polkadot_json

PHRASE = "bottom drive obey lake curtain smoke basket hold race lonely fit walk"
HEADER = "3053020101300506032b657004220420"
DIVIDER = "a123032100"

# The first key of RFC 8032 (§7.1) as polkadot-js writes it when it is not encrypted.
RFC_SEED = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
RFC_PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
UNENCRYPTED: dict[str, Any] = {
    "encoded": base64.b64encode(bytes.fromhex(HEADER + RFC_SEED + RFC_PUBLIC + DIVIDER + RFC_PUBLIC)).decode(),
    "encoding": {"content": ["pkcs8", "ed25519"], "type": ["none"], "version": "3"},
    "address": "5Gw54ghuAHodDGAS91DUxqvKa6PeT9bhDdns3ztBupY8pSyn",
    "meta": {},
}


@pytest.fixture
def keystore(tmp_path: Path) -> Keystore:
    return Keystore(tmp_path / "keys", cost=KdfCost(passes=1, memory_bytes=8192))


def changed(**fields: Any) -> str:
    return json.dumps({**UNENCRYPTED, **fields})


def encoding(**fields: Any) -> dict[str, Any]:
    return {**UNENCRYPTED["encoding"], **fields}


def test_an_sr25519_file_of_substrate_interface_is_imported(keystore: Keystore) -> None:
    other = Keypair.create_from_mnemonic(PHRASE)
    document = json.dumps(other.export_to_encrypted_json("secret", "dev"))
    wallet = keystore.import_json("main", document, "secret", "ours")
    assert (wallet.scheme, wallet.address) == (Scheme.SR25519, other.ss58_address)
    assert other.verify(b"hello", keystore.unlock("main", "ours").sign(b"hello"))
    with pytest.raises(IdentityError, match="no seed"):
        keystore.export_seed("main", "ours")
    with pytest.raises(IdentityError, match="without a phrase"):
        keystore.export_mnemonic("main", "ours")
    # What has no seed can still be carried on as JSON.
    again = keystore.import_json("again", keystore.export_json("main", "ours", "theirs"), "theirs", None)
    assert again.public_key == wallet.public_key


@pytest.mark.parametrize("scheme", list(Scheme))
def test_our_file_is_read_by_substrate_interface(keystore: Keystore, scheme: Scheme) -> None:
    wallet = keystore.import_mnemonic("main", scheme, PHRASE, "ours")
    document = json.loads(keystore.export_json("main", "ours", "theirs"))
    assert document["encoding"] == {
        "content": ["pkcs8", scheme.label],
        "type": ["scrypt", "xsalsa20-poly1305"],
        "version": "3",
    }
    assert document["meta"]["name"] == "main"
    other = Keypair.create_from_encrypted_json(document, "theirs")
    assert (other.public_key, other.ss58_address) == (wallet.public_key, wallet.address)
    assert other.verify(b"hello", wallet.sign(b"hello"))
    if scheme is Scheme.SR25519:
        assert Keypair.create_from_mnemonic(PHRASE).verify(b"hello", other.sign(b"hello"))


@pytest.mark.parametrize("scheme", list(Scheme))
def test_export_and_import_are_inverse(scheme: Scheme) -> None:
    secret = SecretKey.from_seed(scheme, bytes(range(32)))
    again = import_polkadot_json(export_polkadot_json(secret, "n", "pass ü"), "pass ü")
    assert (again.scheme, again.key, again.public_key) == (scheme, secret.key, secret.public_key)


def test_an_unencrypted_file_of_polkadot_js_is_imported() -> None:
    secret = import_polkadot_json(json.dumps(UNENCRYPTED), None)
    assert secret.scheme is Scheme.ED25519
    assert secret.seed == bytes.fromhex(RFC_SEED)
    assert import_polkadot_json(json.dumps(UNENCRYPTED), "not needed").key == secret.key
    hexadecimal = "0x" + base64.b64decode(UNENCRYPTED["encoded"]).hex()
    assert import_polkadot_json(changed(encoded=hexadecimal), None).key == secret.key


def test_the_address_may_have_another_networks_prefix() -> None:
    from scalecodec.utils.ss58 import ss58_encode

    public_key = import_polkadot_json(json.dumps(UNENCRYPTED), None).public_key
    assert import_polkadot_json(changed(address=ss58_encode(public_key, 0)), None).public_key == public_key


@pytest.mark.parametrize("scheme", list(Scheme))
def test_the_oldest_files_kept_a_seed(scheme: Scheme) -> None:
    secret = SecretKey.from_seed(scheme, bytes(range(32)))
    body = bytes.fromhex(HEADER) + bytes(range(32)) + bytes.fromhex(DIVIDER) + secret.public_key
    document = {
        "encoded": base64.b64encode(body).decode(),
        "encoding": {"content": ["pkcs8", scheme.label], "type": "none", "version": "3"},
    }
    assert import_polkadot_json(json.dumps(document), None).key == secret.key


def test_a_wrong_passphrase_is_refused() -> None:
    document = export_polkadot_json(SecretKey.from_seed(Scheme.ED25519, bytes(32)), "n", "right")
    for passphrase in ("wrong", "", None):
        with pytest.raises(WrongPassphrase):
            import_polkadot_json(document, passphrase)


def test_an_export_is_always_encrypted(keystore: Keystore) -> None:
    keystore.import_mnemonic("main", Scheme.SR25519, PHRASE, None)
    with pytest.raises(IdentityError, match="empty"):
        keystore.export_json("main", None, "")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("", "not JSON"),
        ("[" * 10_000, "not JSON"),
        ("[]", "not a JSON object"),
        (" " * 20_000, "too large"),
        ("{}", "version 3"),
        (changed(encoding=None), "version 3"),
        (changed(encoding=encoding(version="2")), "version 3"),
        (changed(encoding=encoding(content=["pkcs8", "ecdsa"])), "no ed25519 or sr25519"),
        (changed(encoding=encoding(content="pkcs8")), "no ed25519 or sr25519"),
        (changed(encoding=encoding(content=["pkcs8", ["ed25519"]])), "no ed25519 or sr25519"),
        (changed(encoding=encoding(type=["xsalsa20-poly1305"])), "encryption is unknown"),
        (changed(encoding=encoding(type=["scrypt", "xsalsa20-poly1305"])), "encryption parameters"),
        (changed(encoded=None), "no encoded key"),
        (changed(encoded="%%%"), "neither base64"),
        (changed(encoded="0xzz"), "neither base64"),
        (changed(encoded=""), "PKCS#8"),
        (changed(encoded=UNENCRYPTED["encoded"][:-4]), "PKCS#8"),
        (changed(address="5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV"), "not that of its address"),
        (changed(address=7), "not that of its address"),
        (changed(address="nonsense"), "is not an address"),
    ],
)
def test_unusable_files_say_why(document: str, why: str) -> None:
    with pytest.raises(IdentityError, match=why) as caught:
        import_polkadot_json(document, "x")
    assert caught.value.hint


def test_a_public_key_that_is_not_the_secrets_is_refused() -> None:
    body = bytearray(base64.b64decode(UNENCRYPTED["encoded"]))
    body[-1] ^= 1
    with pytest.raises(IdentityError, match="do not match"):
        import_polkadot_json(changed(encoded=base64.b64encode(body).decode()), None)


def test_a_file_cannot_ask_for_gigabytes() -> None:
    document = json.loads(export_polkadot_json(SecretKey.from_seed(Scheme.ED25519, bytes(32)), "n", "p"))
    raw = bytearray(base64.b64decode(document["encoded"]))
    raw[32:36] = (1 << 24).to_bytes(4, "little")
    document["encoded"] = base64.b64encode(raw).decode()
    with pytest.raises(IdentityError, match="encryption parameters"):
        import_polkadot_json(json.dumps(document), "p")


@given(st.sampled_from(["ed25519", "sr25519"]), st.binary(max_size=140), st.booleans())
def test_any_body_is_a_key_or_a_clear_error(label: str, body: bytes, framed: bool) -> None:
    if framed:
        body = bytes.fromhex(HEADER) + body.ljust(64, b"\xff")[:64] + bytes.fromhex(DIVIDER) + bytes(32)
    document = changed(encoded=base64.b64encode(body).decode(), encoding=encoding(content=["pkcs8", label]))
    with pytest.raises(IdentityError):
        import_polkadot_json(document, None)
