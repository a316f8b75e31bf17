"""SQLite's result codes as ledger errors (https://www.sqlite.org/rescode.html)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kaisar_p2p.errors import LedgerCorrupt, LedgerError

_KNOWN: dict[int, tuple[type[LedgerError], str, str]] = {
    sqlite3.SQLITE_FULL: (LedgerError, "the disk is full", "free some space and try again; nothing accepted was lost"),
    sqlite3.SQLITE_BUSY: (LedgerError, "the ledger is locked by another process", "try again, or stop what holds it"),
    sqlite3.SQLITE_LOCKED: (LedgerError, "the ledger is locked", "try again"),
    sqlite3.SQLITE_READONLY: (
        LedgerError,
        "the ledger cannot be written",
        "check its and its directory's owner and mode",
    ),
    sqlite3.SQLITE_CANTOPEN: (LedgerError, "the ledger cannot be opened", "check the path, the owner and the mode"),
    sqlite3.SQLITE_PERM: (LedgerError, "no permission on the ledger", "check the owner and the mode"),
    sqlite3.SQLITE_IOERR: (LedgerError, "the disk reports an error", "check the disk; try again"),
    sqlite3.SQLITE_NOTADB: (LedgerError, "not a Kaisar ledger", "check the path"),
    sqlite3.SQLITE_CORRUPT: (LedgerCorrupt, "the ledger file is damaged", "restore it from a copy"),
}
_UNKNOWN = (LedgerError, "the ledger cannot be read or written", "check that the file is whole and of this release")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into LedgerError or LedgerCorrupt that name the file, the cause and the next step."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        kind, cause, hint = _KNOWN.get(code & 0xFF, _UNKNOWN) if code is not None else _UNKNOWN
        raise kind(f"{path}: {cause} [{error}]", hint=hint) from error
