"""Peers in a process of their own that speaks JSON lines: js-libp2p, and the two in Python."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import trio

from benchmarks.peers import install
from benchmarks.peers.interface import Message, Peer, PeerConfig, PeerFailed

_START_S = 60.0
_ROOT = Path(__file__).resolve().parents[2]


class ProcessPeer(Peer):
    """A peer whose operations are lines on its stdin; made by `js_peer`, `stock_peer` and `kaisar_peer`."""

    def __init__(self, name: str, process: trio.Process) -> None:
        super().__init__()
        self.name = name
        self.pid = process.pid
        self._process = process
        self._answers: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._ids = count(1)
        self._ready, self._over = trio.Event(), trio.Event()
        self._writing = trio.Lock()

    async def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Ask for an operation; raises PeerFailed with what the peer says, or when its process has ended."""
        if self._over.is_set():
            raise PeerFailed(f"{self.name} has ended")
        number = next(self._ids)
        arguments = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in arguments.items()}
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[number] = send
        line = json.dumps({"id": number, "do": operation, **arguments}) + "\n"
        assert self._process.stdin is not None
        async with self._writing:
            await self._process.stdin.send_all(line.encode())
        try:
            answer = await receive.receive()
        except trio.EndOfChannel:
            raise PeerFailed(f"{self.name} ended during {operation}") from None
        finally:
            self._answers.pop(number, None)
        if "error" in answer:
            raise PeerFailed(f"{self.name}, {operation}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        async for data in self._process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        self._over.set()
        self._ready.set()
        for waiting in self._answers.values():
            waiting.close()

    def _take(self, line: dict[str, Any]) -> None:
        if line.get("event") == "ready":
            self.key, self.addrs = line["key"], tuple(line["addrs"])
            self._ready.set()
        elif line.get("event") == "message":
            data = base64.b64decode(line["data"])
            self._report.send_nowait(Message(line["topic"], line["author"], data))
        elif line["id"] in self._answers:
            self._answers[line["id"]].send_nowait(line)

    async def wait_ready(self) -> None:
        """Until it listens; raises PeerFailed when it ends or takes too long."""
        with trio.move_on_after(_START_S):
            await self._ready.wait()
        if self._over.is_set() or not self._ready.is_set():
            raise PeerFailed(f"{self.name} did not start; its stderr says why")


@asynccontextmanager
async def _peer(name: str, command: Sequence[str], config: PeerConfig) -> AsyncIterator[ProcessPeer]:
    start = partial(
        trio.run_process,
        [*command, json.dumps(config.as_json())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        check=False,
    )
    async with trio.open_nursery() as nursery:
        process = await nursery.start(start)
        peer = ProcessPeer(name, process)
        nursery.start_soon(peer._read)
        try:
            await peer.wait_ready()
            yield peer
        finally:
            process.kill()
            nursery.cancel_scope.cancel()


def js_peer(config: PeerConfig | None = None, *, through: Sequence[str] = ()) -> Any:
    """``async with js_peer() as peer``: js-libp2p. Raises install.Unavailable and PeerFailed.

    `through` is a command that starts the one behind it.
    """
    return _peer("js-libp2p", [*through, *install.js()], config or PeerConfig())


def stock_peer(config: PeerConfig | None = None) -> Any:
    """``async with stock_peer() as peer``: py-libp2p as it is published. Raises PeerFailed."""
    return _peer("py-libp2p", [sys.executable, "-m", "benchmarks.peers.stock"], config or PeerConfig())


def kaisar_peer(config: PeerConfig | None = None) -> Any:
    """``async with kaisar_peer() as peer``: this project's mesh. Raises PeerFailed."""
    return _peer("kaisar", [sys.executable, "-m", "benchmarks.peers.kaisar"], config or PeerConfig())
