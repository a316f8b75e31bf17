"""Containers in a Docker engine, through its SDK in threads; the SDK is imported only when this module is.

A lease's container carries the labels ``kaisar.lease`` and ``kaisar.node``, by which a node finds its own again after a
restart. It has limits for memory, CPU and processes, no capability beyond those that images need to become an ordinary
user, cannot gain privileges, and publishes its ports on loopback only. An image with the label
``kaisar.root=read-only`` gets a read-only root; others can write to a layer that is removed with the container.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import docker
import trio
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, LogConfig
from docker.utils.socket import frames_iter
from requests import RequestException

from kaisar_p2p.errors import ContainerError, RuntimeUnavailable
from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus, ExecSession

T = TypeVar("T")

LEASE_LABEL, NODE_LABEL, ROOT_LABEL = "kaisar.lease", "kaisar.node", "kaisar.root"
HOST = "127.0.0.1"
PING_TIMEOUT_S = 2
CALL_TIMEOUT_S = 60
POLL_S = 0.5
MAX_PROCESSES = 256
TAIL_LINES = 5_000
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"]
LOGS = LogConfig(type=LogConfig.types.JSON, config={"max-size": "4m", "max-file": "2"})
_PHASES = {"created": "created", "running": "running", "paused": "running", "restarting": "running"}


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
        self._client = client
        self._node_id = node_id
        self._threads = trio.CapacityLimiter(64)  # streams hold a thread each; they must not starve the node's own

    # ── start and stop ───────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, spec: ContainerSpec) -> ContainerStatus:
        """Find or pull the image, create, start. ContainerError begins with the reason and leaves nothing behind."""
        known = await self.status(spec.lease)
        if known is not None and known.phase != "created":
            return known
        await self._call(partial(self._start, spec), "start-failed")
        status = await self.status(spec.lease)
        if status is None:
            raise ContainerError("start-failed: the engine removed the container at once")
        return status

    def _start(self, spec: ContainerSpec) -> None:
        for left in self._find(spec.lease):  # created by a start that was interrupted
            left.remove(force=True, v=True)
        image = self._image(spec.image)
        arguments = _arguments(spec, self._node_id, read_only=(image.labels or {}).get(ROOT_LABEL) == "read-only")
        container = self._create(spec, arguments)
        try:
            container.start()
        except BaseException:
            with contextlib.suppress(DockerException, RequestException):
                container.remove(force=True, v=True)
            raise

    def _image(self, name: str) -> Any:
        if not name:
            raise ContainerError("image-not-found: no image is named", hint="this worker runs images only")
        try:
            return self._client.images.get(name)
        except ImageNotFound:
            pass
        try:
            return (
                self._client.images.pull(name)
                if ":" in name or "@" in name
                else self._client.images.pull(name, "latest")
            )
        except (ImageNotFound, NotFound) as error:
            raise ContainerError(f"image-not-found: {name}") from error
        except APIError as error:  # private or misspelt repositories answer with all kinds of codes
            raise ContainerError(f"image-not-found: {name}: {_why(error)}") from error

    def _create(self, spec: ContainerSpec, arguments: dict[str, Any]) -> Any:
        disk = {"storage_opt": {"size": f"{max(1, spec.disk_mb)}m"}}
        try:
            return self._client.containers.create(spec.image, **arguments, **disk)
        except APIError as error:
            if "storage" not in _why(error).lower() and "quota" not in _why(error).lower():
                raise
        return self._client.containers.create(spec.image, **arguments)  # the engine's disk driver knows no limits

    async def stop(self, lease: str, grace_s: float) -> None:
        """SIGTERM, after `grace_s` SIGKILL; removes the container and its volumes."""

        def stop() -> None:
            for container in self._find(lease):
                with contextlib.suppress(NotFound):
                    container.stop(timeout=max(0, round(grace_s)))
                with contextlib.suppress(NotFound):
                    container.remove(force=True, v=True)

        await self._call(stop, "cannot stop")

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, lease: str | None = None) -> list[Any]:
        labels = [f"{NODE_LABEL}={self._node_id}", LEASE_LABEL if lease is None else f"{LEASE_LABEL}={lease}"]
        return list(self._client.containers.list(all=True, filters={"label": labels}, ignore_removed=True))

    async def status(self, lease: str) -> ContainerStatus | None:
        """As the engine knows it."""
        found = await self._call(partial(self._find, lease), "cannot look")
        return _status(found[0]) if found else None

    async def containers(self) -> list[ContainerStatus]:
        """All containers with this node's label."""
        found = await self._call(self._find, "cannot look")
        return sorted((_status(container) for container in found), key=lambda status: status.lease)

    async def wait(self, lease: str) -> int:
        """Exit code; ContainerError if there is no such container, or it was removed."""
        while True:
            status = await self.status(lease)
            if status is None:
                raise ContainerError(f"lease {lease[:8]} is not here")
            if status.exit_code is not None:
                return status.exit_code
            await trio.sleep(POLL_S)

    async def logs(self, lease: str, *, follow: bool, tail_bytes: int) -> AsyncIterator[bytes]:
        """Output and errors in one stream, from at most `tail_bytes` and 5,000 lines back."""
        container = await self._one(lease)
        tail = await self._call(partial(container.logs, tail=TAIL_LINES, timestamps=False), "cannot read the logs")
        if tail and tail_bytes > 0:
            yield bytes(tail[-tail_bytes:])
        if not follow:
            return
        stream = await self._call(partial(container.logs, stream=True, follow=True, tail=0), "cannot read the logs")
        try:
            while (chunk := await self._call(partial(next, stream, None), "cannot read the logs")) is not None:
                yield bytes(chunk)
        finally:
            stream.close()

    def exec(self, lease: str, command: tuple[str, ...]) -> AbstractAsyncContextManager[ExecSession]:
        """Run a command inside; its streams close when the context is left, the engine ends it with the lease."""
        return self._exec(lease, command)

    @asynccontextmanager
    async def _exec(self, lease: str, command: tuple[str, ...]) -> AsyncIterator[ExecSession]:
        container, api = await self._one(lease), self._client.api
        create = partial(api.exec_create, container.id, list(command), stdin=True)
        exec_id = (await self._call(create, "cannot run the command"))["Id"]
        stream = await self._call(partial(api.exec_start, exec_id, socket=True), "cannot run the command")
        try:
            yield DockerExec(self, exec_id, stream)
        finally:
            stream.close()

    async def _one(self, lease: str) -> Any:
        found = await self._call(partial(self._find, lease), "cannot look")
        if not found:
            raise ContainerError(f"lease {lease[:8]} is not here")
        return found[0]

    async def _call(self, function: Callable[[], T], what: str) -> T:
        """In a thread; every failure of the engine becomes a ContainerError that begins with `what`."""
        try:
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._threads)
        except (DockerException, RequestException, OSError) as error:
            raise ContainerError(f"{what}: {_why(error)}") from error

    async def exit_code(self, exec_id: str) -> int | None:
        """Exit code of an ended command; None while it runs."""
        told = await self._call(partial(self._client.api.exec_inspect, exec_id), "cannot look at the command")
        return None if told.get("Running") else int(told.get("ExitCode") or 0)

    async def next_frame(self, frames: Iterator[tuple[int, bytes]]) -> tuple[int, bytes] | None:
        """The next piece of a command's output; None at its end."""
        return await self._call(partial(next, frames, None), "cannot read the command's output")

    async def send(self, stream: Any, data: bytes) -> None:
        """To a command's standard input."""
        await self._call(partial(getattr(stream, "_sock", stream).sendall, data), "the command has ended")


