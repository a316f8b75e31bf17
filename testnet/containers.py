"""Containers that a stopped node leaves running on purpose, and that a stopped swarm must not leave."""

from __future__ import annotations

import trio

from kaisar_p2p.errors import RuntimeUnavailable
from kaisar_p2p.runtime import select_runtime
from node.config import load_config
from testnet.prepare import Member, Prepared

GRACE_S = 3.0


def end_containers(prepared: Prepared) -> int:
    """Stop the Docker containers of all providers that may have some; returns how many there were.

    What the process runtime starts is found as processes instead. Without an engine there is nothing to stop.
    """
    providers = [member for member in prepared.members if _may_use_docker(prepared, member)]
    return trio.run(_end_all, prepared, providers) if providers else 0


def _may_use_docker(prepared: Prepared, member: Member) -> bool:
    if "provider" not in member.roles:
        return False
    return load_config(prepared.data_directory(member.name), environ={}).provider.runtime != "process"


async def _end_all(prepared: Prepared, providers: list[Member]) -> int:
    ended = 0
    for member in providers:
        base = prepared.data_directory(member.name) / "leases"
        try:
            runtime = await select_runtime("docker", base, member.key[:16])
        except RuntimeUnavailable:
            return ended
        async with trio.open_nursery() as nursery:
            for container in await runtime.containers():
                nursery.start_soon(runtime.stop, container.lease, GRACE_S)
                ended += 1
    return ended
