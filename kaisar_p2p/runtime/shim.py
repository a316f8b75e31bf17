"""Keeps one program of the process runtime: its limits, its output, its end. Runs as a script of its own, not imported.

::

    python -I -S shim.py run  DIRECTORY              start the program of DIRECTORY/spec.json and stay with it
    python -I -S shim.py exec DIRECTORY COMMAND…     become COMMAND, with the same limits, place and environment

It outlives the node that started it, so that a node can restart while its leases run. It kills everything that descends
from the program, also what has made a session of its own, when the program ends, when a limit is passed, or on a second
SIGTERM (the first is passed on). Only the standard library, and as little of it as will do: a few MB for each lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

MB = 1 << 20
LOG_BYTES = 4 * MB
"""Of the newest output; as much again of what came before it."""
POLL_S = 0.5
DISK_POLL_S = 5.0
MAX_PROCESSES = 256
NICENESS = 5
SPARE_MB = 256
"""What a process may reserve for stacks and the like beyond what the lease may use."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    mode, directory = arguments[0], arguments[1]
    with open(os.path.join(directory, "spec.json"), encoding="utf-8") as file:
        spec = json.load(file)
    if mode == "exec":
        os.chdir(os.path.join(directory, "work"))
        limit(spec)
        execute(arguments[2:], spec["environment"])
    run(directory, spec)


def execute(command: list[str], environment: dict[str, str]) -> None:
    """Become the command; where that fails, say why and end with 127 (not found) or 126, as a shell does."""
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode(errors="replace"))
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    except ValueError:  # a zero byte
        os.write(2, b"not a command\n")
        os._exit(126)


def run(directory: str, spec: dict[str, Any]) -> None:
    """Detach, start the program, tell the parent "ok" or why not on standard output, and stay until the end."""
    if os.fork():
        # Whoever started us waits for this process only; what it reads comes from the child, which is nobody's child.
        os._exit(0)
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        program, output = start(directory, spec)
    except OSError as error:
        os.write(1, f"error {error.strerror}: {error.filename or spec['command'][0]}\n".encode())
        os._exit(1)
    with open(os.path.join(directory, "shim.json.new"), "w", encoding="utf-8") as file:
        json.dump({"pid": os.getpid(), "started": start_ticks(os.getpid()), "program": program}, file)
    os.replace(os.path.join(directory, "shim.json.new"), os.path.join(directory, "shim.json"))
    os.write(1, b"ok\n")
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(silent, descriptor)
    Keeper(directory, spec, program, output).keep()


def start(directory: str, spec: dict[str, Any]) -> tuple[int, int]:
    """Fork and exec; returns the program's pid and the read end of its output. OSError if it cannot be run."""
    output, write_output = os.pipe()
    failure, write_failure = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            become(directory, spec, write_output)
        except OSError as error:
            name = os.fsdecode(error.filename or spec["command"][0])
            os.write(write_failure, json.dumps([error.errno, error.strerror, name]).encode())
        finally:
            os._exit(127)
    os.close(write_output)
    os.close(write_failure)
    told = b"".join(iter(lambda: os.read(failure, 4096), b""))  # closed by a successful exec
    os.close(failure)
    if told:
        raise OSError(*json.loads(told))
    return program, output


def become(directory: str, spec: dict[str, Any], output: int) -> None:
    """The child's part of `start`: a session and a place of its own, limits, then the program."""
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    silent = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((silent, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.chdir(os.path.join(directory, "work"))
    limit(spec)
    os.execvpe(spec["command"][0], spec["command"], spec["environment"])


def limit(spec: dict[str, Any]) -> None:
    """Limits of each single process; the keeper watches the sum. Address space is not limited: many only reserve it."""
    with open("/proc/loadavg", encoding="ascii") as file:
        tasks = int(file.read().split()[3].partition("/")[2])
    for name, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, (spec["memory_mb"] + SPARE_MB) * MB),
        (resource.RLIMIT_FSIZE, spec["disk_mb"] * MB),
        (resource.RLIMIT_NOFILE, 4096),
        (
            resource.RLIMIT_NPROC,
            max(tasks, 4096) + 2 * MAX_PROCESSES,
        ),  # counts all of the user's tasks, not the lease's
    ):
        _, hard = resource.getrlimit(name)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))
    with contextlib.suppress(OSError):
        os.nice(NICENESS)


