"""Local processes: start them so that they outlive us, know them again later, end them, leave none behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from testnet.prepare import NODES

MARK = "KAISAR_SWARM"
"""Variable in every node's environment: the directory of its swarm."""
LEASES = "leases"
LOG_TAIL_BYTES = 4_000


@dataclass(frozen=True)
class Running:
    """A process, known by its id and start time: an id alone may belong to a stranger by now."""

    pid: int
    started_s: float

    def process(self) -> psutil.Process | None:
        """The process itself, None when it is gone."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.started_s) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if alive else None
        except psutil.Error:
            return None


def node_command(data_directory: Path) -> list[str]:
    """The command line that runs a node: this interpreter's own `kaisar run`."""
    return [sys.executable, "-m", "node.cli", "run", "--data-dir", str(data_directory)]


def spawn(data_directory: Path, log: Path, swarm: Path, environment: Mapping[str, str]) -> Running:
    """Start `kaisar run` on a data directory, in a session of its own, so that Ctrl-C here does not reach it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            node_command(data_directory),
            cwd=data_directory,
            env={**node_environment(os.environ, swarm), **environment},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    _CHILDREN[process.pid] = process
    return Running(process.pid, psutil.Process(process.pid).create_time())


_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}
"""Our own children, which have to be waited for; other processes of a swarm may be children of an earlier command."""


def node_environment(environ: Mapping[str, str], swarm: Path) -> dict[str, str]:
    """The environment of a node: ours without settings of Kaisar; one core and one heap for each process."""
    kept = {name: value for name, value in environ.items() if not name.startswith("KAISAR_")}
    return kept | {
        MARK: str(swarm),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONUNBUFFERED": "1",
    }


def exit_code(running: Running) -> int | None:
    """The exit code of a child of ours that has ended; None when it runs, or was not ours."""
    child = _CHILDREN.get(running.pid)
    return child.poll() if child is not None else None


def stop(processes: Iterable[psutil.Process], grace_s: float) -> list[int]:
    """SIGTERM to all, then SIGKILL to those left after `grace_s`; returns the ids of the latter."""
    wanted = list(processes)
    for process in wanted:
        _signal(process, "terminate")
    slow = [process for process in _wait(wanted, grace_s) if process.is_running()]
    for process in slow:
        _signal(process, "kill")
    _wait(slow, 5.0)
    return [process.pid for process in slow]


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return


def _wait(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those still alive when the time is up; our own children are reaped."""
    until = time.monotonic() + timeout_s
    alive = processes
    while alive and time.monotonic() < until:
        alive = [process for process in alive if Running(process.pid, process.create_time()).process() is not None]
        time.sleep(0.02)
    for process in processes:
        if (child := _CHILDREN.get(process.pid)) is not None:
            child.poll()
    return alive


def strays(swarm: Path) -> Iterator[psutil.Process]:
    """Every process that belongs to the swarm, however it was started: its nodes, and what its leases run.

    A node carries the mark in its environment. A lease's program and its keeper have to do with a directory below the
    provider's, and no terminal, which tells them from a user who looks around there.
    """
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.uids().effective != os.geteuid():
                continue
            if process.environ().get(MARK) == str(swarm) or _is_lease(process, swarm):
                yield process
        except psutil.Error:
            continue


def _is_lease(process: psutil.Process, swarm: Path) -> bool:
    """Its directory, or a path among its arguments, lies below a node's leases."""
    places = [process.cwd(), *(argument for argument in process.cmdline()[1:] if argument.startswith("/"))]
    return any(_below_leases(Path(place), swarm / NODES) for place in places) and not _has_terminal(process)


def _below_leases(place: Path, nodes: Path) -> bool:
    return place.is_relative_to(nodes) and LEASES in place.relative_to(nodes).parts[1:2]


def _has_terminal(process: psutil.Process) -> bool:
    """`Process.terminal` misses terminals opened since it was first asked; the kernel has all: proc(5)."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
    except OSError:
        return process.terminal() is not None
    return fields.split()[4] != "0"


def peak_memory_bytes(pid: int) -> int | None:
    """The most resident memory that a process ever had (VmHWM); None when it is gone or this is not Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def tail(log: Path, max_bytes: int = LOG_TAIL_BYTES) -> str:
    """The end of a log, from a whole line on."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - max_bytes))
            text = file.read(max_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""
    return text if len(text) < max_bytes else text.partition("\n")[2]
