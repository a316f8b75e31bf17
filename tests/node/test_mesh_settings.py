"""The node's [network] section becomes the mesh's configuration; whatever cannot be used is told."""

from __future__ import annotations

import stat
from dataclasses import fields
from pathlib import Path

import pytest

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.mesh import MeshLimits
from node.config import Config, load_config, write_config
from node.mesh_settings import _MAY_BE_ZERO, mesh_config, mesh_limits
from node.settings import Table
from tests.node.command_line import command_line

KEY = "/key/swarm/psk/1.0.0/\n/base16/\n" + "ab" * 32 + "\n"


def load(tmp_path: Path, text: str, **environ: str) -> Config:
    (tmp_path / "config.toml").write_text(text)
    return load_config(tmp_path, environ)


def test_by_default_the_mesh_has_its_own_defaults(tmp_path: Path) -> None:
    found = mesh_config(Config(tmp_path), "abc")
    assert found.limits == MeshLimits()
    assert (found.network, found.listen) == ("abc", ("/ip4/0.0.0.0/tcp/4001",))
    assert (found.relay, found.upnp, found.mdns, found.pre_shared_key, found.announce) == (None, None, None, None, ())


def test_everything_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / "swarm.key").write_text(KEY)
    text = """
        [network]
        announce = ["/dns4/node.example.org/tcp/443", "/ip6/2001:db8::1/tcp/4001"]
        pre_shared_key_file = "swarm.key"
        relay = false
        upnp = true
        mdns = "auto"
        [network.limits]
        connections = 300
        dial_s = 2.5
        reach_helpers = 0
    """
    found = mesh_config(load(tmp_path, text), "abc")
    assert found.announce == ("/dns4/node.example.org/tcp/443", "/ip6/2001:db8::1/tcp/4001")
    assert found.pre_shared_key == bytes.fromhex("ab" * 32)
    assert (found.relay, found.upnp, found.mdns) == (False, True, None)
    assert (found.limits.connections, found.limits.dial_s, found.limits.reach_helpers) == (300, 2.5, 0)
    assert found.limits.keepalive_s == MeshLimits().keepalive_s


def test_variables_say_the_same(tmp_path: Path) -> None:
    environ = {
        "KAISAR_NETWORK_LIMITS": "connections=300, dial_s=2.5",
        "KAISAR_NETWORK_UPNP": "no",
        "KAISAR_NETWORK_MDNS": "auto",
        "KAISAR_NETWORK_RELAY": "true",
    }
    config = load_config(tmp_path, environ)
    assert config.network.limits == Table((("connections", 300), ("dial_s", 2.5)))
    assert (config.network.upnp, config.network.mdns, config.network.relay) == (False, None, True)


def test_a_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    settings = {"network.limits": {"dial_s": 2.5, "connections": 300}, "network.upnp": False, "network.relay": "auto"}
    config = Config(tmp_path).with_settings(settings)
    write_config(tmp_path / "config.toml", config)
    assert load_config(tmp_path, {}) == config


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("[network.limits]\nconections = 3", "there is no limit 'conections'", "did you mean connections?"),
        ("[network.limits]\nzzz = 3", "there is no limit 'zzz'", "docs/mesh.md lists them"),
        ("[network.limits]\nconnections = 0", "connections must be a whole number of at least 1", "it is 0"),
        ("[network.limits]\nconnections = 2.5", "connections must be a whole number", "it is 2.5"),
        ("[network.limits]\nconnections = -3", "connections must be a whole number of at least 1", "it is -3"),
        ("[network.limits]\ndial_s = 0", "dial_s must be a number of at least 0.001", "it is 0"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(tmp_path: Path, text: str, cause: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mesh_config(load(tmp_path, text), "abc")
    assert cause in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "limits = 3",
        "limits = { dial_s = 'long' }",
        "limits = { dial_s = true }",
        "limits = { dial_s = nan }",
        "limits = { dial_s = inf }",
        "upnp = 'perhaps'",
        "relay = 1",
        "announce = ['/ip4/1.2.3.4']",
        "announce = ['/ip4/1.2.3.4/udp/1']",
        "announce = ['/ip4/1.2.3.4/tcp/99999']",
        "announce = ['/ip4/1.2.3.4/tcp/0']",
        "announce = ['/ip4/1.2.3.400/tcp/1']",
        "pre_shared_key_file = 3",
    ],
)
def test_a_value_of_the_wrong_kind_names_the_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"network.{text.split()[0]} must be"):
        load(tmp_path, f"[network]\n{text}")


@pytest.mark.parametrize("raw", ["connections", "connections=", "=3", "a b=3", "connections=1e9"])
def test_a_variable_with_a_broken_table_is_refused(tmp_path: Path, raw: str) -> None:
    with pytest.raises(ConfigError, match="KAISAR_NETWORK_LIMITS must be"):
        load_config(tmp_path, {"KAISAR_NETWORK_LIMITS": raw})


def test_every_limit_can_be_set() -> None:
    for one in fields(MeshLimits):
        assert getattr(mesh_limits(Table(((one.name, 7),))), one.name) == 7
    assert {one.name for one in fields(MeshLimits)} >= _MAY_BE_ZERO


@pytest.mark.parametrize("content", ["", "garbage", KEY.replace("ab", "xy"), KEY[:-10], "ff" * 32])
def test_a_broken_key_file_is_named_and_not_quoted(tmp_path: Path, content: str) -> None:
    (tmp_path / "swarm.key").write_text(content)
    with pytest.raises(ConfigError, match=r"swarm\.key: this is not a pre-shared key") as caught:
        mesh_config(load(tmp_path, "[network]\npre_shared_key_file = 'swarm.key'"), "abc")
    assert not content or content not in str(caught.value)


def test_a_missing_key_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        mesh_config(load(tmp_path, "[network]\npre_shared_key_file = 'swarm.key'"), "abc")


def test_a_private_swarm_is_made_with_a_key_only_its_owner_reads(tmp_path: Path) -> None:
    kaisar = command_line()
    home = tmp_path / "node"
    assert kaisar("init", "--no-passphrase", "--private", "--data-dir", str(home)).code == 0
    key = home / "swarm.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    found = mesh_config(load_config(home, {}), "abc")
    assert found.pre_shared_key is not None and found.pre_shared_key.hex() in key.read_text()
    second = tmp_path / "second"
    assert kaisar("init", "--no-passphrase", "--swarm-key", str(key), "--data-dir", str(second)).code == 0
    assert mesh_config(load_config(second, {}), "abc").pre_shared_key == found.pre_shared_key


def test_a_key_of_a_private_swarm_never_replaces_a_file(tmp_path: Path) -> None:
    kaisar, path = command_line(), tmp_path / "swarm.key"
    assert kaisar("network", "key").out.startswith("/key/swarm/psk/1.0.0/\n/base16/\n")
    assert kaisar("network", "key", "--output", str(path)).code == 0
    before = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = kaisar("network", "key", "--output", str(path))
    assert (again.code, path.read_text()) == (4, before)


def test_init_takes_one_kind_of_key(tmp_path: Path) -> None:
    kaisar = command_line()
    home, other = tmp_path / "node", tmp_path / "other"
    other.write_text("garbage")
    for arguments in (("--private", "--swarm-key", str(other)), ("--swarm-key", str(other))):
        assert kaisar("init", "--no-passphrase", *arguments, "--data-dir", str(home)).code == 4
        assert not home.exists()
