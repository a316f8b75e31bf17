"""The blocking half: sealing times, the pool, nonces, opening and damage."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisar_p2p.errors import CallRejected, LedgerCorrupt, LedgerError
from kaisar_p2p.ledger import Block, ChainParameters, EmbeddedLedger, Receipt, sign_call
from kaisar_p2p.ledger.chain import RawBlock, check_block
from kaisar_p2p.ledger.file import LedgerFile
from kaisar_p2p.wire.crypto import sha256

START_MS = 1_700_000_000_000
Make = Callable[..., Path]


def append(file: LedgerFile, wallet: Any, payload: bytes = b"pay") -> Receipt:
    return file.append(wallet.public_key, lambda n: (n, sign_call(payload, n, wallet, file.network)))


def append_at(file: LedgerFile, wallet: Any, nonce: int) -> Receipt:
    signed = sign_call(b"pay", nonce, wallet, file.network)
    return file.append(wallet.public_key, lambda _: (nonce, signed))


def seal(file: LedgerFile) -> None:
    head = file.head()
    assert file.seal(head, head.time_ms + file.parameters.block_time_ms)


def chain(file: LedgerFile) -> list[Block]:
    """All blocks up to the head, checked."""
    blocks: list[Block] = []
    while len(blocks) <= file.head().number:
        for raw in file.read(len(blocks), file.head().number):
            blocks.append(check_block(raw, blocks[-1] if blocks else None, file.network))
    return blocks


def execute(path: Path, *statements: str) -> None:
    """Change the file behind the ledger's back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


# --- creating and opening ---


def test_a_new_ledger_holds_its_genesis_and_parameters(make_ledger: Make) -> None:
    path = make_ledger(genesis=b"document", block_time_ms=77, pool_calls=9)
    with closing(LedgerFile(path)) as file:
        assert (file.genesis, file.network) == (b"document", sha256(b"document"))
        assert (file.parameters.block_time_ms, file.parameters.pool_calls) == (77, 9)
        [genesis] = chain(file)
        assert (genesis.number, genesis.parent, genesis.time_ms, genesis.calls) == (0, bytes(32), START_MS, ())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no draft, no log left behind


def test_commits_reach_the_disk_before_they_count(ledger_path: Path) -> None:
    with closing(LedgerFile(ledger_path)) as file:
        pragmas = [file._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    assert pragmas == [2, "wal"]  # FULL


def test_an_existing_ledger_is_not_overwritten(make_ledger: Make) -> None:
    path = make_ledger()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="exists"):
        make_ledger()
    assert path.read_bytes() == before


def test_of_several_who_create_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger"

    def create(number: int) -> bytes | None:
        try:
            return EmbeddedLedger.create(path, b"document %d" % number, time_ms=START_MS)
        except LedgerError:
            return None

    with ThreadPoolExecutor(8) as pool:
        [network] = [network for network in pool.map(create, range(8)) if network]
    with closing(LedgerFile(path)) as file:
        assert file.network == network


def test_wrong_parameters_and_documents_are_refused(tmp_path: Path) -> None:
    for wrong in ({"block_time_ms": 0}, {"finality_lag": -1}, {"block_bytes": 1000}, {"pool_calls": 1 << 50}):
        with pytest.raises(LedgerError, match=next(iter(wrong))):
            ChainParameters(**wrong)
    with pytest.raises(LedgerError, match="0 bytes"):
        EmbeddedLedger.create(tmp_path / "ledger", b"", time_ms=0)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LedgerError, match="cannot create"):
        EmbeddedLedger.create(tmp_path / "file" / "ledger", b"document", time_ms=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no ledger at"), (b"", "not a Kaisar ledger"), (b"text" * 2000, "not a Kaisar ledger")],
)
def test_what_is_no_ledger_is_not_opened(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "ledger"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LedgerError, match=message) as error:
        LedgerFile(path)
    assert error.value.hint


def test_another_database_is_not_opened(tmp_path: Path) -> None:
    execute(tmp_path / "other", "CREATE TABLE blocks (number)")
    with pytest.raises(LedgerError, match="not a Kaisar ledger"):
        LedgerFile(tmp_path / "other")


@pytest.mark.parametrize(("version", "message"), [(0, "older ledger format"), (99, "newer ledger format")])
def test_another_format_is_not_opened(ledger_path: Path, version: int, message: str) -> None:
    execute(ledger_path, f"PRAGMA user_version={version}")
    with pytest.raises(LedgerError, match=message):
        LedgerFile(ledger_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_named(ledger_path: Path) -> None:
    ledger_path.chmod(0o400)
    with pytest.raises(LedgerError, match="cannot be read and written"):
        LedgerFile(ledger_path)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE genesis SET document = 'other'",
        "UPDATE genesis SET document = x'00'",
        "DELETE FROM genesis",
        "DELETE FROM blocks",
        "DELETE FROM parameters WHERE name = 'finality_lag'",
        "UPDATE blocks SET time_ms = 5 WHERE number = 0",
    ],
)
def test_a_damaged_genesis_is_refused(ledger_path: Path, damage: str) -> None:
    execute(ledger_path, damage)
    with pytest.raises(LedgerCorrupt, match="block 0"):
        LedgerFile(ledger_path)


