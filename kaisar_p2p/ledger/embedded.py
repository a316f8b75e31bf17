"""The embedded ledger: one SQLite file shared by the processes of a machine, each of which may seal the next block.

::

    EmbeddedLedger.create(path, genesis, time_ms=now)
    async with open_embedded(path) as ledger:
        receipt = await ledger.submit(payload, wallet)
        async for block in ledger.follow(None): ...
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from kaisar_p2p.errors import CallRejected, DecodeError, LedgerCorrupt, LedgerError, SignatureError, ungrouped
from kaisar_p2p.ledger.calls import SignedCall, open_call, sign_call
from kaisar_p2p.ledger.chain import RawBlock, check_block
from kaisar_p2p.ledger.file import Head, LedgerFile
from kaisar_p2p.ledger.format import ChainParameters, create_file
from kaisar_p2p.ledger.interface import Block, CallSigner, Checkpoint, Receipt
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.ids import short

log = logging.getLogger(__name__)

POLL_S = 0.15
RETRY_S = 1.0  # after a full or locked disk
T = TypeVar("T")
NowMs = Callable[[], int]


def wall_clock_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class EmbeddedLedger:
    """A `Ledger` in an SQLite file; made by `open_embedded`."""

    def __init__(self, poll: LedgerFile, reads: LedgerFile, writes: LedgerFile, *, verify_signatures: bool) -> None:
        self.genesis: bytes = poll.genesis
        self.network: bytes = poll.network
        self.parameters: ChainParameters = poll.parameters
        self._verify_signatures = verify_signatures
        self._poll = poll  # used inline, for queries of microseconds
        self._reads, self._writes = reads, writes  # used in threads, one at a time
        self._read_limiter, self._write_limiter = trio.CapacityLimiter(1), trio.CapacityLimiter(1)
        self._head = poll.head()
        self._head_seen_s = trio.current_time()
        self._changed = trio.Event()
        self._broken: LedgerCorrupt | None = None

    @staticmethod
    def create(path: Path | str, genesis: bytes, *, time_ms: int, parameters: ChainParameters | None = None) -> bytes:
        """Write a new ledger whose block 0 has this document and Unix time; returns the 32-byte network id. Blocking.

        Raises:
            LedgerError: the file exists or cannot be written, or the document is empty or too large.
        """
        return create_file(Path(path), genesis, time_ms, parameters or ChainParameters())

    # --- submitting ---

    async def submit(self, payload: bytes, signer: CallSigner) -> Receipt:
        """Sign with the account's next nonce and store; see `Ledger.submit`. Several processes may use one wallet."""
        return await self._write(lambda: self._writes.append(signer.public_key, partial(self._sign, payload, signer)))

    def _sign(self, payload: bytes, signer: CallSigner, nonce: int) -> tuple[int, bytes]:
        return nonce, sign_call(payload, nonce, signer, self.network)

    async def submit_signed(self, signed: bytes) -> Receipt:
        """Store a call that was signed elsewhere.

        Raises:
            CallRejected: malformed, badly signed or for another network, not the account's next nonce, pool full.
            LedgerError: the ledger cannot be written.
        """

        def check_and_store() -> Receipt:
            call = _opened(signed, self.network)
            return self._writes.append(call.body.account, lambda _: (call.body.nonce, signed))

        return await self._write(check_and_store)

    async def next_nonce(self, account: bytes) -> int:
        """The nonce of the account's next call, counting those not yet in a block."""
        return await self._read(partial(self._reads.next_nonce, account))

    async def prepare(self, payload: bytes, signer: CallSigner) -> tuple[bytes, Receipt]:
        """The signed bytes that `submit` would store now, and their receipt, without storing them."""

        def sign() -> tuple[bytes, Receipt]:
            nonce = self._reads.next_nonce(signer.public_key)
            signed = sign_call(payload, nonce, signer, self.network)
            return signed, Receipt(sha256(signed), nonce)

        return await self._read(sign)

    # --- following ---

    async def head(self) -> Checkpoint:
        """The newest block; may still be replaced."""
        await trio.lowlevel.checkpoint()
        head = self._poll.head()
        return Checkpoint(head.number, head.hash)

    async def finalized(self) -> Checkpoint:
        """The newest block that is `finality_lag` blocks deep."""
        await trio.lowlevel.checkpoint()
        number = self._final_number(self._poll.head())
        block_hash = self._poll.block_hash(number)
        if block_hash is None:
            raise LedgerCorrupt(f"ledger block {number}: missing", hint="restore the ledger file from a copy")
        return Checkpoint(number, block_hash)

    async def follow(self, checkpoint: Checkpoint | None) -> AsyncGenerator[Block, None]:
        """Finalized blocks after `checkpoint`, verified, for ever; see `Ledger.follow`. Use `contextlib.aclosing`."""
        parent: RawBlock | Block | None = None if checkpoint is None else await self._stored(checkpoint)
        while True:
            following = 0 if parent is None else parent.number + 1
            head = await self._wait_for(following and following + self.parameters.finality_lag)  # block 0 is final
            final = self._final_number(head)
            for block in await self._read(partial(self._checked, following, final, parent)):
                yield block
                parent = block

    async def wait_final(self, call_hash: bytes, timeout_s: float) -> int:
        """Number of the finalized block that holds the call; LedgerError when the time is up."""
        with trio.move_on_after(timeout_s):
            return await self._block_of_final(call_hash)
        raise LedgerError(
            f"call {short(call_hash)} is not final after {timeout_s:g} s",
            hint="it may still become so; if no new block appears, start a node that seals",
        )

    async def _block_of_final(self, call_hash: bytes) -> int:
        while True:
            head = self._head
            call_id = await self._read(partial(self._reads.call_id, call_hash))
            number = None if call_id is None else await self._read(partial(self._reads.block_of, call_id))
            if number is not None and number <= self._final_number(self._head):
                return number
            await self._wait_for(head.number + 1)

    def _final_number(self, head: Head) -> int:
        return max(0, head.number - self.parameters.finality_lag)

    async def _stored(self, checkpoint: Checkpoint) -> RawBlock:
        """The block a follower has stopped at."""
        final = self._final_number(self._poll.head())
        blocks = await self._read(partial(self._reads.read, checkpoint.number, checkpoint.number))
        if not blocks or checkpoint.number > final or blocks[0].hash != checkpoint.hash:
            raise LedgerError(
                f"block {checkpoint.number} ({short(checkpoint.hash)}) is not among this ledger's {final} final ones",
                hint="use the ledger that the node's state was built from, or start over from an empty state",
            )
        return blocks[0]

    def _checked(self, first: int, last: int, parent: RawBlock | Block | None) -> list[Block]:
        checked: list[Block] = []
        for raw in self._reads.read(first, last):
            block = check_block(raw, parent, self.network, verify_signatures=self._verify_signatures)
            checked.append(block)
            parent = block
        if not checked:
            raise LedgerCorrupt(f"ledger block {first}: missing", hint="restore the ledger file from a copy")
        return checked

    async def _wait_for(self, number: int) -> Head:
        """Wait until the newest block has at least this number."""
        while self._head.number < number:
            if self._broken is not None:
                raise self._broken
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        return self._head

    # --- sealing ---

    async def run(self, *, seal: bool, poll_s: float, now_ms: NowMs) -> None:
        """Watch for new blocks, seal the next one when due and nobody else has; ends only if the file is corrupt."""
        stagger_s = _stagger_s(self.parameters.block_time_ms)
        told = ""
        while True:
            try:
                self._look()
                due_in_s = self._due_in_s(now_ms()) + stagger_s if seal else poll_s
                if due_in_s <= 0:
                    await self._write(partial(self._writes.seal, self._head, now_ms()))
                    self._look()
                    if told:
                        log.info("blocks are made again")
                    told = ""
                else:
                    await trio.sleep(min(due_in_s, poll_s))
            except LedgerCorrupt as error:
                log.error("the ledger stops: %s", error)
                self._broken = error
                self._notify()
                return
            except LedgerError as error:
                if str(error) != told:  # not once a second, as long as the disk is full
                    log.warning("no new block: %s", error)
                told = str(error)
                await trio.sleep(RETRY_S)

    def _look(self) -> None:
        head = self._poll.head()
        if head != self._head:
            self._head, self._head_seen_s = head, trio.current_time()
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _due_in_s(self, now_ms: int) -> float:
        block_time_ms = self.parameters.block_time_ms
        by_clock = (self._head.time_ms + block_time_ms - now_ms) / 1000
        # If the wall clock was set back, the chain goes on at half its pace until the clock has caught up.
        by_pace = self._head_seen_s + 2 * block_time_ms / 1000 - trio.current_time()
        return min(by_clock, by_pace)

    # --- faults, for tests and simulations ---

    async def replace_unfinalized(self, depth: int) -> None:
        """Simulate a reorganisation: the newest `depth` blocks give way to others with the same calls.

        Raises:
            LedgerError: `depth` reaches a finalized block.
        """
        await self._write(partial(self._writes.replace, depth))
        self._look()

    async def _read(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._read_limiter)

    async def _write(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._write_limiter)


