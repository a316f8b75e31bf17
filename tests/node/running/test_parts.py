"""Small parts of a node: its memory of gossip, its address book, its log, its clock, its one worker thread."""

from __future__ import annotations

import io
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from immutables import Map

from kaisar_p2p.errors import HardwareError, StoreError
from kaisar_p2p.hardware.prove import Proof, select_backend
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import open_signed, seal
from kaisar_p2p.wire.matproof import CheckResult, Job, tags_root
from node import index as index_module
from node.clock import Clock
from node.compute import Computer
from node.config import Config
from node.inbox import RULES, Inbox, Lane
from node.index import EVENTS_PER_LEASE, Index
from node.log import configure_logging
from node.peers import MAX_BOOTSTRAP, PeerKeeper
from node.registration import offered_spec, self_test
from node.store import NodeStore
from protocols.actions import BlockApplied, CheckTask, Duty, Gossip, Note, ProveTask, RequestEnded, Wake
from protocols.adverts import CPU_CLASS, GPU_CLASS, Heartbeat, Spec, WorkerAdvert
from protocols.deploy import DEPLOYING, OPEN, LeaseEvent
from protocols.genesis import Genesis, genesis_state, write_genesis
from protocols.quorum import QuorumCertificate, VerdictCore

NETWORK = bytes(32)
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")
KEYS = [KeyPair.from_seed(bytes([n]) * 32) for n in range(1, 7)]


def advert(keys: KeyPair, issued_ms: int, addrs: tuple[str, ...] = ()) -> Gossip:
    made = WorkerAdvert(keys.public_key, bytes(32), issued_ms, addrs, SPEC, SPEC, 1, 0, 0, "process")
    return gossip("advert", open_signed(WorkerAdvert, seal(made, keys, NETWORK), NETWORK))


def gossip(topic: str, message: Any) -> Gossip:
    return Gossip(topic, message, b"s" * 32, 5.0)


# ── index ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_newest_advert_of_a_worker_is_kept() -> None:
    index = Index()
    for issued_ms in (1_000, 3_000, 2_000):
        assert index.step(advert(KEYS[0], issued_ms), 0.0) == []
    assert index.adverts[KEYS[0].public_key].issued_ms == 3_000
    assert index.live_adverts(4.0, 1_000) == [index.adverts[KEYS[0].public_key]]
    assert index.live_adverts(4.001, 1_000) == []


def test_the_index_is_bounded_and_keeps_who_spoke_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "WORKERS_KEPT", 3)
    monkeypatch.setattr(index_module, "LEASES_KEPT", 2)
    index = Index()
    for keys in (*KEYS[:3], KEYS[0], *KEYS[3:5]):
        index.step(advert(keys, 1_000 + len(index.adverts)), 0.0)
        heartbeat = Heartbeat(keys.public_key, 1, 1, 0, 0)
        index.step(gossip("heartbeat", open_signed(Heartbeat, seal(heartbeat, keys, NETWORK), NETWORK)), 0.0)
    assert list(index.adverts) == [keys.public_key for keys in (KEYS[0], KEYS[3], KEYS[4])]
    assert list(index.heartbeats) == [keys.public_key for keys in (KEYS[0], KEYS[3], KEYS[4])]
    for number in range(3 * (EVENTS_PER_LEASE + 5)):
        order_id = bytes([number % 3]) * 32
        event = LeaseEvent(order_id, KEYS[0].public_key, number, DEPLOYING, OPEN, "deploying", "", 1, 0)
        index.step(gossip("lease", open_signed(LeaseEvent, seal(event, KEYS[0], NETWORK), NETWORK)), 0.0)
    assert len(index.lease_events) == 2
    assert all(len(events) <= EVENTS_PER_LEASE for events in index.lease_events.values())


