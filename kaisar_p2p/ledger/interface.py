"""What a ledger is to the rest of the node: submit signed calls, follow finalized blocks.

The ledger orders bytes and knows who signed them. What a payload means is the interpreter's business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Call:
    """A signed call as it stands in a block.

    `signer` is the 32-byte account, `index` the path within the block (one number, more inside a batch), `call_hash`
    the SHA-256 of the signed bytes: an order's id.
    """

    signer: bytes
    payload: bytes
    index: tuple[int, ...]
    call_hash: bytes


@dataclass(frozen=True)
class Block:
    """A finalized block; hashes are 32 bytes, `time_ms` is Unix time. Block 0 has no calls and a zero parent."""

    number: int
    hash: bytes
    parent: bytes
    time_ms: int
    calls: tuple[Call, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """Where to go on from once this block has been applied."""
        return Checkpoint(self.number, self.hash)


@dataclass(frozen=True)
class Checkpoint:
    """The last block that was applied: its number and 32-byte hash."""

    number: int
    hash: bytes


@dataclass(frozen=True)
class Receipt:
    """An accepted call: the SHA-256 of its signed bytes, and its nonce. It is not final yet."""

    call_hash: bytes
    nonce: int


class CallSigner(Protocol):
    """A wallet, as far as the ledger needs it.

    `sign` runs in a worker thread and holds up every other submission, so unlock the wallet before.
    """

    @property
    def public_key(self) -> bytes:
        """The 32-byte account."""
        ...

    @property
    def scheme(self) -> int:
        """0 for ed25519, 1 for sr25519."""
        ...

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`."""
        ...


class Ledger(Protocol):
    """A chain of signed calls in finalized order."""

    @property
    def network(self) -> bytes:
        """The 32-byte network id: the hash of the genesis document."""
        ...

    @property
    def genesis(self) -> bytes:
        """The genesis document's bytes."""
        ...

    async def submit(self, payload: bytes, signer: CallSigner) -> Receipt:
        """Sign and hand in a call; once this returns, a crash or a power cut does not lose it.

        Raises:
            CallRejected: too large, badly signed, or the pool is full; the hint says what to do.
            LedgerError: the ledger cannot be written.
        """
        ...

    def follow(self, checkpoint: Checkpoint | None) -> AsyncGenerator[Block, None]:
        """Every finalized block after `checkpoint` (from block 0 for None), in order and verified; never ends.

        Wrap it in `contextlib.aclosing` when leaving the loop early.

        Raises:
            LedgerCorrupt: a broken link, hash or signature; names the block.
            LedgerError: the checkpoint is not on this chain, or the ledger cannot be read.
        """
        ...

    async def head(self) -> Checkpoint:
        """The newest block; may still be replaced."""
        ...

    async def finalized(self) -> Checkpoint:
        """The newest block that can no longer be replaced."""
        ...

    async def wait_final(self, call_hash: bytes, timeout_s: float) -> int:
        """Number of the finalized block that holds the call.

        Raises:
            LedgerError: not final in time; it may still become so.
        """
        ...
