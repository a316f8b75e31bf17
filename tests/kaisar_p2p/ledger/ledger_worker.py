"""A process that submits calls and seals blocks: `ledger_worker.py FILE WALLET CALLS`.

Prints "ready", waits for a line, then prints a receipt a line; stays, sealing, until its input ends.
"""

from __future__ import annotations

import sys
from functools import partial

import trio
from conftest import Wallet  # beside this script

from kaisar_p2p.ledger import open_embedded


async def work(path: str, number: int, calls: int) -> None:
    wallet = Wallet(number)
    async with open_embedded(path, poll_s=0.02) as ledger:
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        for _ in range(calls):
            receipt = await ledger.submit(b"pay", wallet)
            print(receipt.call_hash.hex(), receipt.nonce, flush=True)
        print("done", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)


trio.run(partial(work, sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
