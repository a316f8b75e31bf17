"""`python -m tests.attacks.attackers NAME JSON`: one attack on a node, in a process that gives way to all others."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from tests.attacks import on_connections, on_gossip, on_streams, on_unfinished
from tests.attacks.target import Target

ATTACKS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    **on_connections.ATTACKS,
    **on_streams.ATTACKS,
    **on_gossip.ATTACKS,
    **on_unfinished.ATTACKS,
}

_LONGEST_S = 45.0
_IN_TIME = {"two_places", "restarts", "resets_gossip_streams", "raising_validators", "publishes", "wrong_clock"}
"""These do not flood, and what they say has to come in time, also on a machine that has no time."""


async def _attack(name: str, target: Target, arguments: dict[str, Any]) -> dict[str, Any]:
    with trio.fail_after(_LONGEST_S):
        async with trio.open_nursery() as nursery:
            told = await ATTACKS[name](nursery, target, **arguments)
            nursery.cancel_scope.cancel()
    return told


def main() -> None:
    """Attack, and say what came of it on one line."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    if name not in _IN_TIME:
        os.nice(19)
    target = Target(tuple(arguments.pop("host_and_port")), bytes.fromhex(arguments.pop("key")))
    print(json.dumps(trio.run(_attack, name, target, arguments)))


if __name__ == "__main__":
    main()
