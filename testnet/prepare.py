"""From a manifest to a directory that is ready to start: keys, configurations, genesis, one ledger file for all.

::

    <directory>/manifest.json  ledger.sqlite  genesis.json  logs/<node>.log  swarm.json (while it runs)
    <directory>/nodes/<node>/  config.toml  keys/          (what `kaisar init` makes)

Keys have no passphrase: whoever can read the directory can spend what the network's wallets hold, which is nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from kaisar_p2p.errors import DataDirectoryError
from kaisar_p2p.identity import Keystore, Scheme
from kaisar_p2p.ledger import ChainParameters, EmbeddedLedger
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.money import kai_to_planck
from node.config import CONFIG_FILE, Config, create_data_directory, write_config
from protocols.genesis import Allocation, Genesis, write_genesis
from testnet.manifest import Manifest, NodeEntry, total_points_planck

PREPARED_FILE = "manifest.json"
LEDGER_FILE = "ledger.sqlite"
GENESIS_FILE = "genesis.json"
NODES = "nodes"
LOGS = "logs"
WALLET = "main"


@dataclass(frozen=True)
class Member:
    """A node of a prepared swarm."""

    name: str
    roles: tuple[str, ...]
    key: str
    owner: str
    start: bool
    faults: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Prepared:
    """A directory that holds a network; `members` in the order in which they start."""

    directory: Path
    network: str
    members: tuple[Member, ...]

    def data_directory(self, name: str) -> Path:
        """A node's data directory."""
        return self.directory / NODES / name

    def log_path(self, name: str) -> Path:
        """Where a node's log goes."""
        return self.directory / LOGS / f"{name}.log"


def is_prepared(directory: Path) -> bool:
    """Whether `directory` holds a network."""
    return (directory / PREPARED_FILE).is_file()


def prepare(manifest: Manifest, directory: Path, *, time_ms: int) -> Prepared:
    """Make everything that the network needs; `time_ms` is the genesis block's Unix time.

    The manifest's copy is written last, so a directory that has one is complete. DataDirectoryError when something is
    there already.
    """
    if directory.is_dir() and any(path.name != "swarm.lock" for path in directory.iterdir()):
        raise DataDirectoryError(f"{directory} is not empty", hint="remove it, or pass another --directory")
    create_data_directory(directory)
    try:
        return _fill(manifest, directory, time_ms)
    except OSError as error:
        hint = "remove the directory; check free space and rights"
        raise DataDirectoryError(f"{directory} cannot be written: {error.strerror}", hint=hint) from None


def _fill(manifest: Manifest, directory: Path, time_ms: int) -> Prepared:
    for name in (NODES, LOGS):
        (directory / name).mkdir(mode=0o700)
    members: list[Member] = []
    allocations = [
        Allocation(bytes.fromhex(each.account), kai_to_planck(each.balance_kai), kai_to_planck(each.points_kai))
        for each in manifest.allocations
    ]
    for name, entry in manifest.members():
        member = _prepare_node(manifest, entry, name, directory / NODES / name)
        members.append(member)
        balance, points = kai_to_planck(entry.balance_kai), kai_to_planck(entry.points_kai)
        allocations.append(Allocation(bytes.fromhex(member.owner), balance, points))
    _create_ledger(manifest, directory, tuple(allocations), time_ms)
    _write(directory / PREPARED_FILE, manifest.name, members)
    return Prepared(directory, manifest.name, tuple(members))


def load_prepared(directory: Path) -> Prepared:
    """The network in a directory; DataDirectoryError when there is none."""
    path = directory / PREPARED_FILE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        members = tuple(
            Member(
                str(each["name"]),
                tuple(each["roles"]),
                str(each["key"]),
                str(each["owner"]),
                bool(each["start"]),
                tuple((str(name), int(value)) for name, value in each["faults"]),
            )
            for each in plain["members"]
        )
        return Prepared(directory, str(plain["network"]), members)
    except FileNotFoundError:
        raise DataDirectoryError(
            f"{directory} holds no network", hint="`kaisar testnet up` makes one, or pass --directory"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataDirectoryError(f"{path} cannot be used: {error}", hint="remove the directory, start anew") from None


def _prepare_node(manifest: Manifest, entry: NodeEntry, name: str, path: Path) -> Member:
    create_data_directory(path)
    config = Config(path).with_settings(_settings(manifest, entry, name), f"the manifest, node {name}")
    keystore = Keystore(config.keys_path)
    seeds = _seed(manifest, name, "machine"), _seed(manifest, name, "wallet")
    machine = keystore.create_machine_key(None, seed=seeds[0])
    if seeds[1] is None:
        wallet, _ = keystore.create_wallet(WALLET, Scheme.ED25519, None)
    else:
        wallet = keystore.import_seed(WALLET, Scheme.ED25519, "0x" + seeds[1].hex(), None)
    write_config(path / CONFIG_FILE, config)
    return Member(name, entry.roles, machine.public_key.hex(), wallet.public_key.hex(), entry.start, entry.faults)


def _settings(manifest: Manifest, entry: NodeEntry, name: str) -> dict[str, object]:
    """Defaults of a swarm on one machine, then what the manifest says, then what ties the nodes together."""
    poll_s = max(0.05, min(0.5, manifest.network_params.block_ms / 4000))
    mine: dict[str, object] = {
        "network.listen": ["/ip4/127.0.0.1/tcp/0"],
        "network.upnp": False,  # nothing of a swarm on loopback concerns the local network
        "network.mdns": False,
        "ledger.poll_s": poll_s,
    }
    mine |= manifest.settings_of(entry)
    return mine | {
        "node.roles": list(entry.roles),
        "node.name": name,
        "node.wallet": WALLET,
        "network.genesis": f"../../{GENESIS_FILE}",
        "ledger.path": f"../../{LEDGER_FILE}",
    }


def _seed(manifest: Manifest, name: str, purpose: str) -> bytes | None:
    """A key's 32 bytes when the manifest fixes them; None for a fresh key."""
    if manifest.seed is None:
        return None
    return sha256(f"kaisar/testnet/{manifest.seed}/{name}/{purpose}".encode())


def _create_ledger(manifest: Manifest, directory: Path, allocations: tuple[Allocation, ...], time_ms: int) -> None:
    genesis = Genesis(
        manifest.name, manifest.preset, time_ms, allocations, total_points_planck(manifest), manifest.params
    )
    document, params = write_genesis(genesis), genesis.params
    (directory / GENESIS_FILE).write_bytes(document)
    rules = replace(ChainParameters(), block_time_ms=params.block_ms, finality_lag=params.finality_lag_blocks)
    EmbeddedLedger.create(directory / LEDGER_FILE, document, time_ms=time_ms, parameters=rules)


def _write(path: Path, network: str, members: list[Member]) -> None:
    plain = {
        "network": network,
        "members": [
            {
                "name": each.name,
                "roles": each.roles,
                "key": each.key,
                "owner": each.owner,
                "start": each.start,
                "faults": each.faults,
            }
            for each in members
        ],
    }
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
