"""The journal must hold against crashes, full disks and second thoughts."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import StoreError
from node.store import EVENTS_KEPT, NodeStore
from protocols.actions import Duty, Note, Store


@pytest.fixture
def store(tmp_path: Path) -> NodeStore:
    return NodeStore(tmp_path / "node.sqlite")


def test_a_duty_is_done_once_or_again_the_same_never_differently(store: NodeStore) -> None:
    assert store.commit([Duty("vote/1", b"a")], [], [], 1.0) == frozenset()
    assert store.commit([Duty("vote/1", b"a")], [], [], 2.0) == frozenset()
    assert store.commit([Duty("vote/1", b"b"), Duty("vote/2", b"b")], [], [], 3.0) == {"vote/1"}
    assert store.commit([Duty("vote/2", b"c")], [], [], 4.0) == {"vote/2"}


def test_duties_survive_a_reopened_file(tmp_path: Path) -> None:
    first = NodeStore(tmp_path / "node.sqlite")
    first.commit([Duty("vote/1", b"a")], [Store("body", b"k", b"v")], [Note("x", (("n", 1),))], 1.0)
    first.close()
    again = NodeStore(tmp_path / "node.sqlite")
    assert again.commit([Duty("vote/1", b"b")], [], [], 2.0) == {"vote/1"}
    assert list(again.items("body")) == [(b"k", b"v")]
    assert [(event.kind, event.data) for event in again.events(0, 10)] == [("x", {"n": 1})]


def test_nobody_else_can_read_what_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = NodeStore(tmp_path / "node.sqlite")
        store.commit([Duty("vote/1", b"a")], [], [], 1.0)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert "node.sqlite-wal" in modes
    assert set(modes.values()) == {0o600}


def test_kill_9_after_commit_loses_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from node.store import NodeStore\n"
        "from protocols.actions import Duty\n"
        "store = NodeStore(pathlib.Path(sys.argv[1]))\n"
        "n = 0\n"
        "while True:\n"
        "    store.commit([Duty(f'vote/{n}', b'a')], [], [], 1.0)\n"
        "    print(n, flush=True)\n"
        "    n += 1\n"
    )
    path = tmp_path / "node.sqlite"
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(20):
        last = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    rest = [int(line) for line in child.stdout.read().split()]
    last = max([last, *rest])
    reopened = NodeStore(path)
    for n in range(last + 1):
        assert reopened.commit([Duty(f"vote/{n}", b"other")], [], [], 2.0) == {f"vote/{n}"}


def test_a_full_disk_writes_nothing_and_says_so_and_goes_on_later(store: NodeStore) -> None:
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreError, match="full"):
        store.commit([Duty("vote/1", b"a")], [Store("body", b"k", bytes(100_000))], [], 1.0)
    assert store.item("body", b"k") is None
    store._db.execute("PRAGMA max_page_count=100000")
    # the duty was rolled back with the rest, so it may still be done
    assert store.commit([Duty("vote/1", b"other")], [], [], 2.0) == frozenset()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    path.write_bytes(b"not a database, but long enough to look at " * 40)
    with pytest.raises(StoreError, match="cannot open"):
        NodeStore(path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(StoreError, match="schema 99"):
        NodeStore(path)


def test_prune_bounds_items_and_events(store: NodeStore) -> None:
    for n in range(30):
        store.commit([], [Store("body", bytes([n]), b"v")], [], float(n))
    store.commit([], [], [Note("tick")] * (EVENTS_KEPT + 5), 31.0)
    store.prune(40.0, {"body": 10})
    assert [key[0] for key, _ in store.items("body")] == list(range(20, 30))
    assert len(store.events(0, 10 * EVENTS_KEPT)) == EVENTS_KEPT


@given(st.lists(st.tuples(st.sampled_from("abc"), st.binary(min_size=1, max_size=1)), max_size=20))
def test_the_first_digest_of_each_duty_stands(steps: list[tuple[str, bytes]]) -> None:
    model: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(NodeStore(Path(directory) / "s")) as store:
        for key, digest in steps:
            refused = store.commit([Duty(key, digest)], [], [], 0.0)
            assert (key in refused) == (model.setdefault(key, digest) != digest)


def test_what_the_mesh_keeps_survives_a_reopened_file_and_is_not_pruned(tmp_path: Path) -> None:
    first = NodeStore(tmp_path / "node.sqlite")
    assert first.load("reputation") is None
    first.save("reputation", b"old")
    first.save("reputation", b"new")
    first.prune(1e12, {"body": 0})
    first.close()
    again = NodeStore(tmp_path / "node.sqlite")
    assert again.load("reputation") == b"new"
    again.close()
    with pytest.raises(StoreError):
        again.load("reputation")
