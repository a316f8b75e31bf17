"""What a mesh keeps over restarts, and the task that saves it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import trio

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.guard.reputation import Reputation

log = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0
_NAME = "reputation"
_BOOK = "addresses"
_STAMP_BYTES = 8


class MeshMemory(Protocol):
    """Small named blobs that outlive the process. Called in worker threads, by one at a time; may raise KaisarError."""

    def load(self, name: str) -> bytes | None:
        """What was last saved under this name."""
        ...

    def save(self, name: str, blob: bytes) -> None:
        """Replace what is kept under this name, durably."""
        ...


class Remembered:
    """Carries a reputation, and where peers were reached, over restarts.

    Bans run on while the node is down, by the wall clock.
    """

    def __init__(
        self,
        reputation: Reputation,
        memory: MeshMemory | None,
        wall: Callable[[], float] = time.time,
        every_s: float = SAVE_EVERY_S,
        book: AddressBook | None = None,
    ) -> None:
        self._reputation, self._memory, self._wall, self._every_s = reputation, memory, wall, every_s
        self._saved_changes = 0
        self._book, self._saved_book = book, b""

    async def load(self) -> None:
        """Take over what the last process knew; a blob that cannot be read is forgotten, with a warning."""
        if self._memory is None:
            return
        try:
            await self._load_book(self._memory)
            blob = await trio.to_thread.run_sync(self._memory.load, _NAME)
            if blob is not None:
                saved_at = int.from_bytes(blob[:_STAMP_BYTES], "big") / 1000
                passed_s = max(0.0, self._wall() - saved_at)
                count = self._reputation.load(blob[_STAMP_BYTES:], passed_s, trio.current_time())
                log.debug("%d accounts of peers and addresses taken over", count)
        except (KaisarError, ValueError, TypeError) as error:  # TypeError: not even bytes are there
            log.warning("what was known about peers cannot be read, starting anew: %s", error)

    async def _load_book(self, memory: MeshMemory) -> None:
        if self._book is not None:
            blob = await trio.to_thread.run_sync(memory.load, _BOOK)
            log.debug("%d peers that answered before are known", self._book.load(blob or b""))

    async def run(self) -> None:
        """Save now and then, when something has changed."""
        while True:
            await trio.sleep(self._every_s)
            await self.save()

    async def save(self) -> None:
        """Save what has changed; a failure is logged, the next attempt may work."""
        if self._memory is None:
            return
        await self._save_book(self._memory)
        if self._reputation.changes == self._saved_changes:
            return
        changes = self._reputation.changes
        stamp = int(self._wall() * 1000).to_bytes(_STAMP_BYTES, "big")
        blob = stamp + self._reputation.dump(trio.current_time())
        try:
            await trio.to_thread.run_sync(self._memory.save, _NAME, blob)
            self._saved_changes = changes
        except KaisarError as error:
            log.warning("what is known about peers could not be saved: %s", error)

    async def _save_book(self, memory: MeshMemory) -> None:
        blob = self._book.dump() if self._book is not None else b""
        if blob == self._saved_book:
            return
        try:
            await trio.to_thread.run_sync(memory.save, _BOOK, blob)
            self._saved_book = blob
        except KaisarError as error:
            log.warning("where peers were reached could not be saved: %s", error)
