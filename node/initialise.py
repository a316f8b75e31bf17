"""What `kaisar init` makes: a data directory with keys and a configuration, and a new ledger where none was given."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kaisar_p2p.errors import ConfigError, DataDirectoryError
from kaisar_p2p.identity import Keystore, MachineKey, Scheme, Wallet
from kaisar_p2p.wire.money import PLANCK_PER_KAI
from node.config import CONFIG_FILE, Config, create_data_directory, write_config
from protocols.genesis import DOCUMENT_BYTES, Allocation, Genesis, parse_genesis, write_genesis

GENESIS_FILE = "genesis.json"
LEDGER_FILE = "ledger.sqlite"
SWARM_KEY_FILE = "swarm.key"
OWN_BALANCE_PLANCK = 1_000_000 * PLANCK_PER_KAI


@dataclass(frozen=True)
class Plan:
    """What to make. `ledger` joins an existing file; `genesis` is a document's file; with neither, all is new.

    `swarm_key` is the text of a private swarm's key file.
    """

    data_directory: Path
    passphrase: str | None = field(repr=False)
    network: str = "demo"
    ledger: Path | None = None
    genesis: Path | None = None
    scheme: Scheme = Scheme.ED25519
    settings: Mapping[str, object] = field(default_factory=dict)
    swarm_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Made:
    """What was made; `phrase` opens the wallet for whoever reads it."""

    machine: MachineKey
    wallet: Wallet
    phrase: str = field(repr=False)
    network: bytes
    own_ledger: bool


def initialise(plan: Plan, *, time_ms: int) -> Made:
    """Make a data directory; `time_ms` is Unix time for a new ledger's first block.

    Everything that can be wrong with the plan is found before anything is written. DataDirectoryError when there is
    something in the directory already: nothing is ever replaced. ConfigError, IdentityError, LedgerError otherwise.
    """
    directory = plan.data_directory
    _check_empty(directory)
    given = _given_genesis(plan)
    config = Config(directory).with_settings(_settings(plan))
    with _all_or_nothing(directory):
        return _make(plan, config, given, time_ms)


@contextlib.contextmanager
def _all_or_nothing(directory: Path) -> Iterator[None]:
    """What an error leaves half made is removed; a directory that was there, and empty, stays.

    The directory is locked meanwhile: another `kaisar init` must not take part of this one for its own.
    """
    there = directory.exists()
    create_data_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirectoryError(f"another process works on {directory}", hint="wait until it is done") from None
        _check_empty(directory)
        try:
            yield
        except BaseException:
            _empty(directory)
            if not there:
                directory.rmdir()
            raise
    finally:
        os.close(descriptor)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _make(plan: Plan, config: Config, given: bytes | None, time_ms: int) -> Made:
    directory = plan.data_directory
    keystore = Keystore(config.keys_path)
    wallet, phrase = keystore.create_wallet(config.node.wallet, plan.scheme, plan.passphrase)
    machine = keystore.create_machine_key(plan.passphrase)
    document = given if given is not None else _own_genesis(plan, wallet, time_ms)
    _write(directory / GENESIS_FILE, document)
    if plan.swarm_key is not None:
        _write(directory / SWARM_KEY_FILE, plan.swarm_key.encode("ascii"))
    network = _network(plan, config, document)
    write_config(directory / CONFIG_FILE, config)  # last: a directory with a configuration is complete
    return Made(machine, wallet, phrase, network, own_ledger=given is None)


def _check_empty(directory: Path) -> None:
    try:
        if not directory.exists():
            return
        there = next(directory.iterdir(), None)
    except NotADirectoryError:
        raise DataDirectoryError(f"{directory} is not a directory", hint="pass another --data-dir") from None
    except OSError as error:
        raise DataDirectoryError(
            f"{directory} cannot be read: {error.strerror}", hint="check its rights, or pass another --data-dir"
        ) from None
    if there is not None:
        raise DataDirectoryError(
            f"{directory} is not empty: it has {there.name}",
            hint="nothing was changed; use it with `kaisar run`, or pass another --data-dir",
        )


def _settings(plan: Plan) -> dict[str, object]:
    settings = dict(plan.settings)
    if plan.ledger is not None:
        settings["ledger.path"] = str(_absolute(plan.ledger))
    if plan.swarm_key is not None:
        settings["network.pre_shared_key_file"] = SWARM_KEY_FILE
    return settings


def _given_genesis(plan: Plan) -> bytes | None:
    """The genesis document of the network to join, checked; None for a network of one's own."""
    given = _read_genesis(plan.genesis) if plan.genesis is not None else None
    if plan.ledger is not None:
        recorded = _genesis_of_ledger(_absolute(plan.ledger))
        if given is not None and given != recorded:
            raise ConfigError(
                f"{plan.ledger} was made from another genesis document than {plan.genesis}",
                hint="leave --genesis out to take the ledger's own",
            )
        given = recorded
    if given is not None:
        parse_genesis(given)
    return given


def _genesis_of_ledger(path: Path) -> bytes:
    from kaisar_p2p.ledger.file import LedgerFile

    ledger = LedgerFile(path)
    try:
        return ledger.genesis
    finally:
        ledger.close()


def _read_genesis(path: Path) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="check the path given by --genesis"
        ) from None


def _own_genesis(plan: Plan, wallet: Wallet, time_ms: int) -> bytes:
    allocation = Allocation(wallet.public_key, OWN_BALANCE_PLANCK)
    return write_genesis(Genesis(f"{plan.network}-local", plan.network, time_ms, (allocation,)))


def _network(plan: Plan, config: Config, document: bytes) -> bytes:
    """The network's id; makes the ledger's file unless it was given."""
    from kaisar_p2p.ledger import ChainParameters, EmbeddedLedger
    from kaisar_p2p.wire.crypto import sha256

    if plan.ledger is not None:
        return sha256(document)
    genesis = parse_genesis(document)
    params = genesis.params
    rules = ChainParameters(block_time_ms=params.block_ms, finality_lag=params.finality_lag_blocks)
    return EmbeddedLedger.create(config.ledger_path, document, time_ms=genesis.time_ms, parameters=rules)


def _write(path: Path, data: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="check free space and rights") from None


def _absolute(path: Path) -> Path:
    return Path(os.path.expanduser(path)).absolute()
