"""The node's configuration: `<data directory>/config.toml`, variables `KAISAR_<SECTION>_<KEY>`, command-line flags.

A flag wins over a variable, a variable over the file, the file over the default. Whatever is not known is an
error: a mistyped key must not silently mean its default. The dataclasses below are the only list of settings; the
parser, the variables and the written file all come from them.
"""

from __future__ import annotations

import os
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.identity.keyfile import NAME as WALLET_NAME
from kaisar_p2p.wire.money import kai_to_planck
from node import settings as kinds
from node.datadir import (
    check_data_directory,
    create_data_directory,
    lock_data_directory,
    resolve_data_directory,
)
from node.passphrase import read_passphrase
from node.settings import Kind, closest, setting, to_toml

__all__ = [
    "CONFIG_FILE",
    "ROLES",
    "ApiSection",
    "Config",
    "LedgerSection",
    "LogSection",
    "NetworkSection",
    "NodeSection",
    "ProviderSection",
    "check_data_directory",
    "create_data_directory",
    "load_config",
    "lock_data_directory",
    "read_passphrase",
    "resolve_data_directory",
    "setting_keys",
    "write_config",
    "write_default_config",
]

CONFIG_FILE = "config.toml"
MAX_CONFIG_BYTES = 256 * 1024

Role = Literal["provider", "checker", "client", "explorer", "bootstrap"]
ROLES: tuple[Role, ...] = ("provider", "checker", "client", "explorer", "bootstrap")

_FILE = kinds.text("a path", lambda value: value != "" and "\0" not in value)


@dataclass(frozen=True)
class NodeSection:
    """Who this node is."""

    roles: tuple[Role, ...] = setting(
        kinds.text_list(kinds.choice(*ROLES), "a list of roles: " + ", ".join(ROLES)),
        ("client",),
        "What the node does: provider rents out this machine, checker certifies providers, client orders,"
        " explorer serves the pages, bootstrap introduces peers. `kaisar run --role` takes its place.",
    )
    name: str = setting(
        kinds.text("at most 32 printable characters", lambda value: len(value) <= 32 and value.isprintable()),
        "",
        "A name for people, shown in logs and on pages; empty for none. It identifies nothing.",
    )
    wallet: str = setting(
        kinds.text("a wallet name: a-z, 0-9, _ and -", lambda value: WALLET_NAME.fullmatch(value) is not None),
        "main",
        "The owner wallet that stakes, earns and pays; `kaisar wallet list` shows those there are.",
    )


@dataclass(frozen=True)
class NetworkSection:
    """Which network, and how to reach it."""

    genesis: str = setting(
        _FILE, "genesis.json", "The network's genesis file; a relative path starts at the data directory."
    )
    listen: tuple[str, ...] = setting(
        kinds.text_list(kinds.listen_multiaddr(), "a list of multiaddrs"),
        ("/ip4/0.0.0.0/tcp/4001",),
        "Addresses to listen on for peers; port 0 picks a free one.",
    )
    join: tuple[str, ...] = setting(
        kinds.text_list(kinds.peer_multiaddr(), "a list of peers' multiaddrs"),
        (),
        "Peers to meet first, besides the bootstrap records on the ledger. `kaisar run --join` adds to it.",
    )
    announce: tuple[str, ...] = setting(
        kinds.text_list(kinds.announced_multiaddr(), "a list of multiaddrs"),
        (),
        "Addresses to tell others instead of those that are found: behind a port that you forward yourself.",
    )
    pre_shared_key_file: str = setting(
        kinds.text("a path, or empty for none", lambda value: "\0" not in value),
        "",
        "The key of a private swarm: only nodes with the same key connect. A relative path starts at the data"
        " directory; `kaisar network key` makes one.",
    )
    relay: bool | None = setting(
        kinds.boolean_or_auto(),
        None,
        'Carry connections of nodes that cannot be reached; "auto": when this node can be reached itself.',
    )
    upnp: bool | None = setting(
        kinds.boolean_or_auto(),
        None,
        'Ask the router to forward the port; "auto": when the node listens on private addresses.',
    )
    mdns: bool | None = setting(
        kinds.boolean_or_auto(),
        None,
        'Look for peers on the local network; "auto": when the node listens on more than loopback.',
    )
    limits: kinds.Table = setting(  # noqa: RUF009  (a table is frozen)
        kinds.table(),
        kinds.Table(),
        "What peers may use of this node, as a table [network.limits]: every bound in docs/mesh.md by its name.",
    )


