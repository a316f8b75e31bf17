"""Whole nodes in this process: start, end, start again, and what stands in the way."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from kaisar_p2p.errors import ConfigError, KaisarError, LedgerError, PortUnavailable, StoreError
from node.api.address import read_address
from node.boot import run_node, unlock_keys
from node.config import Config, load_config
from node.initialise import GENESIS_FILE, LEDGER_FILE, Plan, initialise
from node.node import Node
from protocols.actions import Duty, Note, Publish, Store
from protocols.genesis import Genesis, write_genesis
from protocols.interpreter.calls import Transfer
from protocols.params import KAI
from tests.node.command_line import command_line

PATIENCE_S = 30.0
RunningNode = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture
def home(tmp_path: Path) -> Callable[..., Config]:
    """Make a data directory as `kaisar init` does, with blocks of 50 ms."""

    def make(name: str = "home", *, ledger: Path | None = None, **settings: object) -> Config:
        directory = tmp_path / name
        given: dict[str, object] = {"network.listen": ["/ip4/127.0.0.1/tcp/0"], "ledger.poll_s": 0.05}
        given |= {key.replace("__", "."): value for key, value in settings.items()}
        genesis = None
        if ledger is None:
            genesis = tmp_path / f"{name}.json"
            genesis.write_bytes(_fast_genesis())
        initialise(Plan(directory, None, "demo", ledger, genesis, settings=given), time_ms=time.time_ns() // 1_000_000)
        return load_config(directory)

    return make


def _fast_genesis() -> bytes:
    overrides = (("block_ms", 50), ("epoch_slots", 2))
    return write_genesis(Genesis("test", "demo", time.time_ns() // 1_000_000, (), 0, overrides))


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Node]:
    """A node from ready to stopped; whatever ends it early is raised."""
    keys, wallet = unlock_keys(config, None)
    found: list[Node] = []
    ready, ended = trio.Event(), trio.Event()

    def when_ready(node: Node) -> None:
        found.append(node)
        ready.set()

    async def run() -> None:
        try:
            await run_node(config, keys, wallet, when_ready)
        finally:
            ended.set()
            ready.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            with trio.fail_after(PATIENCE_S):
                await ready.wait()
                if found:
                    yield found[0]
                    found[0].stop()
                await ended.wait()
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        raise cause from None


async def start_fails(config: Config, kind: type[KaisarError]) -> KaisarError:
    """The error with which a start ends."""
    keys, wallet = unlock_keys(config, None)
    with pytest.raises(kind) as caught, trio.fail_after(PATIENCE_S):
        await run_node(config, keys, wallet, lambda node: node.stop())
    assert not (config.data_directory / "api.json").exists()
    return caught.value


async def ask(config: Config, path: str) -> Any:
    address = read_address(config.data_directory)
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {address.token}"}) as client:
        answer = await client.get(address.url + path)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ── start and end ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_starts_answers_and_ends_without_a_trace(home: Callable[..., Config]) -> None:
    config = home()
    async with running(config) as node:
        assert read_address(config.data_directory).url.startswith("http://127.0.0.1:")
        status = await ask(config, "/v1/status")
        assert node.key.hex() in json.dumps(status)
        assert await ask(config, "/v1/peers") == []
        assert (await node.chain.caught_up()).number >= 0
    assert not (config.data_directory / "api.json").exists()
    left = {path.name for path in config.data_directory.iterdir()}
    assert {"node.sqlite", GENESIS_FILE, LEDGER_FILE, "keys", "config.toml"} <= left
    with contextlib.closing(sqlite3.connect(config.data_directory / "node.sqlite")) as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("role", ["client", "checker"])
async def test_who_proves_nothing_looks_for_no_gpu(
    home: Callable[..., Config], caplog: pytest.LogCaptureFixture, role: str
) -> None:
    caplog.set_level("INFO")
    async with running(home(node__roles=[role])):
        pass
    assert not [record.message for record in caplog.records if "proofs run on" in record.message]


async def test_a_call_becomes_final(home: Callable[..., Config]) -> None:
    async with running(home()) as node:
        result = await node.call(Transfer(b"\x07" * 32, KAI))
        assert result.reason  # the wallet of this network has nothing
        assert result.call_hash in node.chain.call_outcomes


@pytest.mark.parametrize("roles", [["provider"], ["checker"], ["client"], ["explorer"], ["bootstrap", "checker"]])
async def test_every_role_starts(home: Callable[..., Config], roles: list[str]) -> None:
    config = home(node__roles=roles, provider__runtime="process")
    async with running(config) as node:
        assert node.roles == tuple(roles)
        assert (node.runtime is not None) is ("provider" in roles)
        await node.chain.advanced()


async def test_a_node_that_starts_again_goes_on(home: Callable[..., Config]) -> None:
    """Its journal is kept: what it has signed before, it does not sign differently."""
    config = home(node__roles=["provider", "checker"], provider__runtime="process")
    first = Publish("epoch", b"first", Duty("vote/1", b"first"))
    async with running(config) as node:
        await node.effects.perform([first, Store("mark", b"k", b"v"), Note("mark", (("n", 1),))], node.clock.now())
        key, number = node.key, (await node.chain.caught_up()).number
    async with running(config) as node:
        assert node.key == key
        assert (await node.chain.caught_up()).number >= number
        assert node.store.commit([Duty("vote/1", b"other")], [], [], 2.0) == {"vote/1"}
        assert node.store.commit([Duty("vote/1", b"first")], [], [], 2.0) == frozenset()
        assert node.store.item("mark", b"k") == b"v"
        assert [each.data for each in node.store.events(0, 1000) if each.kind == "mark"] == [{"n": 1}]


async def test_an_event_list_tells_of_the_registration(home: Callable[..., Config]) -> None:
    config = home(node__roles=["provider"], provider__runtime="process")
    async with running(config) as node:
        steps: list[object] = []
        while 4 not in steps:
            steps = [each.data.get("step") for each in node.store.events(0, 100) if each.kind == "registration"]
            if 4 not in steps:
                await node.effects.wait_for_note()
        assert steps[:4] == [1, 2, 3, 4]
        shown = await ask(config, "/v1/registration")
        assert "process" in json.dumps(shown)


async def test_two_nodes_meet(home: Callable[..., Config]) -> None:
    first = home("first")
    async with running(first) as one:
        second = home("second", ledger=first.ledger_path, network__join=list(one.mesh.addrs))
        async with running(second) as two:
            await one.mesh.wait_connected()
            await two.mesh.wait_connected()
            assert [peer.key for peer in one.mesh.peers()] == [two.key]
            await ask(second, "/v1/status")
        await one.mesh.wait_until(lambda: not one.mesh.peers())


async def test_two_nodes_tell_each_other_that_they_can_be_reached(home: Callable[..., Config]) -> None:
    first = home("first")
    async with running(first) as node:
        join = [node.mesh.addrs[0]]
        second = home("second", ledger=first.ledger_path, network__join=join, network__limits={"reach_check_s": 0.2})
        async with running(second) as other:
            while other.mesh.reachability().status != "public":  # noqa: ASYNC110  (nobody tells when)
                await trio.sleep(0.05)
            answer = await ask(second, "/v1/network")
            assert answer["reachability"]["status"] == "public"
            assert answer["peers"] == {"connected": 1, "in": 0, "out": 1, "relayed": 0, "unreached": []}
            result = await trio.to_thread.run_sync(
                partial(command_line(), "doctor", "--json", "--data-dir", str(second.data_directory))
            )
    assert result.code == 0, result.out
    grades = {one["check"]: one["grade"] for one in json.loads(result.out)["checks"]}
    assert (grades["node"], grades["peers"], grades["reachable"]) == ("ok", "ok", "ok")


async def test_two_nodes_with_one_machine_key_live_side_by_side(home: Callable[..., Config]) -> None:
    first = home("first")
    async with running(first) as one:
        second = home("second", ledger=first.ledger_path, network__join=list(one.mesh.addrs))
        shutil.rmtree(second.keys_path)
        shutil.copytree(first.keys_path, second.keys_path)
        async with running(second) as two:
            assert two.key == one.key
            third = home("third", ledger=first.ledger_path, network__join=list(one.mesh.addrs))
            async with running(third) as other:
                await other.mesh.wait_connected()
                assert [peer.key for peer in other.mesh.peers()] == [one.key]
                number = one.chain.state.number
                for node in (one, two, other):
                    while node.chain.state.number < number + 2:
                        await node.chain.advanced()
            assert one.key not in [peer.key for peer in two.mesh.peers()]
            await ask(first, "/v1/status")
            await ask(second, "/v1/status")


# ── what stands in the way ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held.getsockname()[1]


async def test_a_taken_api_port_is_named(home: Callable[..., Config], taken: int) -> None:
    error = await start_fails(home(api__port=taken), PortUnavailable)
    assert str(taken) in error.message
    assert "api.port" in error.hint


async def test_a_taken_mesh_port_is_named(home: Callable[..., Config], taken: int) -> None:
    error = await start_fails(home(network__listen=[f"/ip4/127.0.0.1/tcp/{taken}"]), PortUnavailable)
    assert str(taken) in error.message
    assert error.hint


async def test_a_ledger_that_is_none_is_refused(home: Callable[..., Config]) -> None:
    config = home()
    for path in config.ledger_path.parent.glob(LEDGER_FILE + "*"):
        path.unlink()
    missing = await start_fails(config, LedgerError)
    assert LEDGER_FILE in missing.message
    config.ledger_path.write_bytes(b"this is not a database, however long it is" * 200)
    broken = await start_fails(config, LedgerError)
    assert LEDGER_FILE in broken.message
    assert broken.hint


async def test_a_damaged_block_ends_the_node_with_its_number(home: Callable[..., Config]) -> None:
    config = home()
    async with running(config) as node:
        while node.chain.state.number < 5:
            await node.chain.advanced()
    with contextlib.closing(sqlite3.connect(config.ledger_path)) as ledger:
        ledger.execute("DROP TRIGGER IF EXISTS blocks_are_final")
        ledger.execute("UPDATE blocks SET hash = zeroblob(32) WHERE number = 2")
        ledger.commit()
    keys, wallet = unlock_keys(config, None)
    with pytest.raises(LedgerError, match=r"block [23]"), trio.fail_after(PATIENCE_S):
        await run_node(config, keys, wallet, lambda node: None)
    assert not (config.data_directory / "api.json").exists()


async def test_a_damaged_store_is_named(home: Callable[..., Config]) -> None:
    config = home()
    (config.data_directory / "node.sqlite").write_bytes(b"not a database" * 1000)
    error = await start_fails(config, StoreError)
    assert "node.sqlite" in error.message


async def test_a_fault_that_is_no_number_is_an_error(
    home: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAISAR_FAULT_WRONG_TILES", "many")
    await start_fails(home(node__roles=["provider"], provider__runtime="process"), ConfigError)


async def test_the_same_directory_can_start_after_a_failed_start(home: Callable[..., Config], taken: int) -> None:
    config = home(api__port=taken)
    await start_fails(config, PortUnavailable)
    async with running(config.with_settings({"api.port": 0})) as node:
        assert (await node.chain.caught_up()).number >= 0