class DockerExec:
    """A command that runs inside a container."""

    def __init__(self, runtime: DockerRuntime, exec_id: str, stream: Any) -> None:
        self._runtime = runtime
        self._exec_id = exec_id
        self._stream = stream

    async def send(self, data: bytes) -> None:
        """Standard input; ContainerError once the command has ended."""
        await self._runtime.send(self._stream, data)

    async def send_eof(self) -> None:
        """Close standard input."""
        with contextlib.suppress(OSError):
            getattr(self._stream, "_sock", self._stream).shutdown(1)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """(1, stdout bytes) and (2, stderr bytes) until both are closed."""
        frames = frames_iter(self._stream, tty=False)
        while (frame := await self._runtime.next_frame(frames)) is not None:
            yield int(frame[0]), bytes(frame[1])

    async def exit_code(self) -> int:
        """Wait for the end."""
        while (code := await self._runtime.exit_code(self._exec_id)) is None:  # noqa: ASYNC110  (asks the engine)
            await trio.sleep(POLL_S / 5)
        return code


def _arguments(spec: ContainerSpec, node_id: str, *, read_only: bool) -> dict[str, Any]:
    """What `containers.create` gets besides the image and the disk's limit."""
    arguments: dict[str, Any] = {
        "command": list(spec.command) or None,
        "name": f"kaisar-{node_id[:8]}-{spec.lease[:16]}",
        "labels": {LEASE_LABEL: spec.lease, NODE_LABEL: node_id},
        "environment": dict(spec.environment) | {"KAISAR_LEASE": spec.lease},
        "ports": {f"{port}/tcp": (HOST, None) for port in spec.ports},
        "mem_limit": f"{max(spec.memory_mb, 16)}m",
        "memswap_limit": f"{max(spec.memory_mb, 16)}m",
        "nano_cpus": max(1, spec.cpu_cores) * 10**9,
        "pids_limit": MAX_PROCESSES,
        "cap_drop": ["ALL"],
        "cap_add": CAPABILITIES,
        "security_opt": ["no-new-privileges"],
        "log_config": LOGS,
        "init": True,
        "detach": True,
    }
    if read_only:
        arguments |= {"read_only": True, "tmpfs": {path: f"size={max(16, spec.disk_mb)}m" for path in ("/tmp", "/run")}}
    if spec.gpus:
        arguments["device_requests"] = [DeviceRequest(count=spec.gpus, capabilities=[["gpu"]])]
    return arguments


def _status(container: Any) -> ContainerStatus:
    state = container.attrs.get("State", {})
    phase = _PHASES.get(state.get("Status", ""), "exited")
    code = int(state.get("ExitCode", 255)) if phase == "exited" else None
    ports = []
    for name, bindings in ((container.attrs.get("NetworkSettings") or {}).get("Ports") or {}).items():
        if bindings:
            ports.append((int(name.partition("/")[0]), (HOST, int(bindings[0]["HostPort"]))))
    return ContainerStatus(container.labels.get(LEASE_LABEL, ""), phase, code, tuple(sorted(ports)))


def _why(error: Exception) -> str:
    return str(getattr(error, "explanation", None) or error).strip()[:200]
