"""Gossip among real processes: what one message costs each node, how many arrive, and how late.

`ours(nodes, rate_per_s, seconds)` starts as many processes, lets each publish its part of the rate, and adds up what
they saw. The command line does the same and prints it: `python -m benchmarks.gossip_swarm NODES RATE SECONDS`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import trio

from kaisar_p2p.mesh import Mesh, MeshConfig, open_mesh, peer_of
from kaisar_p2p.wire.verdict import Verdict

MESSAGE_BYTES = 1024
_DIALS = 6  # other nodes that each node dials; peer exchange finds more
_WARM_UP_S = 4.0  # until the topic's mesh has formed
_DRAIN_S = 3.0  # what is on its way may still arrive
_TOPIC = "bench"


def ours(nodes: int, rate_per_s: float, seconds: float) -> dict[str, float]:
    """Run `nodes` processes that publish `rate_per_s` messages of 1 KiB in all.

    Returns `cpu_ms` (user and system, per message and node), `delivered` (0 to 1, of what everybody else should have
    got), `p50_ms` and `p99_ms` from publishing to delivery, `published` messages, and `duplicates` and `dropped`
    (messages and frames that gave way in a queue) per message and node.
    """
    command = [sys.executable, "-m", "benchmarks.gossip_swarm", "node"]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(nodes), str(rate_per_s), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(nodes)
    ]
    try:
        return _summary([json.loads(line) for line in _conversation(processes)], nodes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _conversation(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Exchange addresses, set the start, and read each node's report."""
    addresses = [_line_of(process) for process in processes]
    for process in processes:
        _tell(process, json.dumps(addresses))
    for process in processes:
        _line_of(process)
    start = time.time() + _WARM_UP_S
    for process in processes:
        _tell(process, str(start))
    return [_line_of(process) for process in processes]


def _line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a node of the gossip benchmark ended early; its error is above")
    return line.strip()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _summary(reports: list[dict[str, Any]], nodes: int) -> dict[str, float]:
    published = sum(report["published"] for report in reports)
    latencies = sorted(ms for report in reports for ms in report["latencies_ms"])
    per_node = max(1, published * nodes)
    return {
        "cpu_ms": 1000 * sum(report["cpu_s"] for report in reports) / per_node,
        "delivered": len(latencies) / max(1, published * (nodes - 1)),
        "p50_ms": latencies[len(latencies) // 2] if latencies else 0.0,
        "p99_ms": latencies[len(latencies) * 99 // 100] if latencies else 0.0,
        "published": published,
        "duplicates": sum(report["duplicates"] for report in reports) / per_node,
        "dropped": sum(report["dropped"] for report in reports) / per_node,
    }


# -- one node ---------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    latencies_ms: list[float] = field(default_factory=list)
    published: int = 0

    def note(self, data: bytes) -> None:
        """A message arrived."""
        self.latencies_ms.append((time.time_ns() - int.from_bytes(data[:8], "big")) / 1e6)


async def _node(number: int, nodes: int, rate_per_s: float, seconds: float) -> None:
    async with open_mesh(MeshConfig(), os.urandom(32)) as mesh, trio.open_nursery() as nursery:
        channel = mesh.subscribe(_TOPIC, lambda *_message: (Verdict.ACCEPT, ""))
        print(mesh.addrs[0], flush=True)
        _keep_some(mesh, number, json.loads(await _input()), nodes)
        await mesh.wait_connected(min(nodes - 1, 3))
        print("ready", flush=True)
        seen, start = _Seen(), float(await _input())
        nursery.start_soon(_receive, channel, seen)
        await trio.sleep(start - time.time())
        cpu_s, duplicates = _cpu_s(), _duplicates(mesh)
        await _publish(mesh, seen, rate_per_s / nodes, seconds)
        await trio.sleep(max(0.0, start + seconds + _DRAIN_S - time.time()))
        statistics = mesh.statistics()
        report = {
            "cpu_s": _cpu_s() - cpu_s,
            "published": seen.published,
            "latencies_ms": seen.latencies_ms,
            "duplicates": _duplicates(mesh) - duplicates,
            "dropped": statistics.dropped_frames + sum(statistics.dropped.values()),
        }
        print(json.dumps(report), flush=True)
        await _input()


def _keep_some(mesh: Mesh, number: int, addresses: list[str], nodes: int) -> None:
    others = [other for other in range(nodes) if other != number]
    for other in random.Random(number).sample(others, min(_DIALS, nodes - 1)):
        key, address = peer_of(addresses[other])
        mesh.keep_connected(key, [address])


async def _publish(mesh: Mesh, seen: _Seen, rate_per_s: float, seconds: float) -> None:
    """At the rate asked for; a node that is late sends what it owes at once, and stops in time."""
    began = time.time()
    phase_s = random.random() / rate_per_s
    while (due := phase_s + seen.published / rate_per_s) < seconds and time.time() - began < seconds:
        await trio.sleep(max(0.0, began + due - time.time()))
        await mesh.publish(_TOPIC, time.time_ns().to_bytes(8, "big") + os.urandom(MESSAGE_BYTES - 8))
        seen.published += 1


async def _receive(channel: trio.MemoryReceiveChannel[Any], seen: _Seen) -> None:
    async for message in channel:
        seen.note(message.data)
        with suppress(trio.WouldBlock):
            while True:  # `async for` takes one in each round of the scheduler
                seen.note(channel.receive_nowait().data)


async def _input() -> str:
    return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


def _duplicates(mesh: Mesh) -> int:
    return mesh.statistics().messages.get(("", "duplicate"), 0)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _main(arguments: list[str]) -> None:
    if arguments[0] == "node":
        number, nodes, rate_per_s, seconds = arguments[1:]
        trio.run(_node, int(number), int(nodes), float(rate_per_s), float(seconds))
        return
    nodes, rate_per_s, seconds = arguments
    result = ours(int(nodes), float(rate_per_s), float(seconds))
    print(" ".join(f"{name}={value:.3g}" for name, value in result.items()))


if __name__ == "__main__":
    _main(sys.argv[1:])