def test_overwritten_pages_are_an_error_never_a_crash(ledger_path: Path, wallet: Any) -> None:
    with closing(LedgerFile(ledger_path)) as file:
        for _ in range(30):
            append(file, wallet, bytes(2000))
            seal(file)
    content = ledger_path.read_bytes()
    for page in range(1, len(content) // 4096):
        ledger_path.write_bytes(content[: page * 4096] + b"\xa5" * 4096 + content[(page + 1) * 4096 :])
        with suppress(LedgerError), closing(LedgerFile(ledger_path)) as file:
            assert len(chain(file)) == 31
            assert file.next_nonce(wallet.public_key) == 30
            assert file.call_id(bytes(32)) is None
            assert [file.block_of(number + 1) for number in range(30)] == [number + 1 for number in range(30)]


# --- sealing ---


def test_blocks_stand_on_the_grid_of_due_times(make_ledger: Make) -> None:
    with closing(LedgerFile(make_ledger(block_time_ms=100))) as file:
        for now_ms in (START_MS + 100, START_MS + 299, START_MS + 300):  # in time, late by less than a block, in time
            assert file.seal(file.head(), now_ms)
        assert [block.time_ms - START_MS for block in chain(file)] == [0, 100, 200, 300]


def test_a_ledger_that_slept_goes_on_without_a_burst(make_ledger: Make) -> None:
    with closing(LedgerFile(make_ledger(block_time_ms=100))) as file:
        assert file.seal(file.head(), START_MS + 5_050)
        assert file.seal(file.head(), START_MS + 5_151)
        assert [block.time_ms - START_MS for block in chain(file)] == [0, 5_050, 5_150]


def test_time_never_runs_backwards(make_ledger: Make) -> None:
    with closing(LedgerFile(make_ledger(block_time_ms=100))) as file:
        for now_ms in (START_MS + 100, 0, START_MS - 1):
            assert file.seal(file.head(), now_ms)
        assert [block.time_ms - START_MS for block in chain(file)] == [0, 100, 200, 300]


def test_only_one_of_several_seals_a_block(ledger_path: Path) -> None:
    with closing(LedgerFile(ledger_path)) as one, closing(LedgerFile(ledger_path)) as two:
        head = one.head()
        assert [file.seal(head, START_MS + 20) for file in (one, two, one)] == [True, False, False]
        assert two.head().number == 1


def test_blocks_are_bounded_in_calls_and_bytes(make_ledger: Make, wallet: Any) -> None:
    with closing(LedgerFile(make_ledger(block_calls=3, block_bytes=100_000))) as file:
        for size in (60_000, 60_000, 10, 10, 10, 10):
            append(file, wallet, bytes(size))
        for _ in range(4):
            seal(file)
        sizes = [[len(call.payload) for call in block.calls] for block in chain(file)]
        assert sizes == [[], [60_000], [60_000, 10, 10], [10, 10], []]


# --- pool and nonces ---


def test_the_pool_is_bounded_and_drains(make_ledger: Make, make_wallet: Any) -> None:
    with closing(LedgerFile(make_ledger(pool_calls=3, account_pool_calls=2))) as file:
        one, two = make_wallet(1), make_wallet(2)
        append(file, one)
        append(file, one)
        with pytest.raises(CallRejected, match=r"2 calls of .* waiting") as rejected:
            append(file, one)
        assert "next block" in rejected.value.hint
        append(file, two)
        with pytest.raises(CallRejected, match="pool is full"):
            append(file, two)
        seal(file)
        assert [append(file, one).nonce, append(file, two).nonce] == [2, 1]


def test_replays_used_nonces_and_gaps_are_refused(ledger_path: Path, wallet: Any) -> None:
    with closing(LedgerFile(ledger_path)) as file:
        with pytest.raises(CallRejected, match=r"nonce 1 .* too high"):
            append_at(file, wallet, 1)
        append_at(file, wallet, 0)
        for _ in range(2):  # in the pool, then in a block
            with pytest.raises(CallRejected, match="duplicate"):
                append_at(file, wallet, 0)
            other = sign_call(b"another", 0, wallet, file.network)
            with pytest.raises(CallRejected, match=r"nonce 0 .* used") as rejected:
                file.append(wallet.public_key, lambda _, other=other: (0, other))
            assert "nonce 1" in rejected.value.hint
            with pytest.raises(CallRejected, match="too high"):
                append_at(file, wallet, 2**64 - 1)
            seal(file)
        assert [len(block.calls) for block in chain(file)] == [0, 1, 0]


def test_a_refused_call_leaves_nothing_behind(ledger_path: Path, wallet: Any) -> None:
    with closing(LedgerFile(ledger_path)) as file:

        def fail(_: int) -> tuple[int, bytes]:
            raise RuntimeError("the wallet is locked")

        with pytest.raises(RuntimeError):
            file.append(wallet.public_key, fail)
        assert append(file, wallet).nonce == 0


def test_calls_are_found_in_their_block(ledger_path: Path, wallet: Any) -> None:
    with closing(LedgerFile(ledger_path)) as file:
        first, second = append(file, wallet), append(file, wallet)
        call_id = file.call_id(first.call_hash)
        assert call_id is not None and file.block_of(call_id) is None
        seal(file)
        seal(file)
        third = append(file, wallet)
        seal(file)
        ids = [file.call_id(receipt.call_hash) for receipt in (first, second, third)]
        assert [file.block_of(call_id) for call_id in ids if call_id] == [1, 1, 3]
        assert file.call_id(bytes(32)) is None


# --- reorganisation ---


def test_a_reorganisation_keeps_calls_and_final_blocks(ledger_path: Path, wallet: Any) -> None:
    with closing(LedgerFile(ledger_path)) as file:
        for _ in range(4):
            append(file, wallet)
            seal(file)
        before = chain(file)
        append(file, wallet)
        file.replace(2)
        after = chain(file)
        assert after[:3] == before[:3]
        assert all(new.hash != old.hash for new, old in zip(after[3:], before[3:], strict=True))
        seal(file)
        assert sum(len(block.calls) for block in chain(file)) == 5
        for depth in (0, 3, 100):
            with pytest.raises(LedgerError, match="cannot replace"):
                file.replace(depth)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3), st.integers(-1, 1)),
        st.tuples(st.just("seal"), st.just(0), st.integers(-50, 200)),
        st.tuples(st.just("replace"), st.just(0), st.integers(1, 2)),
    ),
    max_size=30,
)