def test_certificates_and_evidence_are_kept_with_their_time() -> None:
    index = Index()
    certificate = QuorumCertificate(VerdictCore(0, 1, bytes(32), bytes(32), 1), 1, (bytes(64),))
    index.step(gossip("certificate", certificate), 0.0)
    index.step(gossip("evidence", SimpleNamespace(kind="evidence")), 0.0)
    index.step(gossip("epoch", object()), 0.0)
    index.step(Wake(), 0.0)
    assert list(index.certificates) == [(5.0, certificate)]
    assert [at for at, _ in index.evidence] == [5.0]
    assert index.deadline is None


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Book:
    """A mesh's address book."""

    def __init__(self) -> None:
        self.kept: list[tuple[bytes, tuple[str, ...]]] = []
        self.added: list[tuple[bytes, tuple[str, ...]]] = []

    def keep_connected(self, key: bytes, addrs: tuple[str, ...], *, asked_for: bool = False) -> None:
        self.kept.append((key, addrs))

    def add_addresses(self, key: bytes, addrs: tuple[str, ...]) -> None:
        self.added.append((key, addrs))

    def __getattr__(self, name: str) -> Any:  # whatever else the keeper may ask of a mesh
        return lambda *arguments, **named: None


def test_peers_come_from_join_bootstrap_records_and_adverts() -> None:
    state = genesis_state(write_genesis(Genesis("test", "demo", 0)))
    records = Map({bytes([n]) * 32: (f"/ip4/127.0.0.1/tcp/{4000 + n}",) for n in range(1, MAX_BOOTSTRAP + 10)})
    book = Book()
    keeper = PeerKeeper(book, ())  # type: ignore[arg-type]
    event = BlockApplied(replace(state, bootstrap=records), ())
    assert keeper.step(event, 0.0) == []
    assert len(book.kept) == MAX_BOOTSTRAP
    known = [key for key, _ in (*book.kept, *book.added)]
    keeper.step(event, 1.0)
    assert [key for key, _ in (*book.kept, *book.added)] == known, "the same records again are no news"
    keeper.step(advert(KEYS[0], 1, ("/ip4/127.0.0.1/tcp/1",)), 0.0)
    assert book.added[-1] == (KEYS[0].public_key, ("/ip4/127.0.0.1/tcp/1",))


# ── log and clock ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_json_log_is_one_object_a_line_whatever_is_logged(root_logger: None) -> None:
    stream = io.StringIO()
    configure_logging("info", as_json=True, stream=stream)
    configure_logging("info", as_json=True, stream=stream)  # once more adds no second handler
    log = logging.getLogger("node.test")
    log.debug("not shown")
    log.info("two\nlines and a “quote” of %s", "ü\u2028")
    try:
        raise ValueError("inner\nerror")
    except ValueError:
        log.exception("failed")
    logging.getLogger("libp2p.noise").warning("not shown")
    lines = [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]
    assert [line["level"] for line in lines] == ["info", "error"]
    assert lines[0]["message"] == "two\nlines and a “quote” of ü\u2028"
    assert "inner" in lines[1]["exception"]
    assert lines[0]["time"].endswith("Z")


def test_a_text_log_names_its_source(root_logger: None) -> None:
    stream = io.StringIO()
    configure_logging("warning", as_json=False, stream=stream)
    logging.getLogger("node.test").warning("careful")
    logging.getLogger("node.test").info("not shown")
    assert stream.getvalue().count("\n") == 1
    assert "node.test: careful" in stream.getvalue()


def test_the_clock_ignores_changes_of_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock.now() >= before


# ── computing ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_proof_and_its_check() -> None:
    job, seed = Job(128, 128, 128, 1), os.urandom(32)
    computer = Computer(select_backend())
    with trio.fail_after(60):
        proof: Any = await computer.run(ProveTask(job, seed))
        tags = tuple(each.astype("<u4", copy=False).tobytes() for each in proof.tags)
        checked = await computer.run(CheckTask(job, seed, proof.roots, tags, bytes(32), 1))
        assert isinstance(checked, CheckResult)
        assert checked.ok
        wrong = await computer.run(CheckTask(job, os.urandom(32), proof.roots, tags, bytes(32), 1))
        assert isinstance(wrong, CheckResult)
        assert not wrong.ok


