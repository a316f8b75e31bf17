"""The format of an embedded ledger's file, its rules, and how a new one is written."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kaisar_p2p.errors import LedgerError
from kaisar_p2p.ledger.calls import SIGNED_CALL_BYTES
from kaisar_p2p.ledger.chain import NO_PARENT, header_hash
from kaisar_p2p.ledger.sqlite_errors import translated
from kaisar_p2p.wire.crypto import sha256

APPLICATION_ID = 0x4B53_524C  # "KSRL"
SCHEMA_VERSION = 1
GENESIS_BYTES = 4 << 20

_SCHEMA = """
CREATE TABLE parameters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE genesis (document BLOB NOT NULL);
CREATE TABLE blocks (
    number INTEGER PRIMARY KEY, hash BLOB NOT NULL, parent BLOB NOT NULL, time_ms INTEGER NOT NULL,
    last_call INTEGER NOT NULL                -- the block's calls are those after its parent's last_call, up to this
);
CREATE INDEX blocks_by_last_call ON blocks (last_call);
CREATE TABLE calls (
    id INTEGER PRIMARY KEY AUTOINCREMENT,     -- in order of acceptance, without gaps
    call_hash BLOB NOT NULL UNIQUE, account BLOB NOT NULL, nonce INTEGER NOT NULL, signed BLOB NOT NULL,
    UNIQUE (account, nonce)
);
"""


@dataclass(frozen=True)
class ChainParameters:
    """Rules of an embedded chain, fixed in the file when it is created."""

    block_time_ms: int = 1_000
    finality_lag: int = 2  # blocks
    block_calls: int = 1_024
    block_bytes: int = 1 << 20
    pool_calls: int = 4_096
    account_pool_calls: int = 256

    def __post_init__(self) -> None:
        least = {"finality_lag": 0, "block_bytes": SIGNED_CALL_BYTES}
        for name, value in asdict(self).items():
            if not least.get(name, 1) <= value < 1 << 40:
                raise LedgerError(f"ledger parameter {name} = {value}", hint=f"at least {least.get(name, 1)}")


def create_file(path: Path, genesis: bytes, time_ms: int, parameters: ChainParameters) -> bytes:
    """Write a new ledger, whole or not at all; returns the network id.

    Raises:
        LedgerError: the file exists or cannot be written, or the genesis document is empty or too large.
    """
    if not 0 < len(genesis) <= GENESIS_BYTES:
        raise LedgerError(f"a genesis document of {len(genesis)} bytes", hint=f"1 to {GENESIS_BYTES} bytes")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _draft(path.parent) as draft:
            with translated(path), closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                network = _write_genesis(connection, genesis, time_ms, parameters)
            _publish(draft, path)
    except OSError as error:
        hint = "check the directory's owner and mode"
        raise LedgerError(f"cannot create {path}: {error.strerror}", hint=hint) from error
    return network


@contextmanager
def _draft(directory: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=".ledger-", dir=directory)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


def _publish(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)  # unlike a rename, fails if somebody else was first
    except FileExistsError as error:
        raise LedgerError(f"{path} exists", hint="open it, or name another file") from error
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_genesis(connection: sqlite3.Connection, genesis: bytes, time_ms: int, parameters: ChainParameters) -> bytes:
    network = sha256(genesis)
    if connection.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
        raise LedgerError("no write-ahead log on this file system", hint="put the ledger on a local disk")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(
        f"BEGIN; PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; {_SCHEMA} COMMIT;"
    )
    block = (0, header_hash(network, 0, NO_PARENT, time_ms, network), NO_PARENT, time_ms, 0)
    connection.execute("BEGIN")
    connection.execute("INSERT INTO genesis VALUES (?)", (genesis,))
    connection.executemany("INSERT INTO parameters VALUES (?, ?)", asdict(parameters).items())
    connection.execute("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", block)
    connection.execute("COMMIT")
    return network


def check_version(path: Path, application_id: int, version: int) -> None:
    """Raise LedgerError unless the file is a ledger of this format."""
    if application_id != APPLICATION_ID:
        raise LedgerError(f"{path} is not a Kaisar ledger", hint="check the path")
    if version < SCHEMA_VERSION:
        raise LedgerError(f"{path} has the older ledger format {version}", hint="open it with the release that made it")
    if version > SCHEMA_VERSION:
        raise LedgerError(f"{path} has the newer ledger format {version}", hint="install a newer release")