def _opened(signed: bytes, network: bytes) -> SignedCall:
    try:
        return open_call(signed, network)
    except DecodeError as error:
        raise CallRejected(f"not a signed call: {error.message}", hint="at most 64 KiB, canonical") from error
    except SignatureError as error:
        raise CallRejected(error.message, hint="sign with the account's key, for this network") from error


def _stagger_s(block_time_ms: int) -> float:
    """Processes try one after another, so that most find the block sealed; at most a quarter of the block time."""
    return (os.getpid() % 16) * min(0.003, block_time_ms / 1000 / 64)


@asynccontextmanager
async def open_embedded(
    path: Path | str,
    *,
    seal: bool = True,
    poll_s: float = POLL_S,
    verify_signatures: bool = True,
    now_ms: NowMs = wall_clock_ms,
) -> AsyncIterator[EmbeddedLedger]:
    """Open an existing ledger file; seals blocks in the background unless told otherwise.

    Raises:
        LedgerError: missing, unreadable, unwritable, not a ledger, or of another version.
        LedgerCorrupt: damaged.
    """
    open_file = partial(trio.to_thread.run_sync, LedgerFile, Path(path))
    with closing(await open_file()) as poll, closing(await open_file()) as reads, closing(await open_file()) as writes:
        ledger = EmbeddedLedger(poll, reads, writes, verify_signatures=verify_signatures)
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(ledger.run, seal=seal, poll_s=poll_s, now_ms=now_ms))
                yield ledger
                nursery.cancel_scope.cancel()