@dataclass(frozen=True)
class LedgerSection:
    """The ledger that orders everything."""

    kind: Literal["embedded"] = setting(
        kinds.choice("embedded"), "embedded", "embedded: an SQLite file that the nodes of one machine share."
    )
    path: str = setting(
        _FILE, "ledger.sqlite", "The embedded ledger's file; a relative path starts at the data directory."
    )
    poll_s: float = setting(kinds.number(0.05, 60), 0.5, "Seconds between two looks for new finalized blocks.")


@dataclass(frozen=True)
class ApiSection:
    """The API that the `kaisar` commands and the pages use."""

    host: str = setting(kinds.loopback_host(), "127.0.0.1", "A loopback address; no other is accepted.")
    port: int = setting(
        kinds.integer(0, 65535), 0, "0 picks a free port; the one in use is written to the data directory."
    )


@dataclass(frozen=True)
class ProviderSection:
    """What a provider offers."""

    runtime: Literal["auto", "docker", "process"] = setting(
        kinds.choice("auto", "docker", "process"),
        "auto",
        "docker isolates tenants; process does not and is for development only; auto takes docker if it answers.",
    )
    price_kai_per_hour: str = setting(
        kinds.kai(), "1", "Price of the whole machine for an hour, in KAI, in quotes, at most 18 decimals."
    )
    cpu_cores: int | None = setting(
        kinds.integer_or_auto(1, 4096), None, 'Cores to offer; "auto" for all that are found.'
    )
    memory_mb: int | None = setting(
        kinds.integer_or_auto(64, 1 << 26), None, 'Megabytes of memory to offer; "auto" for what is found.'
    )
    gpus: int | None = setting(
        kinds.integer_or_auto(0, 256), None, 'GPUs to offer; "auto" for all that are found, 0 for none.'
    )
    max_leases: int = setting(kinds.integer(1, 1000), 4, "Leases that may run at the same time.")

    @property
    def price_planck_per_hour(self) -> int:
        """The price in planck, exact."""
        return kai_to_planck(self.price_kai_per_hour)


@dataclass(frozen=True)
class LogSection:
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        kinds.choice("debug", "info", "warning", "error"), "info", "debug, info, warning or error."
    )
    json: bool = setting(kinds.boolean(), False, "One JSON object a line instead of text.")


