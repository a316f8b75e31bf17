"""What a container runtime is to the rest of the node.

It knows leases by name and ports by number, never orders or money. A ContainerError's message may begin with one of the
documented reasons and a colon: "image-not-found: …", "start-failed: …".
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ContainerSpec:
    """What to run. `lease` is the order id in hexadecimal and names the container; limits hold for its processes."""

    lease: str
    image: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]
    cpu_cores: int
    memory_mb: int
    disk_mb: int
    gpus: int


@dataclass(frozen=True)
class ContainerStatus:
    """`phase` is "created", "running" or "exited".

    `ports`, in the order of the spec, maps the program's ports to (host, port) reachable from this node.
    """

    lease: str
    phase: str
    exit_code: int | None
    ports: tuple[tuple[int, tuple[str, int]], ...]

    def address(self, port: int) -> tuple[str, int] | None:
        """Where a port of the program is reached, or None if it was not asked for."""
        return dict(self.ports).get(port)


class ExecSession(Protocol):
    """A command running inside a container."""

    async def send(self, data: bytes) -> None:
        """Standard input; ContainerError once the command has ended."""

    async def send_eof(self) -> None:
        """Close standard input."""

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """(1, stdout bytes) and (2, stderr bytes) until both are closed."""

    async def exit_code(self) -> int:
        """Wait for the end."""


class ContainerRuntime(Protocol):
    """Docker, or plain processes for development."""

    @property
    def name(self) -> str:
        """ "docker" or "process"."""

    @property
    def for_development(self) -> bool:
        """True when tenants are not isolated from the host."""

    async def start(self, spec: ContainerSpec) -> ContainerStatus:
        """Fetch the image, create, start. Idempotent by lease. ContainerError leaves nothing behind."""

    async def status(self, lease: str) -> ContainerStatus | None:
        """None when there is no such container."""

    async def containers(self) -> list[ContainerStatus]:
        """All containers of this node, also those that an earlier run of it started."""

    async def stop(self, lease: str, grace_s: float) -> None:
        """Ask, wait, kill, remove. Idempotent."""

    async def wait(self, lease: str) -> int:
        """Exit code, when the container has ended."""

    def logs(self, lease: str, *, follow: bool, tail_bytes: int) -> AsyncIterator[bytes]:
        """What the program wrote, from at most `tail_bytes` back.

        Ends with the container, or at once without `follow`.
        """

    def exec(self, lease: str, command: tuple[str, ...]) -> AbstractAsyncContextManager[ExecSession]:
        """Run a command inside; killed when the context is left."""