@settings(max_examples=25)
@given(steps=steps)
def test_every_accepted_call_is_on_the_chain_once_in_nonce_order(
    tmp_path_factory: pytest.TempPathFactory, make_wallet: Any, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("chain") / "ledger"
    EmbeddedLedger.create(
        path, b"document", time_ms=START_MS, parameters=ChainParameters(block_time_ms=100, block_calls=2)
    )
    wallets = {number: make_wallet(number) for number in (1, 2, 3)}
    accepted: list[bytes] = []
    with closing(LedgerFile(path)) as file:
        file._connection.execute("PRAGMA synchronous=OFF")
        for kind, number, value in steps:
            if kind == "append":
                expected = file.next_nonce(wallets[number].public_key)
                nonce = max(0, expected + value)
                if nonce == expected:
                    accepted.append(append_at(file, wallets[number], nonce).call_hash)
                else:
                    with pytest.raises(CallRejected):
                        append_at(file, wallets[number], nonce)
            elif kind == "seal":
                file.seal(file.head(), file.head().time_ms + value)
            elif file.head().number >= value:
                file.replace(value)
        while file.head().last_call < len(accepted):
            seal(file)
        blocks = chain(file)
    assert [call.call_hash for block in blocks for call in block.calls] == accepted
    assert [call.index for block in blocks for call in block.calls] == [
        (i,) for block in blocks for i in range(len(block.calls))
    ]
    for one, two in pairwise(blocks):
        assert (two.number, two.parent) == (one.number + 1, one.hash) and two.time_ms > one.time_ms


# --- checking blocks ---


def test_reading_stops_at_its_bound_and_goes_on(ledger_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kaisar_p2p.ledger.file.READ_BLOCKS", 4)
    with closing(LedgerFile(ledger_path)) as file:
        for _ in range(10):
            seal(file)
        assert [raw.number for raw in file.read(3, 10)] == [3, 4, 5, 6]
        assert len(chain(file)) == 11


@pytest.mark.parametrize("field", ["hash", "parent", "time_ms", "signed_calls", "number"])
def test_a_changed_block_is_named(ledger_path: Path, wallet: Any, field: str) -> None:
    with closing(LedgerFile(ledger_path)) as file:
        append(file, wallet)
        seal(file)
        genesis, raw = file.read(0, 1)
        network = file.network
    values: dict[str, Any] = {
        "hash": bytes(32), "parent": bytes(32), "time_ms": raw.time_ms + 1, "signed_calls": (), "number": 2,
    }  # fmt: skip
    changed = RawBlock(**{**raw.__dict__, field: values[field]})
    with pytest.raises(LedgerCorrupt, match="block 1") as error:
        check_block(changed, genesis, network)
    assert error.value.hint
    assert check_block(raw, genesis, network).calls[0].payload == b"pay"