@dataclass(frozen=True)
class Config:
    """Everything that can be set, and the data directory it was set for."""

    data_directory: Path
    node: NodeSection = field(default_factory=NodeSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    ledger: LedgerSection = field(default_factory=LedgerSection)
    api: ApiSection = field(default_factory=ApiSection)
    provider: ProviderSection = field(default_factory=ProviderSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def genesis_path(self) -> Path:
        """The genesis file."""
        return self.data_directory / os.path.expanduser(self.network.genesis)

    @property
    def pre_shared_key_path(self) -> Path | None:
        """The file with the key of a private swarm; None for an open one."""
        file = self.network.pre_shared_key_file
        return self.data_directory / os.path.expanduser(file) if file else None

    @property
    def ledger_path(self) -> Path:
        """The embedded ledger's file."""
        return self.data_directory / os.path.expanduser(self.ledger.path)

    @property
    def keys_path(self) -> Path:
        """The keystore's directory."""
        return self.data_directory / "keys"

    def with_settings(self, values: Mapping[str, object], source: str = "the command line") -> Config:
        """A copy with settings such as `{"node.roles": ["provider"]}` replaced; `source` is named in errors."""
        config = self
        for key, value in values.items():
            section, _, name = key.partition(".")
            config = _with_setting(config, section, name, value, source)
        return config


_SECTIONS: dict[str, type] = {
    "node": NodeSection,
    "network": NetworkSection,
    "ledger": LedgerSection,
    "api": ApiSection,
    "provider": ProviderSection,
    "log": LogSection,
}


def load_config(
    data_directory: Path, environ: Mapping[str, str] = os.environ, flags: Mapping[str, object] | None = None
) -> Config:
    """The configuration in force. `flags` are settings such as `{"api.port": 8000}`; a missing file means defaults.

    ConfigError names the source, the key and the closest known key, or what the value must be.
    """
    path = data_directory / CONFIG_FILE
    config = Config(data_directory)
    for section, table in _read_tables(path):
        for name, value in table.items():
            config = _with_setting(config, section, name, value, str(path))
    for variable, section, name in _variables(environ):
        config = _with_setting(config, section, name, _from_text(variable, environ[variable], section, name), variable)
    return config.with_settings(flags or {})


def setting_keys() -> list[str]:
    """Every setting as `section.key`, in the order of the written file."""
    return [f"{section}.{one.name}" for section in _SECTIONS for one in _settings(section)]


def write_default_config(path: Path) -> None:
    """Write a file that documents every setting and changes none; ConfigError when it exists."""
    write_config(path, Config(path.parent))


def write_config(path: Path, config: Config) -> None:
    """Write a file (mode 0600) that documents every setting; those at their default are commented out.

    It is never written over another: ConfigError when it exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(config_text(config))
    except FileExistsError:
        raise ConfigError(f"{path} exists already", hint="edit it, or move it away first") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="check free space and rights") from None


def config_text(config: Config) -> str:
    """The TOML text that `write_config` writes."""
    lines = [
        "# Kaisar node. A line that begins with # is a comment; below, each shows a default.",
        "# A variable KAISAR_<SECTION>_<KEY> takes the place of a line here, a command-line flag that of both.",
    ]
    for section in _SECTIONS:
        lines += ["", f"[{section}]  # {(_SECTIONS[section].__doc__ or '').strip()}"]
        for one in _settings(section):
            lines += ["", *textwrap.wrap(one.metadata["doc"], 100, initial_indent="# ", subsequent_indent="# ")]
            value = getattr(getattr(config, section), one.name)
            lines.append(f"{'# ' if value == one.default else ''}{one.name} = {to_toml(value)}")
    return "\n".join(lines) + "\n"


def _settings(section: str) -> tuple[Field[object], ...]:
    return fields(_SECTIONS[section])


def _read_tables(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for section, table in _read_toml(path).items():
        if section not in _SECTIONS:
            raise _unknown(str(path), f"section [{section}]", section, _SECTIONS)
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} must be a section", hint=f"write [{section}] on a line of its own")
        yield section, table


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="check its owner and rights") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is over {MAX_CONFIG_BYTES} bytes", hint="a configuration has a few lines")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint="texts need quotes, lists brackets") from None


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Variable, section and key of each variable that begins like a setting's."""
    for variable in sorted(environ):
        for section in _SECTIONS:
            prefix = f"KAISAR_{section.upper()}_"
            if variable.startswith(prefix):
                yield variable, section, variable.removeprefix(prefix).lower()


def _from_text(variable: str, raw: str, section: str, name: str) -> object:
    known = {f"KAISAR_{section.upper()}_{one.name.upper()}": one for one in _settings(section)}
    if variable not in known:
        raise _unknown("the environment", f"variable {variable}", variable, known)
    try:
        return _kind(known[variable]).from_text(raw)
    except ValueError as error:
        raise ConfigError(f"{variable} must be {error}", hint=f"it is {raw[:60]!r}") from None


def _with_setting(config: Config, section: str, name: str, value: object, source: str) -> Config:
    if section not in _SECTIONS:
        raise _unknown(source, f"section [{section}]", section, _SECTIONS)
    known = {one.name: one for one in _settings(section)}
    if name not in known:
        raise _unknown(source, f"key {name!r} in [{section}]", name, known)
    try:
        parsed = _kind(known[name]).parse(value)
    except ValueError as error:
        raise ConfigError(f"{source}: {section}.{name} must be {error}", hint=f"it is {value!r:.60}") from None
    return replace(config, **{section: replace(getattr(config, section), **{name: parsed})})


def _kind(one: Field[object]) -> Kind:
    kind = one.metadata["kind"]
    assert isinstance(kind, Kind)
    return kind


def _unknown(source: str, what: str, word: str, known: Iterable[str]) -> ConfigError:
    like = closest(word, known)
    hint = f"did you mean {like}?" if like else "known are: " + ", ".join(known)
    return ConfigError(f"{source}: unknown {what}", hint=hint)