class Keeper:
    """Copies output, watches limits, waits, cleans up."""

    def __init__(self, directory: str, spec: dict[str, Any], program: int, output: int) -> None:
        self._directory = directory
        self._spec = spec
        self._program = program
        self._output = output
        self._log_path = os.path.join(directory, "output.log")
        self._log = open(self._log_path, "ab", buffering=0)  # noqa: SIM115  (kept open, replaced when it is full)
        self._written = self._log.tell()
        self._asked = 0
        self._code: int | None = None
        self._look_at = self._disk_at = 0.0
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # ends a wait when a child has ended
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, self._on_term)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def keep(self) -> None:
        """Until the program has ended and everything that descends from it is gone."""
        while self._code is None:
            self._copy(POLL_S)
            self._reap()
            why = self._limit_passed()
            if why and self._code is None:
                self._write(f"[kaisar] stopped: {why}\n".encode())
                self._kill_all()
        self._kill_all()
        while self._output >= 0 and self._copy(0.05):  # what is left in the pipe
            pass
        path = os.path.join(self._directory, "exit")
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(str(self._code))
        os.replace(path + ".new", path)

    def _on_term(self, number: int, frame: object) -> None:
        self._asked += 1
        if self._asked > 1:
            self._kill_all()
            return
        with contextlib.suppress(OSError):
            os.killpg(self._program, signal.SIGTERM)

    def _copy(self, wait_s: float) -> bool:
        """Copy what the program wrote within `wait_s`; False when there was nothing, or the pipe is closed."""
        sources = [self._woken] if self._output < 0 else [self._woken, self._output]
        readable = select.select(sources, [], [], wait_s)[0]
        if self._woken in readable:
            os.read(self._woken, 4096)
        if self._output not in readable:
            return False
        data = os.read(self._output, 65536)
        if not data:
            os.close(self._output)
            self._output = -1
            return False
        self._write(data)
        return True

    def _write(self, data: bytes) -> None:
        if self._written + len(data) > LOG_BYTES:
            self._log.close()
            os.replace(self._log_path, self._log_path + ".1")
            self._log = open(self._log_path, "ab", buffering=0)  # noqa: SIM115
            self._written = 0
        with contextlib.suppress(OSError):  # a full disk must not stop the program
            self._log.write(data)
        self._written += len(data)

    def _reap(self) -> None:
        """Collect ended children; orphans of the program are ours, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._program:
                code = os.waitstatus_to_exitcode(status)
                self._code = code if code >= 0 else 128 - code

    def _limit_passed(self) -> str:
        if time.monotonic() < self._look_at:
            return ""
        self._look_at = time.monotonic() + POLL_S
        pids = descendants(os.getpid())
        if len(pids) > MAX_PROCESSES:
            return f"more than {MAX_PROCESSES} processes"
        if sum(resident_bytes(pid) for pid in pids) > self._spec["memory_mb"] * MB:
            return f"more than {self._spec['memory_mb']} MB of memory"
        if time.monotonic() >= self._disk_at:
            self._disk_at = time.monotonic() + DISK_POLL_S
            if used_bytes(os.path.join(self._directory, "work")) > self._spec["disk_mb"] * MB:
                return f"more than {self._spec['disk_mb']} MB of disk"
        return ""

    def _kill_all(self) -> None:
        for _ in range(100):
            pids = descendants(os.getpid())
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            if not pids:
                return
            time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """Everything below a process."""
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children(queue.pop())
        found += below
        queue += below
    return found


def children(pid: int) -> list[int]:
    """The children of all threads of a process; empty when it has ended."""
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):  # a kernel without CONFIG_PROC_CHILDREN
        return children_by_parent(pid)
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return found


def children_by_parent(pid: int) -> list[int]:
    """As `children`, by looking at every process."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [number for number in numbers if stat_fields(number)[1:2] == [str(pid)]]


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (state, parent, …); empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: pid and start name it; −1 when it has ended."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else -1


def resident_bytes(pid: int) -> int:
    """Memory in use; shared pages count for each process."""
    fields = stat_fields(pid)
    return int(fields[21]) * resource.getpagesize() if fields else 0


def used_bytes(directory: str) -> int:
    """Sum of the sizes on disk of all files below; links are not followed."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def prctl(option: int, value: int) -> None:
    """Linux' prctl(2), which the standard library lacks; without effect where there is none."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
