"""Which runtime a node uses: Docker when an engine answers, else plain processes (development only)."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from kaisar_p2p.errors import RuntimeUnavailable
from kaisar_p2p.runtime.interface import ContainerRuntime
from kaisar_p2p.runtime.process import ProcessRuntime

log = logging.getLogger(__name__)

ENGINE_TIMEOUT_S = 2.0
PREFERENCES = ("auto", "docker", "process")


async def select_runtime(preference: str, base: Path, node_id: str) -> ContainerRuntime:
    """The runtime for this node.

    Args:
        preference: "docker", "process", or "auto": Docker if its engine answers within 2 s, else processes.
        base: where the process runtime keeps its leases; of this node alone.
        node_id: marks this node's containers in an engine that several nodes share.

    Raises:
        RuntimeUnavailable: an unknown preference, or the one that was asked for cannot be used here.
    """
    if preference not in PREFERENCES:
        raise RuntimeUnavailable(f"unknown runtime {preference!r}", hint=f"one of {', '.join(PREFERENCES)}")
    if preference == "process":
        return ProcessRuntime(base)
    from kaisar_p2p.runtime.docker import open_docker  # imports the SDK, which nodes without Docker do not need

    try:
        with trio.fail_after(ENGINE_TIMEOUT_S):
            return await open_docker(node_id)
    except (RuntimeUnavailable, trio.TooSlowError) as error:
        why = error.message if isinstance(error, RuntimeUnavailable) else "it did not answer in time"
        if preference == "docker":
            raise RuntimeUnavailable(
                f"no Docker engine answers: {why}", hint="start Docker, or set the runtime to process for development"
            ) from error
        log.info("no Docker engine answers: %s", why)
        return ProcessRuntime(base)
