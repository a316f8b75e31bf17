"""The node's own database: the duty journal, what machines asked to keep, and the event list.

SQLite in WAL mode with synchronous=FULL: once `commit` has returned, neither a crash nor a power cut undoes it. That is
what "journal before effect" rests on.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kaisar_p2p.errors import StoreError
from protocols.actions import Duty, Note, Store

SCHEMA_VERSION = 1
EVENTS_KEPT = 10_000
DUTIES_KEPT_S = 14 * 86_400
_MESH = "mesh"  # kind of the items that the mesh keeps; few, so that they are never pruned
_SCHEMA = """
CREATE TABLE IF NOT EXISTS duties (key TEXT PRIMARY KEY, digest BLOB NOT NULL, at_s INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    kind TEXT, key BLOB, value BLOB NOT NULL, at_s INTEGER NOT NULL, PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class NodeEvent:
    """One line of the event list that the API serves."""

    id: int
    at_ms: int
    kind: str
    data: dict[str, str | int]


class NodeStore:
    """May be written from several threads; one transaction waits for the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = threading.Lock()
        try:
            # SQLite gives its journals the mode of the file; nobody else is to read them.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise StoreError(
                    f"{path} has schema {version}, this version writes {SCHEMA_VERSION}",
                    hint="use the version of kaisar that wrote it, or a new data directory",
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"cannot open {path}: {error}", hint="check the disk and the file's permissions"
            ) from error

    def commit(
        self, duties: Iterable[Duty], items: Iterable[Store], notes: Iterable[Note], now: float
    ) -> frozenset[str]:
        """Write all of a step in one transaction; returns the keys of duties that were already done differently.

        Raises StoreError (disk full, read-only) with nothing written: the caller then carries out none of the step.
        """
        refused: set[str] = set()
        with self._transaction():
            for duty in duties:
                if not self._journal(duty, now):
                    refused.add(duty.key)
            for item in items:
                self._db.execute(
                    "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)", (item.kind, item.key, item.value, int(now))
                )
            for note in notes:
                self._db.execute(
                    "INSERT INTO events (at_ms, kind, data) VALUES (?, ?, ?)",
                    (int(now * 1000), note.kind, json.dumps(dict(note.data), ensure_ascii=False)),
                )
        return frozenset(refused)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, one at a time: the driver, an order that is being placed and pruning share the connection."""
        with self._writing:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                hint = "free disk space; the node retries"
                raise StoreError(f"cannot write {self._path}: {error}", hint=hint) from error

    def _journal(self, duty: Duty, now: float) -> bool:
        row = self._db.execute("SELECT digest FROM duties WHERE key = ?", (duty.key,)).fetchone()
        if row is not None:
            return bool(row[0] == duty.digest)
        self._db.execute("INSERT INTO duties VALUES (?, ?, ?)", (duty.key, duty.digest, int(now)))
        return True

    def items(self, kind: str) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of everything kept under a kind, oldest first."""
        yield from self._db.execute(
            "SELECT key, value FROM items WHERE kind = ? ORDER BY at_s, key", (kind,)
        ).fetchall()

    def item(self, kind: str, key: bytes) -> bytes | None:
        """One kept value."""
        row = self._db.execute("SELECT value FROM items WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return None if row is None else bytes(row[0])

    def events(self, after: int, limit: int) -> list[NodeEvent]:
        """Events with an id above `after`, oldest first."""
        rows = self._db.execute("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", (after, limit)).fetchall()
        return [NodeEvent(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    def prune(self, now: float, keep: dict[str, int]) -> None:
        """Bound the file: the newest `keep[kind]` items of each kind, the newest events, duties of two weeks.

        StoreError when nothing could be deleted.
        """
        with self._transaction():
            for kind, count in keep.items():
                self._db.execute(
                    "DELETE FROM items WHERE kind = ?1 AND key NOT IN"
                    " (SELECT key FROM items WHERE kind = ?1 ORDER BY at_s DESC LIMIT ?2)",
                    (kind, count),
                )
            self._db.execute("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (EVENTS_KEPT,))
            self._db.execute("DELETE FROM duties WHERE at_s < ?", (int(now) - DUTIES_KEPT_S,))

    def load(self, name: str) -> bytes | None:
        """What the mesh keeps over restarts under this name (`kaisar_p2p.mesh.MeshMemory`)."""
        try:
            return self.item(_MESH, name.encode())
        except sqlite3.Error as error:
            raise StoreError(f"cannot read {self._path}: {error}", hint="check the disk") from error

    def save(self, name: str, blob: bytes) -> None:
        """Replace what the mesh keeps under this name; StoreError."""
        self.commit((), (Store(_MESH, name.encode(), blob),), (), time.time())

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        self._db.close()
