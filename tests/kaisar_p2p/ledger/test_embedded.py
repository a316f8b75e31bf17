"""The embedded ledger as the node sees it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import CallRejected, LedgerCorrupt, LedgerError
from kaisar_p2p.ledger import Block, Checkpoint, FaultyLedger, Ledger, open_embedded, sign_call

POLL_S = 0.005
PATIENCE_S = 20.0
Make = Callable[..., Path]


async def take(ledger: Ledger, count: int, checkpoint: Checkpoint | None = None) -> list[Block]:
    """The first `count` blocks after the checkpoint."""
    blocks: list[Block] = []
    with trio.fail_after(PATIENCE_S):
        async with aclosing(ledger.follow(checkpoint)) as following:
            async for block in following:
                blocks.append(block)
                if len(blocks) == count:
                    break
    return blocks


def execute(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, values)


async def test_a_submitted_call_becomes_final(ledger_path: Path, wallet: Any) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        receipts = [await ledger.submit(payload, wallet) for payload in (b"one", b"two")]
        assert [receipt.nonce for receipt in receipts] == [0, 1]
        number = await ledger.wait_final(receipts[1].call_hash, PATIENCE_S)
        final = await ledger.finalized()
        head = await ledger.head()
        assert number <= final.number == head.number - 2
        blocks = await take(ledger, number + 1)
        calls = [call for block in blocks for call in block.calls]
        assert [call.payload for call in calls] == [b"one", b"two"]
        assert [call.call_hash for call in calls] == [receipt.call_hash for receipt in receipts]
        assert {call.signer for call in calls} == {wallet.public_key}


async def test_following_from_any_checkpoint_gives_the_rest(ledger_path: Path, wallet: Any) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        for _ in range(5):
            await ledger.submit(b"pay", wallet)
        blocks = await take(ledger, 8)
        for position, block in enumerate(blocks[:-1]):
            assert await take(ledger, 7 - position, block.checkpoint) == blocks[position + 1 :]
    async with open_embedded(ledger_path, poll_s=POLL_S, verify_signatures=False) as again:
        assert await take(again, 8) == blocks


async def test_block_0_is_final_at_once(make_ledger: Make) -> None:
    async with open_embedded(make_ledger(finality_lag=1000), seal=False) as ledger:
        [genesis] = await take(ledger, 1)
        assert await ledger.finalized() == genesis.checkpoint == await ledger.head()


async def test_a_checkpoint_of_another_chain_is_refused(ledger_path: Path) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        blocks = await take(ledger, 3)
        for wrong in (Checkpoint(2, bytes(32)), Checkpoint(10**6, blocks[2].hash)):
            with pytest.raises(LedgerError, match="is not among") as error:
                await take(ledger, 1, wrong)
            assert "start over" in error.value.hint


async def test_several_followers_see_the_same(ledger_path: Path) -> None:
    seen: list[list[Block]] = []
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger, open_embedded(ledger_path, poll_s=POLL_S) as other:

        async def follow(source: Ledger) -> None:
            seen.append(await take(source, 6))

        async with trio.open_nursery() as nursery:
            for source in (ledger, other, ledger):
                nursery.start_soon(follow, source)
    assert seen[0] == seen[1] == seen[2]


async def test_a_clock_that_was_set_back_does_not_stop_the_chain(ledger_path: Path) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S, now_ms=lambda: 0) as ledger:
        blocks = await take(ledger, 3)
        assert [block.time_ms - blocks[0].time_ms for block in blocks] == [0, 20, 40]


async def test_calls_signed_elsewhere(ledger_path: Path, wallet: Any) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        signed = sign_call(b"pay", await ledger.next_nonce(wallet.public_key), wallet, ledger.network)
        receipt = await ledger.submit_signed(signed)
        assert await ledger.wait_final(receipt.call_hash, PATIENCE_S) >= 1
        with pytest.raises(CallRejected, match="duplicate"):
            await ledger.submit_signed(signed)
        with pytest.raises(CallRejected, match="not a signed call"):
            await ledger.submit_signed(b"noise")
        elsewhere = sign_call(b"pay", 1, wallet, bytes(32))
        with pytest.raises(CallRejected, match="bad signature") as rejected:
            await ledger.submit_signed(elsewhere)
        assert "network" in rejected.value.hint


async def test_a_call_that_never_comes_is_given_up(ledger_path: Path) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        with pytest.raises(LedgerError, match="not final after"):
            await ledger.wait_final(bytes(32), 0.05)


async def test_the_callers_own_error_comes_out_as_it_is(ledger_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_embedded(ledger_path):
            raise ZeroDivisionError
    with trio.move_on_after(0.01) as scope:
        async with open_embedded(ledger_path):
            await trio.sleep_forever()
    assert scope.cancelled_caught


# --- damage ---


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE blocks SET hash = zeroblob(32) WHERE number = 3", "block 3: its hash"),
        ("UPDATE blocks SET parent = zeroblob(32) WHERE number = 3", "block 3: does not link"),
        ("UPDATE blocks SET time_ms = time_ms + 1 WHERE number = 3", "block 3: its hash"),
        ("UPDATE blocks SET time_ms = -1 WHERE number = 3", "block 3: is not later"),
        ("DELETE FROM blocks WHERE number = 3", "block 3: missing"),
        ("UPDATE calls SET signed = x'00'", "block 1: its hash"),
        ("DELETE FROM calls", "block 1: its hash"),
    ],
)
async def test_tampering_is_found_and_named(ledger_path: Path, wallet: Any, statement: str, reason: str) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        receipt = await ledger.submit(b"pay", wallet)
        await take(ledger, 6)
        if "calls" in statement:
            reason = reason.replace("block 1", f"block {await ledger.wait_final(receipt.call_hash, PATIENCE_S)}")
    execute(ledger_path, statement)
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        with pytest.raises(LedgerCorrupt, match=reason):
            await take(ledger, 6)


async def test_a_badly_signed_call_in_a_block_is_found(ledger_path: Path, make_wallet: Any) -> None:
    honest, thief = make_wallet(1), make_wallet(2)
    async with open_embedded(ledger_path, seal=False) as ledger:
        good = sign_call(b"pay", 0, honest, ledger.network)
        forged = good[:-64] + sign_call(b"pay", 0, thief, ledger.network)[-64:]
    execute(ledger_path, "INSERT INTO calls VALUES (1, ?, ?, 0, ?)", bytes(32), honest.public_key, forged)
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        with pytest.raises(LedgerCorrupt, match="block 1: call 0: bad signature"):
            await take(ledger, 3)
    async with open_embedded(ledger_path, poll_s=POLL_S, verify_signatures=False) as ledger:
        assert (await take(ledger, 2))[1].calls[0].payload == b"pay"


async def test_a_ledger_that_breaks_while_open_ends_its_followers(ledger_path: Path) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        await take(ledger, 3)
        execute(ledger_path, "DELETE FROM blocks")
        with pytest.raises(LedgerCorrupt):
            await take(ledger, 100)


# --- a full disk ---


async def test_a_full_disk_refuses_loses_nothing_and_recovers(
    ledger_path: Path, wallet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaisar_p2p.ledger.embedded.RETRY_S", 0.01)
    accepted = []
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        disk = ledger._writes._connection
        (pages,) = disk.execute("PRAGMA page_count").fetchone()
        disk.execute(f"PRAGMA max_page_count={pages + 40}")
        with pytest.raises(LedgerError, match="disk is full") as error:
            while True:
                accepted.append(await ledger.submit(bytes(20_000), wallet))
        assert "space" in error.value.hint
        with pytest.raises(LedgerError, match="disk is full"):
            await ledger.submit(bytes(60_000), wallet)
        disk.execute("PRAGMA max_page_count=1000000")
        accepted.append(await ledger.submit(b"again", wallet))
        assert [receipt.nonce for receipt in accepted] == list(range(len(accepted)))
        last = await ledger.wait_final(accepted[-1].call_hash, PATIENCE_S)
        blocks = await take(ledger, last + 1)
    assert len(accepted) > 1
    assert [call.call_hash for block in blocks for call in block.calls] == [receipt.call_hash for receipt in accepted]


async def test_a_lasting_fault_is_logged_once(
    ledger_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kaisar_p2p.ledger.embedded.RETRY_S", 0.001)
    caplog.set_level("INFO")
    failed = 0
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        seal = ledger._writes.seal

        def full(*arguments: Any) -> Any:
            nonlocal failed
            failed += 1
            if failed <= 20:
                raise LedgerError("the disk is full")
            return seal(*arguments)

        monkeypatch.setattr(ledger._writes, "seal", full)
        await take(ledger, (await ledger.finalized()).number + 5)
    told = [record.message for record in caplog.records if record.name == "kaisar_p2p.ledger.embedded"]
    assert failed > 20
    assert told == ["no new block: the disk is full", "blocks are made again"]


# --- simulated faults ---


async def test_a_dropped_submission_never_arrives_and_its_nonce_is_free(ledger_path: Path, wallet: Any) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as inner:
        ledger = FaultyLedger(inner, drop_next=1)
        lost = await ledger.submit(b"lost", wallet)
        kept = await ledger.submit(b"kept", wallet)
        assert (lost.nonce, kept.nonce) == (0, 0)
        number = await ledger.wait_final(kept.call_hash, PATIENCE_S)
        calls = [call for block in await take(ledger, number + 1) for call in block.calls]
        assert [call.call_hash for call in calls] == [kept.call_hash]
        assert (ledger.network, ledger.genesis) == (inner.network, inner.genesis)


async def test_a_lagging_follower_gets_the_same_blocks_later(ledger_path: Path) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as inner:
        ledger = FaultyLedger(inner, lag_blocks=3)
        late = await take(ledger, 2)
        assert (await ledger.finalized()).number >= late[-1].number + 3
        assert (await ledger.head()).number >= late[-1].number + 5
        assert late == await take(inner, 2)


async def test_a_reorganisation_changes_the_head_and_nothing_final(ledger_path: Path, wallet: Any) -> None:
    async with open_embedded(ledger_path, poll_s=POLL_S) as ledger:
        before = await take(ledger, 4)
        receipt = await ledger.submit(b"pay", wallet)
        for _ in range(3):
            await ledger.replace_unfinalized(2)
        number = await ledger.wait_final(receipt.call_hash, PATIENCE_S)
        after = await take(ledger, number + 1)
        assert after[:4] == before[: len(after)]
        assert [call.call_hash for block in after for call in block.calls] == [receipt.call_hash]