class WrongBackend:
    """Commits, consistently, to what it did not compute."""

    name = "wrong"

    def prove(self, job: Job, seed: bytes, should_stop: Any = None) -> Proof:
        honest = select_backend("numpy").prove(job, seed)
        tags = tuple(each ^ np.uint32(1) for each in honest.tags)
        return Proof(tuple(tags_root(each) for each in tags), tags)


async def test_a_backend_that_computes_wrongly_fails_its_self_test() -> None:
    await self_test(Computer(select_backend("numpy")))
    with pytest.raises(HardwareError, match="computes wrongly"):
        await self_test(Computer(WrongBackend()))


async def test_work_runs_one_at_a_time_and_stops_when_nobody_wants_it() -> None:
    began, stopped = threading.Semaphore(0), threading.Event()
    running: list[int] = []

    class Backend:
        name = "test"

        def prove(self, job: Job, seed: bytes, should_stop: Any) -> Any:
            running.append(1)
            assert len(running) == 1
            began.release()
            while seed == bytes(32) and not should_stop():
                time.sleep(0.001)
            running.pop()
            if seed == bytes(32):
                stopped.set()
            raise HardwareError("stopped")

    computer = Computer(Backend())  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(computer.run, ProveTask(Job(128, 128, 128, 1), bytes(32)))
        await trio.to_thread.run_sync(began.acquire)
        nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(stopped.wait, 10)
    with trio.fail_after(10), pytest.raises(HardwareError):
        await computer.run(ProveTask(Job(128, 128, 128, 1), b"\x01" * 32))


# ── what is offered ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_offered_is_what_was_found_unless_the_configuration_says_less(tmp_path: Path) -> None:
    gpu = SimpleNamespace(name="G" * 100, memory_bytes=80 << 30)
    hardware: Any = SimpleNamespace(cpu_cores=16, memory_bytes=64 << 30, disk_free_bytes=1 << 60, gpus=(gpu, gpu))
    config = Config(tmp_path)
    everything = offered_spec(config, hardware)
    assert (everything.device_class, everything.gpus, everything.gpu_memory_mb) == (GPU_CLASS, 2, 80 << 10)
    assert (everything.cpu_cores, everything.memory_mb, everything.disk_mb) == (16, 64 << 10, 2**32 - 1)
    assert len(everything.gpu_model) == 64
    less = config.with_settings({"provider.gpus": 0, "provider.cpu_cores": 2, "provider.memory_mb": 512})
    assert offered_spec(less, hardware) == Spec(CPU_CLASS, 2, 512, 2**32 - 1, 0, 0, "")


# ── inbox and store ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_consumer_itself_reports_is_never_dropped() -> None:
    inbox = Inbox()
    for n in range(RULES[Lane.RESULT].length):
        inbox.put(Lane.RESULT, RequestEnded(str(n), ""))
    assert not inbox.put(Lane.RESULT, RequestEnded("refused", ""))
    assert inbox.put(Lane.RESULT, RequestEnded("own", ""), over_limit=True)
    got = []
    while (event := inbox.get_nowait()) is not None:
        got.append(event)
    assert got[-1] == RequestEnded("own", "")


def test_pruning_a_store_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    store = NodeStore(tmp_path / "node.sqlite")
    store.commit([Duty("a", b"1")], [], [Note("n")], 1.0)
    with sqlite3.connect(tmp_path / "node.sqlite") as other:
        other.execute("DROP TABLE duties")
    with pytest.raises(StoreError):
        store.prune(10.0, {"kind": 1})
    assert len(store.events(0, 10)) == 1
    with pytest.raises(StoreError):
        store.commit([Duty("a", b"1")], [], [Note("n")], 1.0)
    assert len(store.events(0, 10)) == 1, "nothing of a failed step is kept"
    store.close()
