"""The embedded ledger's SQLite file: blocking calls, safe among processes and against crashes.

WAL journal with synchronous=FULL: what was committed survives `kill -9` and a power cut. Calls are only ever appended,
in nonce order of each account; a block is a range of them. Those behind the last block's range are the pool.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from kaisar_p2p.errors import CallRejected, LedgerError
from kaisar_p2p.ledger.chain import NO_PARENT, RawBlock, calls_root, corrupt, header_hash
from kaisar_p2p.ledger.format import ChainParameters, check_version
from kaisar_p2p.ledger.interface import Receipt
from kaisar_p2p.ledger.sqlite_errors import translated
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.ids import short

_LATER = "try again after the next block"
BUSY_TIMEOUT_S = 20.0
READ_BLOCKS, READ_BYTES = 256, 4 << 20  # one read returns at most so much, and always one block


@dataclass(frozen=True)
class Head:
    """The newest block, and the id of the last call that is in a block."""

    number: int
    hash: bytes
    time_ms: int
    last_call: int


class LedgerFile:
    """One connection to a ledger file. May move between threads, but only one may use it at a time."""

    def __init__(self, path: Path) -> None:
        """Open an existing ledger.

        Raises:
            LedgerError: missing, unreadable, unwritable, not a ledger, or of another version.
            LedgerCorrupt: damaged, or its genesis block does not match its document.
        """
        self.path = path
        if not os.path.isfile(path):  # unlike Path.is_file, False as well when the directory is closed to us
            raise LedgerError(f"no ledger at {path}", hint="create it first, or check the path and its directory")
        if not os.access(path, os.R_OK | os.W_OK):  # SQLite would open it for reading only
            raise LedgerError(f"{path} cannot be read and written", hint="check its owner and mode")
        with translated(path):
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_TIMEOUT_S,
            )
        try:
            with translated(path):
                self._prepare()
        except (KeyError, TypeError) as error:  # a row is missing
            self._connection.close()
            raise corrupt(0, "its parameters or genesis document are missing") from error
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection; the last one of all processes folds the log into the file."""
        self._connection.close()

    def _prepare(self) -> None:
        query = self._connection.execute
        (application_id,), (version,) = (
            query(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        check_version(self.path, application_id, version)
        query("PRAGMA synchronous=FULL")
        query("PRAGMA journal_size_limit=16777216")
        with self.writing():  # a directory that cannot be written shows here, not at the first call
            pass
        self.genesis: bytes = query("SELECT document FROM genesis").fetchone()[0]
        self.network = sha256(self.genesis)
        stored = dict(query("SELECT name, value FROM parameters"))
        self.parameters = ChainParameters(**{item.name: stored[item.name] for item in fields(ChainParameters)})
        first = self._block_row(0)
        if first is None or first[1] != header_hash(self.network, 0, NO_PARENT, first[3], self.network):
            raise corrupt(0, "does not match the genesis document")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that holds the write lock of all processes from its start."""
        with translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite has ended it already when the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    def head(self) -> Head:
        """The newest block. Cheap enough to poll (10 µs)."""
        with translated(self.path):
            row = self._connection.execute(
                "SELECT number, hash, time_ms, last_call FROM blocks ORDER BY number DESC LIMIT 1"
            ).fetchone()
        if row is None:
            raise corrupt(0, "missing")
        return Head(*row)

    def block_hash(self, number: int) -> bytes | None:
        """The hash of a block, None if there is no such block."""
        with translated(self.path):
            row = self._block_row(number)
        return row[1] if row else None

    def _block_row(self, number: int) -> tuple[int, bytes, bytes, int, int] | None:
        row: tuple[int, bytes, bytes, int, int] | None = self._connection.execute(
            "SELECT number, hash, parent, time_ms, last_call FROM blocks WHERE number = ?", (number,)
        ).fetchone()
        return row

    def read(self, first: int, last: int) -> list[RawBlock]:
        """Blocks `first` to `last` as stored, or the beginning of them; at least one if it is there."""
        blocks: list[RawBlock] = []
        size = 0
        with translated(self.path):
            parent = self._block_row(first - 1)
            after = parent[4] if parent else 0
            rows = self._connection.execute(
                "SELECT number, hash, parent, time_ms, last_call FROM blocks"
                " WHERE number BETWEEN ? AND ? ORDER BY number LIMIT ?",
                (first, last, READ_BLOCKS),
            )
            for number, block_hash, parent_hash, time_ms, last_call in rows.fetchall():
                signed = self._signed_calls(after, last_call) if last_call > after else ()
                blocks.append(RawBlock(number, block_hash, parent_hash, time_ms, signed))
                after = last_call
                size += sum(map(len, signed))
                if size >= READ_BYTES:
                    break
        return blocks

    def _signed_calls(self, after: int, last: int) -> tuple[bytes, ...]:
        query = "SELECT signed FROM calls WHERE id > ? AND id <= ? ORDER BY id"
        return tuple(signed for (signed,) in self._connection.execute(query, (after, last)))

    def next_nonce(self, account: bytes) -> int:
        """The nonce of the account's next call, counting those in the pool."""
        with translated(self.path):
            query = "SELECT max(nonce) FROM calls WHERE account = ?"
            (newest,) = self._connection.execute(query, (account,)).fetchone()
        return 0 if newest is None else newest + 1

    def append(self, account: bytes, make_call: Callable[[int], tuple[int, bytes]]) -> Receipt:
        """Accept the call that `make_call(next nonce)` returns as (nonce, verified signed bytes).

        Raises:
            CallRejected: the nonce is not the next one, the call is already there, or the pool is full.
        """
        with self.writing():
            expected = self.next_nonce(account)
            self._check_room(account, expected)
            nonce, signed = make_call(expected)
            call_hash = sha256(signed)
            if nonce != expected:
                raise self._wrong_nonce(account, call_hash, nonce, expected)
            query = "INSERT INTO calls (call_hash, account, nonce, signed) VALUES (?, ?, ?, ?)"
            self._connection.execute(query, (call_hash, account, nonce, signed))
        return Receipt(call_hash, nonce)

    def _check_room(self, account: bytes, next_nonce: int) -> None:
        last_call, bounds = self.head().last_call, self.parameters
        (newest,) = self._connection.execute("SELECT ifnull(max(id), 0) FROM calls").fetchone()
        if newest - last_call >= bounds.pool_calls:
            raise CallRejected(f"the pool is full with {bounds.pool_calls} calls", hint=_LATER)
        oldest_allowed = self._connection.execute(
            "SELECT id FROM calls WHERE account = ? AND nonce = ?", (account, next_nonce - bounds.account_pool_calls)
        ).fetchone()
        if oldest_allowed is not None and oldest_allowed[0] > last_call:
            raise CallRejected(f"{bounds.account_pool_calls} calls of {short(account)} are waiting", hint=_LATER)

    def _wrong_nonce(self, account: bytes, call_hash: bytes, nonce: int, expected: int) -> CallRejected:
        if self.call_id(call_hash) is not None:
            return CallRejected(
                f"duplicate: call {short(call_hash)} is already in the ledger", hint="wait for its block"
            )
        fault = "used" if nonce < expected else "too high"
        return CallRejected(f"nonce {nonce} of {short(account)} is {fault}", hint=f"sign again with nonce {expected}")

    def call_id(self, call_hash: bytes) -> int | None:
        """The place of a call in the order of acceptance, None if it was never accepted."""
        with translated(self.path):
            row = self._connection.execute("SELECT id FROM calls WHERE call_hash = ?", (call_hash,)).fetchone()
        return row[0] if row else None

    def block_of(self, call_id: int) -> int | None:
        """The number of the block that holds a call, None while it is in the pool."""
        query = "SELECT number FROM blocks WHERE last_call >= ? ORDER BY last_call, number LIMIT 1"
        with translated(self.path):
            row = self._connection.execute(query, (call_id,)).fetchone()
        return row[0] if row else None

    def seal(self, parent: Head, now_ms: int) -> bool:
        """Put the next block on `parent`, which is due; False if another process has been faster.

        Its time is the due time, or `now_ms` when more than a whole block was missed: a ledger that slept does not
        make up for it with a burst of blocks.
        """
        due_ms = parent.time_ms + self.parameters.block_time_ms
        time_ms = due_ms if now_ms < due_ms + self.parameters.block_time_ms else now_ms
        with self.writing():
            if self.head() != parent:
                return False
            self._put_block(parent, time_ms)
        return True

    def replace(self, depth: int) -> None:
        """A simulated reorganisation: the newest `depth` blocks, none of them final, give way to as many others."""
        with self.writing():
            head = self.head()
            if not 0 < depth <= min(self.parameters.finality_lag, head.number):
                raise LedgerError(f"cannot replace {depth} blocks", hint="only unfinalized blocks can be replaced")
            old = [row for number in range(head.number - depth, head.number + 1) if (row := self._block_row(number))]
            self._connection.execute("DELETE FROM blocks WHERE number > ?", (head.number - depth,))
            parent = Head(old[0][0], old[0][1], old[0][3], old[0][4])
            for row in old[1:]:
                parent = self._put_block(parent, row[3] + 1)

    def _put_block(self, parent: Head, time_ms: int) -> Head:
        last_call = self._last_call_that_fits(parent.last_call)
        number, root = parent.number + 1, calls_root(self._signed_calls(parent.last_call, last_call))
        head = Head(number, header_hash(self.network, number, parent.hash, time_ms, root), time_ms, last_call)
        row = (number, head.hash, parent.hash, time_ms, last_call)
        self._connection.execute("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", row)
        return head

    def _last_call_that_fits(self, after: int) -> int:
        sizes = self._connection.execute(
            "SELECT id, length(signed) FROM calls WHERE id > ? ORDER BY id LIMIT ?",
            (after, self.parameters.block_calls),
        )
        last, total = after, 0
        for call_id, size in sizes.fetchall():
            total += size
            if total > self.parameters.block_bytes:
                break
            last = call_id
        return last
