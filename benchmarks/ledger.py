"""Calls a second: signature checks against PyNaCl's own rate, submitting, following."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import trio
from nacl.signing import SigningKey

from benchmarks import Figure, interpreter_rate
from kaisar_p2p.ledger import ED25519, ChainParameters, EmbeddedLedger, open_call, open_embedded, sign_call
from kaisar_p2p.ledger.file import LedgerFile

_NETWORK = bytes(32)
_PAYLOAD = bytes(200)
_CALLS = 2_000
_ROUNDS = 7
_POLLS_A_SECOND = 10


@dataclass
class _Wallet:
    key: SigningKey = field(default_factory=SigningKey.generate)
    scheme: int = ED25519

    @property
    def public_key(self) -> bytes:
        return bytes(self.key.verify_key)

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message).signature


def figures() -> list[Figure]:
    """Rates of the embedded ledger on this machine's disk; payloads of 200 bytes."""
    return [_signature_checks(), *trio.run(_chain_figures), _poll_cost(), *interpreter_rate.figures()]


def _rate(work: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def _signature_checks() -> Figure:
    """Decoding and checking signed calls, with PyNaCl's bare check of the same messages interleaved."""
    wallet = _Wallet()
    signed = [sign_call(_PAYLOAD, nonce, wallet, _NETWORK) for nonce in range(_CALLS)]
    plain = [wallet.key.sign(call[:-66]) for call in signed]
    verify = wallet.key.verify_key.verify
    ours, theirs = [], []
    for _ in range(_ROUNDS):
        theirs.append(_rate(lambda: [verify(each.message, each.signature) for each in plain], _CALLS))
        ours.append(_rate(lambda: [open_call(each, _NETWORK) for each in signed], _CALLS))
    ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
    return Figure(
        figure="signed calls decoded and checked",
        value=median(ours),
        unit="calls/s",
        peer="PyNaCl VerifyKey.verify",
        ratio=ratio,
        target="≥ 0.8",
        ok=ratio >= 0.8,
    )


@asynccontextmanager
async def _ledger(directory: str, *, verify_signatures: bool) -> AsyncIterator[EmbeddedLedger]:
    path = Path(directory) / "ledger"
    if not path.exists():
        rules = ChainParameters(block_time_ms=50, finality_lag=0, pool_calls=100_000, account_pool_calls=100_000)
        EmbeddedLedger.create(path, b"benchmark", time_ms=0, parameters=rules)
    async with open_embedded(path, poll_s=0.01, verify_signatures=verify_signatures) as ledger:
        yield ledger


async def _chain_figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as directory:
        async with _ledger(directory, verify_signatures=True) as ledger:
            alone, together = await _submit_rates(ledger)
            await _fill(ledger)
        followed = [await _follow_rate(directory, verify_signatures=checked) for checked in (True, False)]
    return [
        Figure(figure="calls submitted, one after another", value=alone, unit="calls/s"),
        Figure(figure="calls submitted, 32 at a time", value=together, unit="calls/s"),
        Figure(figure="calls followed, signatures checked", value=followed[0], unit="calls/s"),
        Figure(figure="calls followed, hashes checked only", value=followed[1], unit="calls/s"),
    ]


async def _submit_rates(ledger: EmbeddedLedger) -> tuple[float, float]:
    wallet, count = _Wallet(), 128
    start = time.perf_counter()
    for _ in range(count):
        await ledger.submit(_PAYLOAD, wallet)
    alone = count / (time.perf_counter() - start)

    async def submit_some() -> None:
        mine = _Wallet()
        for _ in range(8):
            await ledger.submit(_PAYLOAD, mine)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(32):
            nursery.start_soon(submit_some)
    return alone, 32 * 8 / (time.perf_counter() - start)


async def _fill(ledger: EmbeddedLedger) -> None:
    """Put many calls into blocks without a disk write each: only following is measured on them."""
    wallet = _Wallet()

    def append_all(file: LedgerFile) -> None:
        file._connection.execute("PRAGMA synchronous=OFF")
        for nonce in range(10_000):
            signed = sign_call(_PAYLOAD, nonce, wallet, ledger.network)
            file.append(wallet.public_key, lambda n, signed=signed: (n, signed))  # type: ignore[misc]

    with closing(LedgerFile(ledger._poll.path)) as file:
        await trio.to_thread.run_sync(append_all, file)
    receipt = await ledger.submit(b"last", wallet)
    await ledger.wait_final(receipt.call_hash, 120)


async def _follow_rate(directory: str, *, verify_signatures: bool) -> float:
    async with _ledger(directory, verify_signatures=verify_signatures) as ledger:
        last, calls = (await ledger.finalized()).number, 0
        start = time.perf_counter()
        async with aclosing(ledger.follow(None)) as blocks:
            async for block in blocks:
                calls += len(block.calls)
                if block.number == last:
                    break
        return calls / (time.perf_counter() - start)


def _poll_cost() -> Figure:
    """The share of a core that polling for new blocks takes when nothing happens, scheduler included."""

    async def watch() -> float:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "ledger"
            EmbeddedLedger.create(path, b"benchmark", time_ms=0, parameters=ChainParameters(block_time_ms=1_000))
            async with open_embedded(path, poll_s=1 / _POLLS_A_SECOND):
                start, used = time.perf_counter(), time.process_time()
                await trio.sleep(3)
                return (time.process_time() - used) / (time.perf_counter() - start)

    share = 100 * trio.run(partial(watch))
    return Figure(
        figure=f"an idle node: {_POLLS_A_SECOND} polls and 1 sealed block a second",
        value=share,
        unit="% of a core",
        target="< 1",
        ok=share < 1,
    )
