"""Looking at the ledger without asking any node: every block is checked and the rules are applied once more, here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kaisar_p2p.ledger.chain import RawBlock, check_block
from kaisar_p2p.ledger.file import LedgerFile
from protocols.genesis import genesis_state
from protocols.interpreter.apply import apply
from protocols.interpreter.events import LedgerEvent, SlotStarted
from protocols.interpreter.state import AccountState, State


@dataclass(frozen=True)
class Seen:
    """An event of the ledger, and the block it happened in."""

    block: int
    event: LedgerEvent


class LedgerObserver:
    """The state that the finalized blocks of a ledger file add up to; not thread-safe."""

    def __init__(self, path: Path) -> None:
        """LedgerError when the file cannot be used."""
        self._file = LedgerFile(path)
        self._last: RawBlock | None = None
        self.state: State = genesis_state(self._file.genesis)
        self.events: list[Seen] = []
        self.times_ms: list[int] = []
        """Unix time of each block by its number."""
        self.call_bytes = 0

    def look(self) -> State:
        """Read what is final by now; LedgerCorrupt when a block does not check."""
        final = self._file.head().number - self._file.parameters.finality_lag
        while self.state.number < final:
            for raw in self._file.read(self.state.number + 1, final):
                block = check_block(raw, self._last, self._file.network, verify_signatures=True)
                self.state, events = apply(self.state, block)
                self.events += [Seen(block.number, each) for each in events if not isinstance(each, SlotStarted)]
                self.times_ms.append(raw.time_ms)
                self.call_bytes += sum(map(len, raw.signed_calls))
                self._last = raw
        return self.state

    def account(self, owner: str) -> AccountState:
        """What an owner (64 hex digits) has, as of the last look."""
        return self.state.accounts.get(bytes.fromhex(owner), AccountState())

    def slot_started_ms(self, slot: int) -> int | None:
        """Unix time of a slot's first block; None when it is not final yet."""
        block = slot * self.state.params.slot_blocks
        return self.times_ms[block] if block < len(self.times_ms) else None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def observe(path: Path) -> Iterator[LedgerObserver]:
    """An observer of a ledger file, closed at the end."""
    observer = LedgerObserver(path)
    try:
        yield observer
    finally:
        observer.close()
