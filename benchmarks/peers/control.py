"""The other end of `process.ProcessPeer`, for peers in Python: operations as JSON lines on stdin and stdout."""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

import trio

from benchmarks.peers.interface import PeerConfig, PeerFailed
from benchmarks.peers.operations import Operations, StreamWasReset


def config_of_command_line() -> PeerConfig:
    """The configuration that the process was started with."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    for name in ("seed", "pre_shared_key"):
        given[name] = bytes.fromhex(given[name]) if given[name] else None
    for name in ("listen", "announce"):
        given[name] = tuple(given[name])
    return PeerConfig(**given)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def serve(operations: Operations) -> None:
    """Do what stdin asks for until it ends; several operations at a time."""

    def report(topic: str, author: str, data: bytes) -> None:
        _say({"event": "message", "topic": topic, "author": author, "data": base64.b64encode(data).decode()})

    operations.report = report
    _say({"event": "ready", "key": operations.key, "addrs": list(operations.addrs)})
    rest = b""
    async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as stdin:
        async for data in stdin:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                nursery.start_soon(_answer, operations, json.loads(line))
        nursery.cancel_scope.cancel()


async def _answer(operations: Operations, request: dict[str, Any]) -> None:
    number, name = request.pop("id"), request.pop("do")
    if name == "publish":
        request["data"] = base64.b64decode(request["data"])
    try:
        _say({"id": number, "result": await operations.operate(name, **request)})
    except (PeerFailed, StreamWasReset, trio.TooSlowError) as error:
        _say({"id": number, "error": str(error) or type(error).__name__})
    except Exception as error:  # noqa: BLE001  (the edge of the operation's task: the one who asked hears of it)
        _say({"id": number, "error": repr(error)})
