"""Plain processes instead of containers: **for development only**, because a tenant's program is not isolated.

The program can read whatever the node's user can read, and reach whatever this machine can reach. What there is: a
directory, a session and an environment of its own, limits (memory, disk, processes, files), bounded logs, and a keeper
(`shim.py`) that outlives the node. Ports: the program must listen on ``127.0.0.1`` at the port that stands in
``KAISAR_PORT_<n>`` (also ``PORT_<n>``, and ``PORT`` for the first); ``{port:<n>}`` in its command is replaced by it,
and ``{host}`` by the address.

::

    <base>/<lease>/spec.json      command, environment, limits, ports (mode 0600)
    <base>/<lease>/shim.json      pid and start time of the keeper
    <base>/<lease>/work/          the program's directory and HOME
    <base>/<lease>/output.log     what it wrote; output.log.1 is what was before
    <base>/<lease>/exit           its exit code, once it has ended
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import trio

from kaisar_p2p.errors import ContainerError, RuntimeUnavailable, ungrouped
from kaisar_p2p.runtime import shim
from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus, ExecSession
from kaisar_p2p.runtime.process_exec import ProcessExec

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LEAST_MEMORY_MB, LEAST_DISK_MB = 64, 16
LOST = 255
"""Exit code of a program whose keeper was killed: nobody saw its end."""
START_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 5.0
POLL_S = 0.1
CHUNK = 65536
_LEASE = re.compile(r"[0-9a-f]{8,64}")
_PLACEHOLDER = re.compile(r"\{port:(\d{1,5})\}")


class ProcessRuntime:
    """Runs each lease as a process group of its own. Not isolated: for development only."""

    name = "process"
    for_development = True

    def __init__(self, base: Path) -> None:
        """`base` is a directory of this node alone; RuntimeUnavailable where there is no /proc."""
        if not Path("/proc/self/stat").exists():
            raise RuntimeUnavailable("the process runtime needs Linux", hint="start a Docker engine instead")
        self._base = base
        self._locks: dict[str, trio.Lock] = {}
        self._sessions: dict[str, set[int]] = {}
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        log.warning("process runtime: tenants' programs are NOT isolated from this machine; for development only")

    # ── start and stop ───────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, spec: ContainerSpec) -> ContainerStatus:
        """Start the command under a keeper. ContainerError begins with the reason and leaves nothing behind."""
        directory = self._directory(spec.lease)
        async with self._lock(spec.lease):
            known = await self.status(spec.lease)
            if known is not None and known.phase != "created":
                return known
            if spec.image:
                raise ContainerError(
                    f"image-not-found: {spec.image}: the process runtime runs commands only",
                    hint="rent a worker with Docker",
                )
            try:
                await trio.to_thread.run_sync(partial(_launch, directory, spec))
            except (OSError, subprocess.SubprocessError, ContainerError) as error:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(_remove, directory)
                if isinstance(error, ContainerError):
                    raise
                raise ContainerError(f"start-failed: {error}") from error
            except BaseException:  # cancelled: the thread has ended, so the keeper, if any, is known
                with trio.CancelScope(shield=True):
                    await self._end(spec.lease, directory, 0.0)
                raise
        status = await self.status(spec.lease)
        if status is None:
            raise ContainerError("start-failed: the program's directory has vanished")
        return status

    async def stop(self, lease: str, grace_s: float) -> None:
        """SIGTERM to the program's group, after `grace_s` SIGKILL to all below it; removes its directory."""
        directory = self._directory(lease)
        async with self._lock(lease):
            await self._end(lease, directory, grace_s)
        self._locks.pop(lease, None)

    async def _end(self, lease: str, directory: Path, grace_s: float) -> None:
        for group in self._sessions.get(lease, set()):
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        for wait_s in (grace_s, KILL_TIMEOUT_S):  # the keeper passes the first SIGTERM on, and kills at the second
            keeper = _keeper(directory)
            if keeper is None:
                break
            _signal(keeper, signal.SIGTERM)
            await _wait_gone(keeper, wait_s)
        keeper = _keeper(directory)
        if keeper is not None:  # its death kills the program
            log.error("keeper %d of lease %s does not end; killing it", keeper[0], lease[:8])
            _signal(keeper, signal.SIGKILL)
            await _wait_gone(keeper, KILL_TIMEOUT_S)
        await trio.to_thread.run_sync(_remove, directory)

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def status(self, lease: str) -> ContainerStatus | None:
        """From the files and /proc; needs no earlier knowledge, so it is the same after a restart of the node."""
        return _status(self._directory(lease), lease)

    async def containers(self) -> list[ContainerStatus]:
        """Every lease in the base directory, also those that ended while the node was away."""
        found = []
        for name in sorted(os.listdir(self._base)):
            status = _status(self._base / name, name) if _LEASE.fullmatch(name) else None
            if status is not None:
                found.append(status)
        return found

    async def wait(self, lease: str) -> int:
        """Exit code, 128 + signal when it was killed; ContainerError if there is no such lease or it was removed."""
        directory = self._directory(lease)
        while True:
            status = _status(directory, lease)
            if status is None:
                raise ContainerError(f"lease {lease[:8]} is not here")
            if status.exit_code is not None:
                return status.exit_code
            keeper = _keeper(directory)
            if keeper is not None:
                await _wait_gone(keeper, 60.0)
            else:  # not started yet, or its end is being written
                await trio.sleep(POLL_S)

    async def logs(self, lease: str, *, follow: bool, tail_bytes: int) -> AsyncIterator[bytes]:
        """Output and errors in one stream."""
        directory = self._directory(lease)
        path = directory / "output.log"
        tail = await trio.to_thread.run_sync(_tail, path, tail_bytes)
        if tail is None:
            raise ContainerError(f"lease {lease[:8]} is not here")
        older, file = tail
        try:
            if older:
                yield older
            while True:
                ended = _keeper(directory) is None  # before reading: what was written until then is read
                chunk = await trio.to_thread.run_sync(file.read, CHUNK)
                if chunk:
                    yield chunk
                elif await trio.to_thread.run_sync(_rotated, path, file):
                    file.close()
                    file = await trio.to_thread.run_sync(_open, path)
                elif ended or not follow:
                    return
                else:
                    await trio.sleep(POLL_S)
        except FileNotFoundError:  # stopped and removed meanwhile: the end
            return
        finally:
            file.close()

    def exec(self, lease: str, command: tuple[str, ...]) -> AbstractAsyncContextManager[ExecSession]:
        """Run a command in the lease's directory and environment, under its limits; killed when the context is left."""
        return self._exec(lease, command)

    @asynccontextmanager
    async def _exec(self, lease: str, command: tuple[str, ...]) -> AsyncIterator[ExecSession]:
        directory = self._directory(lease)
        if _keeper(directory) is None or not command:
            raise ContainerError(f"lease {lease[:8]} does not run" if command else "no command")
        arguments = [*_shim("exec", directory), *command]
        pipe = subprocess.PIPE
        process = await trio.lowlevel.open_process(
            arguments, stdin=pipe, stdout=pipe, stderr=pipe, env={}, start_new_session=True
        )
        groups = self._sessions.setdefault(lease, set())
        groups.add(process.pid)
        try:
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    session = ProcessExec(process)
                    nursery.start_soon(session.read, 1, process.stdout)
                    nursery.start_soon(session.read, 2, process.stderr)
                    yield session
                    nursery.cancel_scope.cancel()
        finally:
            groups.discard(process.pid)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        await stream.aclose()

    def _directory(self, lease: str) -> Path:
        if not _LEASE.fullmatch(lease):
            raise ContainerError(f"{lease[:80]!r} does not name a lease")
        return self._base / lease

    def _lock(self, lease: str) -> trio.Lock:
        return self._locks.setdefault(lease, trio.Lock())


# ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _launch(directory: Path, spec: ContainerSpec) -> None:
    """Write the directory and start the keeper; returns when the program runs."""
    if not spec.command:
        raise ContainerError("start-failed: no command")
    _remove(directory)  # what a crash in this very function may have left
    (directory / "work" / "tmp").mkdir(parents=True, mode=0o700)
    ports = _free_ports(spec.ports)
    content = {
        "command": [_PLACEHOLDER.sub(partial(_port_of, ports), _with_python(part)) for part in spec.command],
        "environment": _environment(directory, spec, ports),
        "memory_mb": max(spec.memory_mb, LEAST_MEMORY_MB),
        "disk_mb": max(spec.disk_mb, LEAST_DISK_MB),
        "ports": list(ports.items()),
    }
    with open(directory / "spec.json", "w", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
        json.dump(content, file)
    (directory / "output.log").touch(mode=0o600)
    done = subprocess.run(
        _shim("run", directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        timeout=START_TIMEOUT_S,
        check=False,
    )
    answer = done.stdout.decode("utf-8", "replace").strip()
    if answer != "ok":
        raise ContainerError(f"start-failed: {answer.removeprefix('error ')[-200:] or 'the keeper did not start'}")


def _shim(mode: str, directory: Path) -> list[str]:
    return [sys.executable, "-I", "-S", shim.__file__, mode, str(directory)]


def _free_ports(ports: tuple[int, ...]) -> dict[int, int]:
    """A free port of this machine for each of the program's; all are held until all are found."""
    with contextlib.ExitStack() as stack:
        found = {}
        for port in ports:
            held = stack.enter_context(socket.socket())
            held.bind((HOST, 0))
            found[port] = int(held.getsockname()[1])
    return found


def _with_python(part: str) -> str:
    """`{python}` is this interpreter, so that templates run wherever the node itself does."""
    return part.replace("{python}", sys.executable).replace("{host}", HOST)


def _port_of(ports: dict[int, int], match: re.Match[str]) -> str:
    return str(ports.get(int(match[1]), match[0]))


def _environment(directory: Path, spec: ContainerSpec, ports: dict[int, int]) -> dict[str, str]:
    work = directory / "work"
    environment = {"PATH": PATH, "HOME": str(work), "TMPDIR": str(work / "tmp"), "LANG": "C.UTF-8"}
    environment |= dict(spec.environment)
    environment |= {"KAISAR_LEASE": spec.lease, "KAISAR_HOST": HOST}
    for index, (port, host_port) in enumerate(ports.items()):
        names = (f"KAISAR_PORT_{port}", f"PORT_{port}", *(("PORT",) if index == 0 else ()))
        environment |= {name: str(host_port) for name in names if name not in dict(spec.environment)}
    return environment


# ── files and /proc ──────────────────────────────────────────────────────────────────────────────────────────────────

Keeper = tuple[int, int]
"""Pid and start time; together they name one process, so a stranger that got the same pid is never taken for it."""


def _keeper(directory: Path) -> Keeper | None:
    """The keeper of a lease, if it lives."""
    told = _json(directory / "shim.json")
    pid, started = told.get("pid", -1), told.get("started", -1)
    alive = isinstance(pid, int) and pid > 0 and started >= 0 and shim.start_ticks(pid) == started
    return (pid, started) if alive else None


def _status(directory: Path, lease: str) -> ContainerStatus | None:
    spec = _json(directory / "spec.json")
    if not spec:
        return ContainerStatus(lease, "created", None, ()) if directory.exists() else None
    ports = tuple((int(port), (HOST, int(host_port))) for port, host_port in spec.get("ports", []))
    if not (directory / "shim.json").exists():
        return ContainerStatus(lease, "created", None, ports)
    if _keeper(directory) is not None:
        return ContainerStatus(lease, "running", None, ports)
    try:
        code = int((directory / "exit").read_text("ascii"))
    except (OSError, ValueError):
        code = LOST
    return ContainerStatus(lease, "exited", code, ports)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _signal(keeper: Keeper, number: signal.Signals) -> None:
    if shim.start_ticks(keeper[0]) == keeper[1]:
        with contextlib.suppress(OSError):
            os.kill(keeper[0], number)


async def _wait_gone(keeper: Keeper, timeout_s: float) -> None:
    """Until the keeper has ended, or `timeout_s` are over."""
    with trio.move_on_after(timeout_s):
        while shim.start_ticks(keeper[0]) == keeper[1]:  # noqa: ASYNC110  (another process: nothing to wait on)
            await trio.sleep(POLL_S / 2)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        log.error("cannot remove %s", directory)


def _tail(path: Path, tail_bytes: int) -> tuple[bytes, IO[bytes]] | None:
    """What lies before the newest file, of the last `tail_bytes`, and that file at where to go on."""
    try:
        file = _open(path)
    except OSError:
        return None
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - tail_bytes))
    missing, older = tail_bytes - size, path.with_suffix(".log.1")
    if missing <= 0 or not older.exists():
        return b"", file
    with open(older, "rb") as before:
        before.seek(max(0, os.fstat(before.fileno()).st_size - missing))
        return before.read(missing), file


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _rotated(path: Path, file: IO[bytes]) -> bool:
    return os.stat(path).st_ino != os.fstat(file.fileno()).st_ino
