"""Real processes on one file: nothing accepted is lost, whoever is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from kaisar_p2p.ledger import Block, EmbeddedLedger, open_embedded

WORKER = Path(__file__).with_name("ledger_worker.py")
PATIENCE_S = 120.0


@contextmanager
def worker(path: Path, wallet: int, calls: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready to submit; killed in the end."""
    command = [sys.executable, str(WORKER), str(path), str(wallet), str(calls)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def receipts(process: subprocess.Popen[str]) -> Iterator[tuple[str, int]]:
    """Receipts as (hash, nonce), until the worker has no more or is dead."""
    while (text := line(process)) not in ("done", ""):
        call_hash, nonce = text.split()
        yield call_hash, int(nonce)


async def calls_until(ledger: EmbeddedLedger, hashes: set[str]) -> list[Block]:
    """The blocks from 0 on until all these calls have appeared."""
    blocks, missing = [], set(hashes)
    with trio.fail_after(PATIENCE_S):
        async with aclosing(ledger.follow(None)) as following:
            async for block in following:
                blocks.append(block)
                missing -= {call.call_hash.hex() for call in block.calls}
                if not missing:
                    break
    return blocks


async def test_twelve_processes_submit_to_one_file(make_ledger: Callable[..., Path]) -> None:
    path = make_ledger(block_time_ms=50)
    accepted: list[tuple[int, str, int]] = []
    with ExitStack() as stack:
        wallets = [1] * 6 + [2, 3, 4, 5, 6, 7]  # half of them share a wallet
        processes = [stack.enter_context(worker(path, wallet, 6)) for wallet in wallets]
        assert {line(process) for process in processes} == {"ready"}
        for process in processes:
            start(process)
        for wallet, process in zip(wallets, processes, strict=True):
            accepted += [(wallet, *receipt) for receipt in receipts(process)]
        assert len(accepted) == 12 * 6
        async with open_embedded(path, poll_s=0.02, seal=False) as ledger:  # only the others seal
            blocks = await calls_until(ledger, {call_hash for _, call_hash, _ in accepted})
    found = [call.call_hash.hex() for block in blocks for call in block.calls]
    assert sorted(found) == sorted(call_hash for _, call_hash, _ in accepted)
    for number in set(wallets):
        nonces = {call_hash: nonce for wallet, call_hash, nonce in accepted if wallet == number}
        assert [nonces[call] for call in found if call in nonces] == list(range(len(nonces)))
    times = [block.time_ms for block in blocks]
    assert all(later - earlier >= 50 for earlier, later in pairwise(times))


@pytest.mark.parametrize("kill_after", [1, 4, 17])
async def test_what_was_receipted_survives_kill_9(ledger_path: Path, kill_after: int) -> None:
    receipted: list[tuple[str, int]] = []
    for _ in range(2):  # the second process opens what the first left behind
        with worker(ledger_path, 1, 1_000_000) as process:
            assert line(process) == "ready"
            start(process)
            for count, receipt in enumerate(receipts(process), 1):
                receipted.append(receipt)
                if count == kill_after:
                    process.kill()  # those on the way in the pipe count as well
    async with open_embedded(ledger_path, poll_s=0.02) as ledger:
        blocks = await calls_until(ledger, {call_hash for call_hash, _ in receipted})
    found = [call.call_hash.hex() for block in blocks for call in block.calls]
    assert len(found) == len(set(found))
    assert all(found[nonce] == call_hash for call_hash, nonce in receipted)  # calls of one wallet, in nonce order
