"""From the node's configuration to the mesh's: limits by their names, the key of a private swarm."""

from __future__ import annotations

from dataclasses import Field, fields, replace
from pathlib import Path

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.mesh import MeshConfig, MeshLimits
from kaisar_p2p.mesh.transport.pnet import parse_key
from node.config import Config
from node.settings import Table, closest

KEY_FILE_BYTES = 4096
MOST = 1 << 40

_MAY_BE_ZERO = {
    "target_peers", "outbound_reserved", "lan_peers", "reach_helpers", "dialbacks", "relays", "relay_reservations",
    "relay_circuits", "flush_s", "relay_stranger_bytes",
}  # fmt: skip


def mesh_config(config: Config, network: str) -> MeshConfig:
    """What the configuration says about the mesh of a network; ConfigError for what cannot be used."""
    section = config.network
    return MeshConfig(
        listen=section.listen,
        network=network,
        announce=section.announce,
        pre_shared_key=pre_shared_key(config.pre_shared_key_path),
        relay=section.relay,
        upnp=section.upnp,
        mdns=section.mdns,
        limits=mesh_limits(section.limits),
    )


def mesh_limits(table: Table) -> MeshLimits:
    """The default limits with those of a table in their place."""
    known = {one.name: one for one in fields(MeshLimits)}
    changes: dict[str, int | float] = {}
    for name, value in table.items:
        if name not in known:
            like = closest(name, known)
            hint = f"did you mean {like}?" if like else "docs/mesh.md lists them"
            raise ConfigError(f"there is no limit {name[:40]!r} in [network.limits]", hint=hint)
        changes[name] = _checked(known[name], value)
    return replace(MeshLimits(), **changes)  # type: ignore[arg-type]


def _checked(one: Field[object], value: int | float) -> int | float:
    whole = one.type == "int"
    least = 0 if one.name in _MAY_BE_ZERO else 1 if whole else 0.001
    if not least <= value <= MOST or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"network.limits.{one.name} must be {kind} of at least {least}", hint=f"it is {value}")
    return int(value) if whole else float(value)


def pre_shared_key(path: Path | None) -> bytes | None:
    """The 32 bytes in a key file; None for no file. ConfigError says what is wrong with it."""
    return read_swarm_key(path) if path is not None else None


def read_swarm_key(path: Path) -> bytes:
    """The 32 bytes in a key file; ConfigError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            text = file.read(KEY_FILE_BYTES).decode("ascii", "replace")
    except OSError as error:
        raise ConfigError(
            f"the key of the private swarm, {path}, cannot be read: {error.strerror}",
            hint="copy it from another node of the swarm, or set network.pre_shared_key_file",
        ) from None
    try:
        return parse_key(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
