"""Containers in a Docker engine; the SDK is imported only when this module is.

A lease's container carries the labels ``kaisar.lease`` and ``kaisar.node``, by which a node finds its own again after a
restart. It has limits for memory, CPU, processes and disk, no capability beyond those that images need to become an
ordinary user, cannot gain privileges, publishes its ports on loopback only, and reaches no other container. An image
with the label ``kaisar.root=read-only`` gets a read-only root; others can write to a layer that is removed with the
container.

In a command, ``{host}`` becomes the address to listen on, ``{port:<n>}`` the port *n*, ``{python}`` ``python3``; the
environment has the same in ``KAISAR_HOST`` and ``KAISAR_PORT_<n>``, as in the process runtime.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any

import docker
import trio
from docker.errors import APIError, DockerException, NotFound
from requests import RequestException

from kaisar_p2p.errors import ContainerError, RuntimeUnavailable
from kaisar_p2p.runtime.docker_engine import CALL_TIMEOUT_S, ENGINE_ERRORS, LOOK_TIMEOUT_S, Engine, why
from kaisar_p2p.runtime.docker_options import (
    DISK_LABEL,
    LEASE_LABEL,
    NETWORK,
    NETWORK_OPTIONS,
    NODE_LABEL,
    ROOT_LABEL,
    arguments,
    free_gpus,
    status_of,
)
from kaisar_p2p.runtime.docker_streams import KILL_TIMEOUT_S, read_logs, start_exec
from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus, ExecSession

log = logging.getLogger(__name__)

PING_TIMEOUT_S = 2
POLL_S = 0.5
EXIT_CONFIRM_S = 2.0
"""A container that its operator restarts has ended for so long at most."""
AWAY_S = 120.0
"""So long may an engine be away, say for an upgrade, before its leases have failed."""
DISK_POLL_S = 30.0
MAX_STREAMS = 16
"""Logs that are followed, and commands, of one lease."""


async def open_docker(node_id: str) -> DockerRuntime:
    """Connect to the engine of the environment (`DOCKER_HOST`); RuntimeUnavailable if it does not answer in 2 s."""

    def connect() -> Any:
        client = docker.from_env(timeout=PING_TIMEOUT_S)
        try:
            client.ping()
        except BaseException:
            client.close()
            raise
        client.api.timeout = CALL_TIMEOUT_S
        return client

    try:
        client = await trio.to_thread.run_sync(connect, abandon_on_cancel=True)
    except (DockerException, RequestException, OSError) as error:
        raise RuntimeUnavailable(str(error)[:200], hint="start Docker, or check DOCKER_HOST") from error
    return DockerRuntime(client, node_id)


class DockerRuntime:
    """One container for each lease."""

    name = "docker"
    for_development = False

    def __init__(self, client: Any, node_id: str) -> None:
        """`client` is a docker.DockerClient; `node_id` marks this node's containers."""
        self._engine = Engine(client)
        self._client = client
        self._node_id = node_id
        self._creating = trio.Lock()  # two starts must not choose the same GPU, or be of the same lease
        self._streams: Counter[str] = Counter()

    # ── start and stop ───────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, spec: ContainerSpec) -> ContainerStatus:
        """Find or pull the image, create, start. ContainerError begins with the reason and leaves nothing behind."""
        known = await self.status(spec.lease)
        if known is not None and known.phase != "created":
            return known
        labels = await self._engine.image(spec.image)
        given_up = threading.Event()
        async with self._creating:
            try:
                make = partial(self._start, spec, labels.get(ROOT_LABEL) == "read-only", given_up)
                await self._engine.call(make, "start-failed")
            except BaseException:
                given_up.set()
                raise
        status = await self.status(spec.lease)
        if status is None:
            raise ContainerError("start-failed: the engine removed the container at once")
        return status

    def _start(self, spec: ContainerSpec, read_only: bool, given_up: threading.Event) -> None:
        mine = self._find()
        for left in mine:
            if left.labels.get(LEASE_LABEL) == spec.lease:
                if status_of(left).phase != "created":  # another start of it was faster
                    return
                left.remove(force=True, v=True)  # created by a start that was interrupted
        self._ensure_network()
        try:
            self._create(spec, arguments(spec, self._node_id, free_gpus(spec.gpus, mine), read_only=read_only)).start()
            if given_up.is_set():
                raise ContainerError("start-failed: the engine took too long")
        except BaseException:
            with contextlib.suppress(*ENGINE_ERRORS):
                self._remove(spec.lease)
            raise

    def _create(self, spec: ContainerSpec, made: dict[str, Any]) -> Any:
        disk_mb = max(1, spec.disk_mb)
        try:
            return self._client.containers.create(spec.image, **made, storage_opt={"size": f"{disk_mb}m"})
        except APIError as error:
            if "storage" not in why(error).lower() and "quota" not in why(error).lower():
                raise
        made["labels"][DISK_LABEL] = str(disk_mb)  # the engine's disk driver knows no limits: `wait` looks instead
        return self._client.containers.create(spec.image, **made)

    def _ensure_network(self) -> None:
        try:
            self._client.networks.get(NETWORK)
        except NotFound:
            try:
                self._client.networks.create(NETWORK, driver="bridge", options=NETWORK_OPTIONS, check_duplicate=True)
            except APIError as error:
                if error.status_code != 409:  # 409: another node was faster
                    raise

    async def stop(self, lease: str, grace_s: float) -> None:
        """SIGTERM, after `grace_s` SIGKILL; removes the container and its volumes."""
        remove = partial(self._remove, lease, max(0, round(grace_s)))
        await self._engine.call(remove, "cannot stop", grace_s + CALL_TIMEOUT_S)

    def _remove(self, lease: str, grace_s: int = 0) -> None:
        for container in self._find(lease):
            with _gone_is_fine():
                if grace_s:
                    container.stop(timeout=grace_s)
            with _gone_is_fine():
                container.remove(force=True, v=True)

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, lease: str | None = None) -> list[Any]:
        labels = [f"{NODE_LABEL}={self._node_id}", LEASE_LABEL if lease is None else f"{LEASE_LABEL}={lease}"]
        return list(self._client.containers.list(all=True, filters={"label": labels}, ignore_removed=True))

    async def status(self, lease: str) -> ContainerStatus | None:
        """As the engine knows it."""
        found = await self._engine.call(partial(self._find, lease), "cannot look", LOOK_TIMEOUT_S)
        return status_of(found[0]) if found else None

    async def containers(self) -> list[ContainerStatus]:
        """All containers with this node's label."""
        found = await self._engine.call(self._find, "cannot look")
        return sorted((status_of(container) for container in found), key=lambda status: status.lease)

    async def _one(self, lease: str) -> Any:
        found = await self._engine.call(partial(self._find, lease), "cannot look", LOOK_TIMEOUT_S)
        if not found:
            raise ContainerError(f"lease {lease[:8]} is not here")
        return found[0]

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def wait(self, lease: str) -> int:
        """Exit code; ContainerError if there is no such container, it was removed, or the engine is away for 120 s.

        A container that ended together with its engine is started again. One whose files outgrow its disk is killed.
        """
        measure_at = trio.current_time() + DISK_POLL_S
        while True:
            status, was_away = await self._status_patiently(lease)
            if status is None:
                raise ContainerError(f"lease {lease[:8]} is not here")
            if status.exit_code is not None:
                if not was_away:
                    await trio.sleep(EXIT_CONFIRM_S)
                    status, was_away = await self._status_patiently(lease)
                if status is not None and status.exit_code is not None:
                    if not was_away:
                        return status.exit_code
                    log.warning("container %s ended with its engine; starting it again", lease[:8])
                    await self._engine.call((await self._one(lease)).start, "start-failed")
            if trio.current_time() >= measure_at:
                await self._kill_if_too_large(lease)
                measure_at = trio.current_time() + DISK_POLL_S
            await trio.sleep(POLL_S)

    async def _status_patiently(self, lease: str) -> tuple[ContainerStatus | None, bool]:
        """Its status, and whether the engine was away before it answered."""
        away_until = trio.current_time() + AWAY_S
        was_away = False
        while True:
            try:
                return await self.status(lease), was_away
            except ContainerError as error:
                if trio.current_time() >= away_until:
                    raise
                if not was_away:
                    log.warning("waiting for the Docker engine: %s", error.message)
                was_away = True
            await trio.sleep(POLL_S)

    async def _kill_if_too_large(self, lease: str) -> None:
        try:
            await self._engine.call(partial(self._measure, lease), "cannot measure the disk")
        except ContainerError as error:
            log.warning("container %s: %s", lease[:8], error.message)

    def _measure(self, lease: str) -> None:
        for container in self._find(lease):
            limit_mb = int(container.labels.get(DISK_LABEL) or 0)
            if not limit_mb:
                return
            (told,) = self._client.api.containers(all=True, size=True, filters={"id": container.id})
            if told.get("SizeRw", 0) > limit_mb << 20:
                log.warning("container %s has written more than %d MB; killing it", lease[:8], limit_mb)
                container.kill()

    # ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def logs(self, lease: str, *, follow: bool, tail_bytes: int) -> AsyncIterator[bytes]:
        """Output and errors in one stream, from at most `tail_bytes` and 5,000 lines back."""
        with self._stream(lease):
            container = await self._one(lease)
            async with aclosing(read_logs(self._engine, container, follow=follow, tail_bytes=tail_bytes)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def exec(self, lease: str, command: tuple[str, ...]) -> AbstractAsyncContextManager[ExecSession]:
        """Run a command inside; it and its children are killed when the context is left (if the image has a shell)."""
        return self._exec(lease, command)

    @asynccontextmanager
    async def _exec(self, lease: str, command: tuple[str, ...]) -> AsyncIterator[ExecSession]:
        with self._stream(lease):
            session = await start_exec(self._engine, await self._one(lease), command)
            try:
                yield session
            finally:
                with trio.move_on_after(KILL_TIMEOUT_S, shield=True):
                    await session.end()

    @contextlib.contextmanager
    def _stream(self, lease: str) -> Iterator[None]:
        if self._streams[lease] >= MAX_STREAMS:
            raise ContainerError(f"lease {lease[:8]} has {MAX_STREAMS} logs and commands open", hint="close some")
        self._streams[lease] += 1
        try:
            yield
        finally:
            self._streams[lease] -= 1
            if not self._streams[lease]:
                del self._streams[lease]


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    """Removed, or being removed by somebody else."""
    try:
        yield
    except APIError as error:
        if error.status_code not in (404, 409):
            raise
