"""The configuration: every setting documented, everything unknown refused, one order of precedence."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import ConfigError
from node.config import Config, config_text, load_config, setting_keys, write_config, write_default_config

PEER = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"


def load(tmp_path: Path, text: str, environ: dict[str, str] | None = None, **flags: object) -> Config:
    (tmp_path / "config.toml").write_text(text)
    return load_config(tmp_path, environ or {}, {key.replace("__", "."): value for key, value in flags.items()})


def test_without_a_file_everything_has_its_default(tmp_path: Path) -> None:
    config = load_config(tmp_path, {})
    assert config == Config(tmp_path)
    assert config.node.roles == ("client",)
    assert config.api.host == "127.0.0.1"
    assert config.provider.cpu_cores is None
    assert config.genesis_path == tmp_path / "genesis.json"
    assert config.ledger_path == tmp_path / "ledger.sqlite"
    assert config.keys_path == tmp_path / "keys"


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"""
        [node]
        roles = ["provider", "checker"]
        name = "Döner ⚙"
        wallet = "cold-1"
        [network]
        genesis = "/etc/kaisar/genesis.json"
        listen = ["/ip4/127.0.0.1/tcp/0", "/ip6/::/udp/4001/quic-v1"]
        join = ["{PEER}"]
        [ledger]
        kind = "embedded"
        path = "../shared/ledger.sqlite"
        poll_s = 0.25
        [api]
        host = "::1"
        port = 8080
        [provider]
        runtime = "process"
        price_kai_per_hour = "0.000000000000000001"
        cpu_cores = 2
        memory_mb = 2048
        gpus = 0
        max_leases = 1
        [log]
        level = "debug"
        json = true
        """,
    )
    assert config.node.roles == ("provider", "checker")
    assert config.node.name == "Döner ⚙"
    assert config.network.join == (PEER,)
    assert config.genesis_path == Path("/etc/kaisar/genesis.json")
    assert config.ledger_path == tmp_path / "../shared/ledger.sqlite"
    assert config.ledger.poll_s == 0.25
    assert config.provider.price_planck_per_hour == 1
    assert (config.provider.cpu_cores, config.provider.gpus) == (2, 0)
    assert config.log.json is True


def test_flag_wins_over_variable_over_file_over_default(tmp_path: Path) -> None:
    text = "[api]\nport = 1\n[log]\nlevel = 'error'\n[provider]\nmax_leases = 2"
    environ = {"KAISAR_API_PORT": "2", "KAISAR_LOG_LEVEL": "debug"}
    config = load(tmp_path, text, environ, api__port=3)
    assert (config.api.port, config.log.level, config.provider.max_leases) == (3, "debug", 2)


@pytest.mark.parametrize(
    ("variable", "raw", "key", "value"),
    [
        ("KAISAR_NODE_ROLES", "provider, checker", "node.roles", ("provider", "checker")),
        ("KAISAR_NODE_ROLES", "", "node.roles", ()),
        ("KAISAR_NETWORK_JOIN", PEER, "network.join", (PEER,)),
        ("KAISAR_LEDGER_POLL_S", "0.1", "ledger.poll_s", 0.1),
        ("KAISAR_LOG_JSON", "TRUE", "log.json", True),
        ("KAISAR_LOG_JSON", "0", "log.json", False),
        ("KAISAR_PROVIDER_GPUS", "0", "provider.gpus", 0),
        ("KAISAR_PROVIDER_GPUS", "auto", "provider.gpus", None),
        ("KAISAR_PROVIDER_PRICE_KAI_PER_HOUR", "2.5", "provider.price_kai_per_hour", "2.5"),
        ("KAISAR_API_PORT", "8080", "api.port", 8080),
    ],
)
def test_variables_say_every_kind_of_value(tmp_path: Path, variable: str, raw: str, key: str, value: object) -> None:
    section, name = key.split(".")
    assert getattr(getattr(load_config(tmp_path, {variable: raw}), section), name) == value


def test_other_variables_do_not_matter(tmp_path: Path) -> None:
    environ = {"KAISAR_HOME": "/x", "KAISAR_PASSPHRASE": "x", "KAISAR_NODES": "x", "HOME": "/root"}
    assert load_config(tmp_path, environ) == Config(tmp_path)


@pytest.mark.parametrize(
    ("text", "unknown", "hint"),
    [
        ("[api]\nprot = 1", "key 'prot' in [api]", "did you mean port?"),
        ("[provdier]\n", "section [provdier]", "did you mean provider?"),
        ("port = 1", "section [port]", "known are: node, network"),
        ("[log]\nzzz = 1", "key 'zzz' in [log]", "known are: level, json"),
        ("[api]\nHost = '127.0.0.1'", "key 'Host' in [api]", "did you mean host?"),
    ],
)
def test_unknown_keys_name_key_file_and_the_closest_known(tmp_path: Path, text: str, unknown: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.message == f"{tmp_path / 'config.toml'}: unknown {unknown}"
    assert caught.value.hint.startswith(hint)


def test_a_mistyped_variable_or_flag_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"KAISAR_API_PROT .*did you mean KAISAR_API_PORT\?"):
        load_config(tmp_path, {"KAISAR_API_PROT": "1"})
    with pytest.raises(ConfigError, match=r"the command line: unknown key 'prot' .*did you mean port\?"):
        load_config(tmp_path, {}, {"api.prot": 1})
    with pytest.raises(ConfigError, match=r"section \[nodes\] .*did you mean node\?"):
        load_config(tmp_path, {}, {"nodes.roles": ()})


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("node", "roles", '"provider"', "a list of roles"),
        ("node", "roles", '["miner"]', "one of provider, checker"),
        ("node", "roles", '["client", "client"]', "each one once"),
        ("node", "roles", "[1]", "one of provider, checker"),
        ("node", "name", '"' + "x" * 33 + '"', "at most 32"),
        ("node", "name", '"a\\nb"', "at most 32 printable"),
        ("node", "wallet", '"../x"', "a wallet name"),
        ("network", "genesis", "1", "a path"),
        ("network", "genesis", '""', "a path"),
        ("network", "listen", '["0.0.0.0:4001"]', "a multiaddr to listen on"),
        ("network", "listen", '["/ip4/::1/tcp/1"]', "a multiaddr to listen on"),
        ("network", "listen", '["/ip4/1.2.3.4/tcp/65536"]', "a multiaddr to listen on"),
        ("network", "join", '["/ip4/1.2.3.4/tcp/1"]', "a peer's multiaddr with its id"),
        ("ledger", "kind", '"peaq"', "one of embedded"),
        ("ledger", "poll_s", "0", "a number from 0.05 to 60"),
        ("ledger", "poll_s", "nan", "a number from 0.05 to 60"),
        ("ledger", "poll_s", "true", "a number from 0.05 to 60"),
        ("api", "host", '"0.0.0.0"', "a loopback address"),
        ("api", "host", '"192.168.1.2"', "a loopback address"),
        ("api", "host", '"example.org"', "a loopback address"),
        ("api", "port", "65536", "a whole number from 0 to 65535"),
        ("api", "port", "-1", "a whole number from 0 to 65535"),
        ("api", "port", '"80"', "a whole number from 0 to 65535"),
        ("api", "port", "80.0", "a whole number from 0 to 65535"),
        ("api", "port", "true", "a whole number from 0 to 65535"),
        ("provider", "price_kai_per_hour", "0.1", "an amount of KAI in quotes"),
        ("provider", "price_kai_per_hour", '"-1"', "an amount of KAI in quotes"),
        ("provider", "cpu_cores", '"all"', '"auto" or a whole number'),
        ("provider", "cpu_cores", "0", '"auto" or a whole number'),
        ("log", "json", '"yes"', "true or false"),
        ("log", "level", '"loud"', "one of debug, info"),
    ],
)
def test_wrong_values_say_what_they_must_be(tmp_path: Path, section: str, key: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"[{section}]\n{key} = {value}")
    assert caught.value.message.startswith(f"{tmp_path / 'config.toml'}: {section}.{key} must be ")
    assert expected in caught.value.message
    assert caught.value.hint.startswith("it is ")


@pytest.mark.parametrize(
    ("variable", "raw"),
    [
        ("KAISAR_API_PORT", "eighty"),
        ("KAISAR_API_PORT", "9" * 5000),
        ("KAISAR_API_PORT", "99999"),
        ("KAISAR_LEDGER_POLL_S", "1e-3"),
        ("KAISAR_LOG_JSON", "maybe"),
        ("KAISAR_PROVIDER_GPUS", ""),
        ("KAISAR_API_HOST", "0.0.0.0"),
    ],
)
def test_wrong_variables_are_named(tmp_path: Path, variable: str, raw: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable}.* must be ") as caught:
        load_config(tmp_path, {variable: raw})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["[api", "[api]\nport = ", "[api]\nport = 1\nport = 2", "a = " + "[" * 5000])
def test_what_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(tmp_path, text)


def test_a_section_written_as_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api must be a section"):
        load(tmp_path, "api = 1")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(tmp_path, {})
    path.write_bytes(b"#" * 300_000)
    with pytest.raises(ConfigError, match="is over 262144 bytes"):
        load_config(tmp_path, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, {})


# The written file


def test_the_written_file_documents_every_setting_and_changes_none(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    write_default_config(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_config(tmp_path, {}) == Config(tmp_path)
    lines = path.read_text().splitlines()
    section, documented = "", []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("["):
            section = line[1 : line.index("]")]
        elif line.startswith("# ") and line[2:].split(" = ")[0].isidentifier() and " = " in line:
            documented.append(f"{section}.{line[2:].split(' = ')[0]}")
            assert before.startswith("# "), f"{documented[-1]} has no description"
    assert documented == setting_keys()
    assert len(documented) == len(set(documented)) == 25


def test_the_shown_defaults_are_the_defaults(tmp_path: Path) -> None:
    write_default_config(tmp_path / "config.toml")
    path = tmp_path / "config.toml"
    shown = [line.removeprefix("# ") if " = " in line else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(shown))
    assert load_config(tmp_path, {}) == Config(tmp_path)
    assert set(tomllib.loads(path.read_text())) == {key.split(".")[0] for key in setting_keys()}


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("# mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_default_config(path)
    assert path.read_text() == "# mine"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_default_config(tmp_path / "none" / "config.toml")


@given(
    name=st.text(max_size=32).filter(str.isprintable),
    path=st.text(min_size=1, max_size=40).filter(lambda value: "\0" not in value and value.isprintable()),
    port=st.integers(0, 65535),
    gpus=st.none() | st.integers(0, 256),
    poll_s=st.floats(0.05, 60),
    join=st.sampled_from([(), (PEER,)]),
    json=st.booleans(),
)
def test_whatever_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, **values: object) -> None:
    directory = tmp_path_factory.mktemp("config")
    sections = {"name": "node", "path": "ledger", "port": "api", "gpus": "provider", "poll_s": "ledger"}
    keys = {f"{sections.get(key, 'network' if key == 'join' else 'log')}.{key}": values[key] for key in values}
    config = Config(directory).with_settings(keys)
    write_config(directory / "config.toml", config)
    assert load_config(directory, {}) == config
    assert config_text(config).isprintable() or "\n" in config_text(config)
