"""A prepared directory is what its nodes need: keys, configurations, and one ledger that knows all of them."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from kaisar_p2p.errors import DataDirectoryError
from kaisar_p2p.identity import Keystore
from node.config import load_config
from protocols.interpreter.audit import conservation
from protocols.params import KAI
from testnet.manifest import Manifest, load_manifest, parse_manifest
from testnet.observer import observe
from testnet.prepare import LEDGER_FILE, Prepared, is_prepared, load_prepared, prepare

SEEDED = """
name = "seeded"
seed = 5
[[allocation]]
account = "00000000000000000000000000000000000000000000000000000000000000aa"
balance_kai = "5"
[[node]]
name = "bootstrap"
roles = ["bootstrap"]
balance_kai = "12.5"
points_kai = "2"
[node.settings.log]
level = "debug"
[[node]]
name = "provider"
roles = ["provider", "checker"]
count = 2
start = false
[node.faults]
wrong_tiles = 1
"""


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return parse_manifest(SEEDED)


@pytest.fixture
def prepared(manifest: Manifest, tmp_path: Path) -> Prepared:
    return prepare(manifest, tmp_path / "net", time_ms=1_000)


def test_what_was_written_is_read(prepared: Prepared) -> None:
    assert load_prepared(prepared.directory) == prepared
    assert is_prepared(prepared.directory)
    assert [each.name for each in prepared.members] == ["bootstrap", "provider-1", "provider-2"]
    assert [each.start for each in prepared.members] == [True, False, False]
    assert prepared.members[1].faults == (("wrong_tiles", 1),)


def test_every_node_can_use_its_directory(prepared: Prepared) -> None:
    for member in prepared.members:
        config = load_config(prepared.data_directory(member.name), environ={})
        assert config.node.roles == member.roles
        assert config.ledger_path.resolve() == (prepared.directory / LEDGER_FILE).resolve()
        assert config.genesis_path.is_file()
        assert config.network.listen == ("/ip4/127.0.0.1/tcp/0",)
        keystore = Keystore(config.keys_path)
        assert keystore.unlock_machine_key(None).public_key.hex() == member.key
        assert keystore.unlock(config.node.wallet, None).public_key.hex() == member.owner
    assert load_config(prepared.data_directory("bootstrap"), environ={}).log.level == "debug"


def test_the_ledger_knows_every_owner(prepared: Prepared) -> None:
    with observe(prepared.directory / LEDGER_FILE) as ledger:
        bootstrap, *providers = prepared.members
        assert ledger.account(bootstrap.owner).balance_planck == 12 * KAI + KAI // 2
        assert ledger.account(bootstrap.owner).points_planck == 2 * KAI
        assert [ledger.account(each.owner).balance_planck for each in providers] == [1000 * KAI] * 2
        assert ledger.account("00" * 31 + "aa").balance_planck == 5 * KAI
        assert conservation(ledger.state) == 0


def test_a_seed_gives_the_same_network_every_time(manifest: Manifest, prepared: Prepared, tmp_path: Path) -> None:
    again = prepare(manifest, tmp_path / "again", time_ms=1_000)
    assert again.members == prepared.members
    assert (again.directory / "genesis.json").read_bytes() == (prepared.directory / "genesis.json").read_bytes()
    keys = {each.key for each in prepared.members} | {each.owner for each in prepared.members}
    assert len(keys) == 2 * len(prepared.members)


def test_without_a_seed_keys_are_fresh(tmp_path: Path) -> None:
    small = load_manifest("small")
    one, two = (prepare(small, tmp_path / name, time_ms=1) for name in ("one", "two"))
    assert not {each.key for each in one.members} & {each.key for each in two.members}


def test_nobody_else_can_read_it(prepared: Prepared) -> None:
    assert stat.S_IMODE(prepared.directory.stat().st_mode) == 0o700
    for path in prepared.directory.glob("nodes/*/keys/*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_overwritten(manifest: Manifest, prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match="is not empty"):
        prepare(manifest, prepared.directory, time_ms=2)
    with pytest.raises(DataDirectoryError, match="holds no network"):
        load_prepared(tmp_path)
    assert not is_prepared(tmp_path)


def test_a_place_that_cannot_be_used_is_told(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataDirectoryError, match="is not a directory"):
        prepare(manifest, tmp_path / "file", time_ms=1)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataDirectoryError, match="cannot be written: No space left"):
        prepare(manifest, tmp_path / "full", time_ms=1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"network": "a", "members": [{}]}', '{"network": 1, "members": 1}'])
def test_a_damaged_directory_is_told(prepared: Prepared, text: str) -> None:
    (prepared.directory / "manifest.json").write_text(text)
    with pytest.raises(DataDirectoryError, match=r"manifest\.json"):
        load_prepared(prepared.directory)
