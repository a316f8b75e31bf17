"""The keystore on a real file system: what is written, what is refused, what never leaks."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import IdentityError, UnknownWallet, WrongPassphrase
from kaisar_p2p.identity import INTERACTIVE, KdfCost, Keystore, Scheme, SecretKey
from kaisar_p2p.identity.keyfile import KeyFile

CHEAP = KdfCost(passes=1, memory_bytes=8192)
PASSPHRASE = "correct horse"
SEED = "0x" + "5e" * 32


@pytest.fixture
def keystore(tmp_path: Path) -> Keystore:
    return Keystore(tmp_path / "keys", cost=CHEAP)


def wallet_path(keystore: Keystore, name: str = "main") -> Path:
    return keystore.path / f"wallet-{name}.json"


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("passphrase", [PASSPHRASE, None])
def test_a_wallet_is_found_again(keystore: Keystore, scheme: Scheme, passphrase: str | None) -> None:
    wallet, phrase = keystore.create_wallet("main", scheme, passphrase)
    again = Keystore(keystore.path).unlock("main", passphrase)
    assert again == wallet
    assert again.scheme is scheme
    assert keystore.export_mnemonic("main", passphrase) == phrase
    assert keystore.import_mnemonic("copy", scheme, phrase, None).public_key == wallet.public_key
    assert (
        keystore.import_seed("seed", scheme, keystore.export_seed("main", passphrase), None).address == wallet.address
    )
    assert keystore.wallet_info("main").encrypted == (passphrase is not None)


@pytest.mark.parametrize("passphrase", [PASSPHRASE, None])
def test_a_machine_key_is_found_again(keystore: Keystore, passphrase: str | None) -> None:
    machine = keystore.create_machine_key(passphrase)
    again = keystore.unlock_machine_key(passphrase)
    assert again == machine
    assert again.seed == machine.seed
    assert keystore.machine_info().address == machine.address
    assert keystore.list() == []


def test_the_machine_key_may_be_the_owner_too(keystore: Keystore) -> None:
    machine = keystore.create_machine_key(None)
    assert keystore.import_seed("main", Scheme.ED25519, machine.seed.hex(), None).public_key == machine.public_key


def test_wallets_are_listed_by_name_without_a_passphrase(keystore: Keystore) -> None:
    assert keystore.list() == []
    keystore.create_wallet("zoe", Scheme.SR25519, PASSPHRASE)
    keystore.create_wallet("bob", Scheme.ED25519, None)
    assert [(w.name, w.scheme, w.encrypted) for w in keystore.list()] == [
        ("bob", Scheme.ED25519, False),
        ("zoe", Scheme.SR25519, True),
    ]


def test_a_wrong_passphrase_is_refused(keystore: Keystore) -> None:
    keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
    keystore.create_machine_key(PASSPHRASE)
    for passphrase in ("correct hors", "", None):
        with pytest.raises(IdentityError) as caught:
            keystore.unlock("main", passphrase)
        assert caught.value.hint
    with pytest.raises(WrongPassphrase):
        keystore.unlock("main", "Correct horse")
    with pytest.raises(WrongPassphrase):
        keystore.unlock_machine_key("correct hors")


def test_a_passphrase_is_the_same_however_it_is_composed(keystore: Keystore) -> None:
    keystore.create_wallet("main", Scheme.ED25519, "caf\u00e9")
    assert keystore.unlock("main", "cafe\u0301").name == "main"
    with pytest.raises(WrongPassphrase):
        keystore.unlock("main", "\udc80 not text")


def test_an_empty_passphrase_is_no_passphrase_by_mistake(keystore: Keystore) -> None:
    with pytest.raises(IdentityError, match="empty"):
        keystore.create_wallet("main", Scheme.ED25519, "")
    assert keystore.list() == []


def test_unknown_names_are_told(keystore: Keystore) -> None:
    with pytest.raises(UnknownWallet, match="'nobody'"):
        keystore.unlock("nobody", None)
    with pytest.raises(UnknownWallet, match="kaisar init"):
        keystore.unlock_machine_key(None)
    keystore.create_wallet("main", Scheme.ED25519, None)
    with pytest.raises(UnknownWallet):
        keystore.unlock("nobody", None)


@pytest.mark.parametrize("name", ["", "Main", "../main", "a/b", ".main", "-x", "a" * 33, "ü", "main\n", "a b"])
def test_names_cannot_leave_the_directory(keystore: Keystore, name: str) -> None:
    for attempt in (
        lambda: keystore.create_wallet(name, Scheme.ED25519, None),
        lambda: keystore.unlock(name, None),
        lambda: keystore.wallet_info(name),
    ):
        with pytest.raises(IdentityError, match="is not a wallet name"):
            attempt()


def test_nothing_is_ever_overwritten(keystore: Keystore) -> None:
    keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
    keystore.create_machine_key(None)
    before = {path: path.read_bytes() for path in keystore.path.iterdir()}
    with pytest.raises(IdentityError, match="exists already"):
        keystore.import_seed("main", Scheme.SR25519, SEED, None)
    with pytest.raises(IdentityError, match="exists already"):
        keystore.create_machine_key(None)
    assert {path: path.read_bytes() for path in keystore.path.iterdir()} == before


# Files


def test_files_are_private_whatever_the_umask_says(keystore: Keystore) -> None:
    old = os.umask(0)
    try:
        keystore.create_wallet("main", Scheme.ED25519, None)
    finally:
        os.umask(old)
    assert stat.S_IMODE(keystore.path.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in keystore.path.iterdir()] == [0o600]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_file_that_others_may_open_is_refused(keystore: Keystore, mode: int) -> None:
    keystore.create_wallet("main", Scheme.ED25519, None)
    path = wallet_path(keystore)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        keystore.unlock("main", None)
    path.chmod(0o400)
    keystore.unlock("main", None)


def test_a_directory_that_others_may_enter_is_refused(keystore: Keystore) -> None:
    keystore.create_wallet("main", Scheme.ED25519, None)
    keystore.path.chmod(0o755)
    for attempt in (lambda: keystore.unlock("main", None), lambda: keystore.create_machine_key(None)):
        with pytest.raises(IdentityError, match=f"chmod 700 {keystore.path}"):
            attempt()


def test_symbolic_links_are_refused(keystore: Keystore, tmp_path: Path) -> None:
    keystore.create_wallet("main", Scheme.ED25519, None)
    wallet_path(keystore, "link").symlink_to(wallet_path(keystore))
    with pytest.raises(IdentityError, match="symbolic link"):
        keystore.unlock("link", None)
    (tmp_path / "linked").symlink_to(keystore.path)
    with pytest.raises(IdentityError, match="not a directory"):
        Keystore(tmp_path / "linked").unlock("main", None)
    # A dangling link is a taken name, not a place to write a key to.
    wallet_path(keystore, "dangling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IdentityError, match="exists already"):
        keystore.create_wallet("dangling", Scheme.ED25519, None)
    assert not (tmp_path / "elsewhere").exists()


def test_a_pipe_or_directory_in_place_of_a_file_is_refused(keystore: Keystore) -> None:
    keystore.create_machine_key(None)
    os.mkfifo(wallet_path(keystore, "pipe"), 0o600)
    wallet_path(keystore, "dir").mkdir(0o700)
    for name in ("pipe", "dir"):
        with pytest.raises(IdentityError, match="is not a file"):
            keystore.unlock(name, None)


def test_a_missing_data_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="kaisar init"):
        Keystore(tmp_path / "no" / "keys", cost=CHEAP).create_machine_key(None)


def test_a_full_disk_leaves_no_half_key(keystore: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    keystore.create_machine_key(None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="No space left on device"):
        keystore.create_wallet("main", Scheme.ED25519, None)
    assert [path.name for path in keystore.path.iterdir()] == ["machine.json"]


def test_many_processes_make_one_machine_key(keystore: Keystore) -> None:
    code = (
        "import sys, pathlib\n"
        "from kaisar_p2p.identity import Keystore\n"
        "from kaisar_p2p.errors import IdentityError\n"
        "sys.stdin.readline()\n"
        "try: print(Keystore(pathlib.Path(sys.argv[1])).create_machine_key(None).address)\n"
        "except IdentityError as error: print(error.message)\n"
    )
    command = [sys.executable, "-c", code, str(keystore.path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [racer.communicate("go\n")[0].strip() for racer in racers]
    assert outputs.count("the machine key exists already") == 3
    assert keystore.machine_info().address in outputs
    assert [path.name for path in keystore.path.iterdir()] == ["machine.json"]


# Damage


def test_a_file_under_another_name_is_refused(keystore: Keystore) -> None:
    keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
    wallet_path(keystore).rename(wallet_path(keystore, "other"))
    with pytest.raises(IdentityError, match="holds the key of wallet 'main'"):
        keystore.unlock("other", PASSPHRASE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("scheme", "sr25519"),
        ("address", "5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV"),
        ("kind", "machine"),
    ],
)
def test_every_field_of_the_header_is_authenticated(keystore: Keystore, key: str, value: str) -> None:
    keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
    document = json.loads(wallet_path(keystore).read_bytes())
    with pytest.raises(WrongPassphrase):
        KeyFile.decode(json.dumps({**document, key: value}).encode()).unlock(PASSPHRASE)
    assert KeyFile.decode(json.dumps(document).encode()).unlock(PASSPHRASE).public_key


def test_an_unencrypted_file_with_another_address_is_refused(keystore: Keystore) -> None:
    keystore.create_wallet("main", Scheme.ED25519, None)
    document = json.loads(wallet_path(keystore).read_bytes())
    assert document["encryption"] == {"method": "none"}
    forged = {**document, "address": "5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV"}
    with pytest.raises(IdentityError, match="does not hold the key of its address"):
        KeyFile.decode(json.dumps(forged).encode()).unlock(None)


@pytest.mark.parametrize(
    "change",
    [
        {"passes": 10**9},
        {"passes": 0},
        {"passes": True},
        {"memory_bytes": 2**40},
        {"memory_bytes": 1},
        {"memory_bytes": "8192"},
        {"salt": "00"},
        {"nonce": "zz" * 24},
        {"method": "rot13"},
        {"extra": 1},
    ],
)
def test_a_file_cannot_ask_for_unbounded_work(keystore: Keystore, change: dict[str, object]) -> None:
    keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
    document = json.loads(wallet_path(keystore).read_bytes())
    document["encryption"] |= change
    wallet_path(keystore).write_text(json.dumps(document))
    for attempt in (lambda: keystore.unlock("main", PASSPHRASE), keystore.list):
        with pytest.raises(IdentityError, match=r"wallet-main\.json"):
            attempt()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b"9" * 5000,
        b'{"format": "kaisar-key", "version": 2}',
        b"x" * 20_000,
    ],
)
def test_a_damaged_file_is_told_by_its_path(keystore: Keystore, data: bytes) -> None:
    keystore.create_wallet("main", Scheme.ED25519, None)
    wallet_path(keystore).write_bytes(data)
    with pytest.raises(IdentityError, match=r"wallet-main\.json") as caught:
        keystore.unlock("main", None)
    assert caught.value.hint


@given(st.data())
def test_any_damage_is_an_identity_error(data: st.DataObject) -> None:
    secret = SecretKey.from_seed(Scheme.SR25519, bytes(range(32)))
    whole = KeyFile.lock("wallet", "main", secret, data.draw(st.sampled_from([PASSPHRASE, None])), CHEAP).encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 3)) :]
    try:
        opened = KeyFile.decode(damaged).unlock(PASSPHRASE)
    except IdentityError:
        return
    assert opened.public_key == secret.public_key


# Secrets


def test_the_file_holds_no_secret_in_the_clear(keystore: Keystore) -> None:
    wallet, phrase = keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
    data = wallet_path(keystore).read_bytes()
    secret = bytes.fromhex(json.loads(data)["secret"])
    seed = bytes.fromhex(keystore.export_seed("main", PASSPHRASE)[2:])
    for leak in (phrase.encode(), phrase.split()[0].encode(), seed, seed.hex().encode(), PASSPHRASE.encode()):
        assert leak not in data
        assert leak not in secret
    assert wallet.address.encode() in data


def test_two_files_of_one_secret_differ(keystore: Keystore) -> None:
    keystore.import_seed("one", Scheme.ED25519, SEED, PASSPHRASE)
    keystore.import_seed("two", Scheme.ED25519, SEED, PASSPHRASE)
    one, two = (json.loads(wallet_path(keystore, name).read_bytes()) for name in ("one", "two"))
    assert one["secret"][:32] != two["secret"][:32]
    assert one["encryption"]["salt"] != two["encryption"]["salt"]
    assert one["encryption"]["nonce"] != two["encryption"]["nonce"]


def test_errors_and_logs_hold_no_secret(keystore: Keystore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keystore.import_seed("main", Scheme.ED25519, SEED, PASSPHRASE)
    shown = [repr(keystore), repr(keystore.unlock("main", PASSPHRASE)), repr(keystore.list())]
    shown.append(repr(KeyFile.lock("wallet", "main", SecretKey.from_seed(Scheme.ED25519, b"\x5e" * 32), None, CHEAP)))
    for attempt in (
        lambda: keystore.unlock("main", "wrong " + PASSPHRASE),
        lambda: keystore.import_seed("main", Scheme.ED25519, SEED, PASSPHRASE),
        lambda: keystore.import_seed("other", Scheme.ED25519, SEED + "5e", PASSPHRASE),
        lambda: keystore.export_mnemonic("main", PASSPHRASE),
    ):
        with pytest.raises(IdentityError) as caught:
            attempt()
        shown += [repr(caught.value), str(caught.value)]
    for text in [*shown, caplog.text]:
        assert "5e5e" not in text
        assert "^^" not in text
        assert PASSPHRASE not in text


def test_what_was_not_given_cannot_be_exported(keystore: Keystore) -> None:
    keystore.import_seed("main", Scheme.ED25519, SEED, None)
    with pytest.raises(IdentityError, match="without a phrase"):
        keystore.export_mnemonic("main", None)


def test_the_default_cost_is_bounded() -> None:
    assert INTERACTIVE.memory_bytes <= 32 * 1024 * 1024
    for cost in ({"passes": 65}, {"memory_bytes": 1 << 30}, {"passes": 0}, {"memory_bytes": 0}):
        with pytest.raises(IdentityError, match="outside"):
            KdfCost(**cost)


def test_too_little_memory_is_told(keystore: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    from nacl import bindings

    def no_memory(*_arguments: object) -> bytes:
        raise RuntimeError("failure in the key derivation")

    monkeypatch.setattr(bindings, "crypto_pwhash_alg", no_memory)
    with pytest.raises(IdentityError, match="of memory"):
        keystore.create_wallet("main", Scheme.ED25519, PASSPHRASE)
