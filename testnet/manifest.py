"""A manifest describes a network in one TOML file: parameters, who takes part, what they own, what is wrong with them.

::

    name = "small"                      # names the network and its default directory
    preset = "demo"                     # of protocols/params.py; [params] changes single numbers of it
    seed = 7                            # optional: the same keys every time; without it, fresh ones

    [settings.ledger]                   # what every node's config.toml says besides its defaults
    poll_s = 0.2

    [[node]]
    name = "checker"                    # with count = 4: checker-1 … checker-4
    roles = ["checker"]
    count = 4
    balance_kai = "1000"
    [node.settings.provider]            # what only these nodes' config.toml says
    price_kai_per_hour = "3.6"
    [node.faults]                       # adversaries: what KAISAR_FAULT_<NAME> in the node's environment does
    wrong_tiles = 1

    [[allocation]]                      # more accounts of the genesis document
    account = "<64 hex digits>"
    balance_kai = "5"

Whatever is not known is an error that names the closest known word.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.wire.money import kai_to_planck
from node import settings as kinds
from node.config import ROLES, Config, Role
from node.settings import Kind, closest, setting
from protocols.genesis import Genesis
from protocols.params import PRESETS, Params

MAX_MANIFEST_BYTES = 256 * 1024
MAX_NODES = 256
FAULTS = ("wrong_tiles",)
"""Faults that a node knows: `wrong_tiles` is the number of tiles that a worker computes wrongly in each check."""
_OURS = ("node.roles", "node.name", "node.wallet", "network.genesis", "ledger.path", "ledger.kind")
"""Settings that the swarm writes itself."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,27}")
_name = kinds.text("a name: at most 28 of a-z, 0-9 and -", lambda value: _NAME.fullmatch(value) is not None)


def _table(expected: str, value_of: Kind | None = None) -> Kind:
    """A TOML table as pairs; its values are parsed by `value_of`, or kept."""

    def parse(value: object) -> tuple[tuple[str, object], ...]:
        if not isinstance(value, dict):
            raise ValueError(expected)
        return tuple((key, value_of.parse(item) if value_of else item) for key, item in value.items())

    return Kind(expected, parse)


