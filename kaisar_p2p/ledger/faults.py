"""A ledger that misbehaves as a chain may, for tests and simulations: lost submissions, a follower that lags."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from kaisar_p2p.ledger.embedded import EmbeddedLedger
from kaisar_p2p.ledger.interface import Block, CallSigner, Checkpoint, Receipt


@dataclass
class FaultyLedger:
    """An `EmbeddedLedger` seen through a bad endpoint.

    `drop_next` submissions get a receipt and vanish; blocks come `lag_blocks` after they are final. Both may be changed
    at any time. A reorganisation is `EmbeddedLedger.replace_unfinalized`.
    """

    inner: EmbeddedLedger
    drop_next: int = 0
    lag_blocks: int = 0

    @property
    def network(self) -> bytes:
        """The 32-byte network id."""
        return self.inner.network

    @property
    def genesis(self) -> bytes:
        """The genesis document."""
        return self.inner.genesis

    async def submit(self, payload: bytes, signer: CallSigner) -> Receipt:
        """As `Ledger.submit`, unless this submission is to be lost."""
        if self.drop_next > 0:
            self.drop_next -= 1
            _, receipt = await self.inner.prepare(payload, signer)
            return receipt
        return await self.inner.submit(payload, signer)

    async def follow(self, checkpoint: Checkpoint | None) -> AsyncGenerator[Block, None]:
        """As `Ledger.follow`, late."""
        held: list[Block] = []
        async with aclosing(self.inner.follow(checkpoint)) as blocks:
            async for block in blocks:
                held.append(block)
                while len(held) > self.lag_blocks:
                    yield held.pop(0)

    async def head(self) -> Checkpoint:
        """The newest block."""
        return await self.inner.head()

    async def finalized(self) -> Checkpoint:
        """The newest final block."""
        return await self.inner.finalized()

    async def wait_final(self, call_hash: bytes, timeout_s: float) -> int:
        """As `Ledger.wait_final`."""
        return await self.inner.wait_final(call_hash, timeout_s)