@dataclass(frozen=True)
class NodeEntry:
    """One kind of node, `count` times."""

    name: str = setting(_name, "", "Of the node, or of its kind when there are several.")
    roles: tuple[Role, ...] = setting(
        kinds.text_list(kinds.choice(*ROLES), "a list of roles: " + ", ".join(ROLES)), (), "What it does."
    )
    count: int = setting(kinds.integer(1, MAX_NODES), 1, "How many of them.")
    balance_kai: str = setting(kinds.kai(), "1000", "What its owner wallet has at the start.")
    points_kai: str = setting(kinds.kai(), "0", "Points that its owner wallet has at the start.")
    start: bool = setting(kinds.boolean(), True, "Whether `testnet up` starts it; false: only prepared.")
    settings: tuple[tuple[str, object], ...] = setting(_table("a table"), (), "For its config.toml.")
    faults: tuple[tuple[str, int], ...] = setting(
        _table("a table of whole numbers", kinds.integer(0, 1 << 31)), (), "What it does wrong."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its nodes."""
        if self.count == 1:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in range(1, self.count + 1))


@dataclass(frozen=True)
class AccountEntry:
    """An account that no node of the swarm owns."""

    account: str = setting(
        kinds.text("64 hex digits", lambda value: re.fullmatch("[0-9a-f]{64}", value) is not None), "", "Public key."
    )
    balance_kai: str = setting(kinds.kai(), "0", "What it has at the start.")
    points_kai: str = setting(kinds.kai(), "0", "Points that it has at the start.")


@dataclass(frozen=True)
class Manifest:
    """A network, as parsed; `settings` are config.toml's sections for every node."""

    name: str = setting(_name, "", "Of the network.")
    preset: str = setting(kinds.choice(*PRESETS), "demo", "Parameters to start from.")
    seed: int | None = setting(kinds.integer(0, (1 << 63) - 1), None, "Keys derive from it; none: fresh keys.")
    params: tuple[tuple[str, int], ...] = setting(
        _table("a table of whole numbers", kinds.integer(0, 1 << 100)), (), "Numbers that differ from the preset."
    )
    settings: tuple[tuple[str, object], ...] = setting(_table("a table"), (), "For every node's config.toml.")
    nodes: tuple[NodeEntry, ...] = field(default=())
    allocations: tuple[AccountEntry, ...] = field(default=())

    @property
    def network_params(self) -> Params:
        """The network's parameters; ConfigError for an unknown number, or one that cannot work."""
        return Genesis(self.name, self.preset, 0, overrides=self.params).params

    def members(self) -> Iterator[tuple[str, NodeEntry]]:
        """(name, entry) of every node, in the order in which they start: bootstrap nodes first."""
        for entry in sorted(self.nodes, key=lambda each: "bootstrap" not in each.roles):
            yield from ((name, entry) for name in entry.names)

    def settings_of(self, entry: NodeEntry) -> dict[str, object]:
        """`section.key` → value for the node's config.toml: the manifest's, then the entry's own."""
        return _flat(self.settings) | _flat(entry.settings)


def networks() -> list[str]:
    """The names of the manifests that are shipped."""
    return sorted(each.name.removesuffix(".toml") for each in files("testnet").joinpath("networks").iterdir())


def load_manifest(name_or_path: str) -> Manifest:
    """A shipped network by name, or a manifest file by path; ConfigError when there is neither."""
    shipped = files("testnet").joinpath("networks", f"{name_or_path}.toml")
    if _NAME.fullmatch(name_or_path) and shipped.is_file():
        return parse_manifest(shipped.read_text(encoding="utf-8"), name_or_path)
    path = Path(name_or_path).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        hint = f"networks here are {', '.join(networks())}; or pass the path of a manifest"
        raise ConfigError(f"no network {name_or_path!r}: {error.strerror}", hint=hint) from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"{path} is over {MAX_MANIFEST_BYTES} bytes", hint="a manifest has some lines")
    try:
        return parse_manifest(data.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", hint="see docs/testnet.md for an example") from None


def parse_manifest(text: str, source: str = "the manifest") -> Manifest:
    """Read a manifest; ConfigError names the place and what is wrong."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid TOML: {error}", hint="texts need quotes, lists brackets") from None
    entries, accounts = document.pop("node", []), document.pop("allocation", [])
    for key, value in (("node", entries), ("allocation", accounts)):
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise ConfigError(f"{source}: {key} must be a list of tables", hint=f"write [[{key}]] on a line of its own")
    manifest = Manifest(
        **_fields(Manifest, document, source, also=("node", "allocation")),
        nodes=tuple(NodeEntry(**_fields(NodeEntry, each, f"{source}, a node")) for each in entries),
        allocations=tuple(AccountEntry(**_fields(AccountEntry, each, f"{source}, an allocation")) for each in accounts),
    )
    _check(manifest, source)
    return manifest


def _fields(kind: type, table: Mapping[str, object], source: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    known: dict[str, Field[object]] = {one.name: one for one in fields(kind) if one.metadata}
    parsed: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise _unknown(source, "key", key, (*known, *also))
        try:
            parsed[key] = known[key].metadata["kind"].parse(value)
        except ValueError as error:
            raise ConfigError(f"{source}: {key} must be {error}", hint=f"it is {value!r:.60}") from None
    return parsed


def _flat(sections: tuple[tuple[str, object], ...]) -> dict[str, object]:
    return {
        f"{section}.{key}": value
        for section, table in sections
        for key, value in (table.items() if isinstance(table, dict) else ())
    }


def _check(manifest: Manifest, source: str) -> None:
    """What must hold between the parts."""
    _ = manifest.network_params
    names = [name for name, _ in manifest.members()]
    if not manifest.name:
        raise ConfigError(f"{source}: the network has no name", hint='begin with name = "my-net"')
    if not names or not all(entry.name and entry.roles for entry in manifest.nodes):
        raise ConfigError(f"{source}: every network has nodes, every node a name and roles", hint="add [[node]] tables")
    if len(names) > MAX_NODES:
        raise ConfigError(f"{source}: {len(names)} nodes", hint=f"at most {MAX_NODES}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{source}: two nodes are called {repeated[0]}", hint="give each entry a name of its own")
    if not any("bootstrap" in entry.roles and entry.start for entry in manifest.nodes):
        raise ConfigError(f"{source}: no node is a bootstrap", hint='add one with roles = ["bootstrap"]')
    if len({each.account for each in manifest.allocations}) != len(manifest.allocations):
        raise ConfigError(f"{source}: an account has two allocations", hint="add them up")
    for entry in manifest.nodes:
        _check_entry(manifest, entry, f"{source}, node {entry.name}")


def _check_entry(manifest: Manifest, entry: NodeEntry, source: str) -> None:
    for fault, _ in entry.faults:
        if fault not in FAULTS:
            raise _unknown(source, "fault", fault, FAULTS)
    for section, table in (*manifest.settings, *entry.settings):
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: settings.{section} must be a table", hint="write [node.settings.provider]")
    wanted = manifest.settings_of(entry)
    if taken := sorted(wanted.keys() & set(_OURS)):
        raise ConfigError(f"{source}: setting {taken[0]} is the swarm's own", hint="leave it out")
    Config(Path("/nowhere")).with_settings(wanted, source)


def total_points_planck(manifest: Manifest) -> int:
    """All points that the manifest hands out; the treasury backs them."""
    nodes = sum(kai_to_planck(entry.points_kai) * entry.count for entry in manifest.nodes)
    return nodes + sum(kai_to_planck(each.points_kai) for each in manifest.allocations)


def _unknown(source: str, what: str, word: str, known: tuple[str, ...]) -> ConfigError:
    like = closest(word, known)
    hint = f"did you mean {like}?" if like else "known are: " + ", ".join(known)
    return ConfigError(f"{source}: unknown {what} {word!r:.40}", hint=hint)
