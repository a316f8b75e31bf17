"""A swarm of real processes in one directory: up, status, down, logs, from any shell.

`swarm.json` holds who runs, by process id and start time; `swarm.lock` keeps two commands from changing it at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kaisar_p2p.errors import DataDirectoryError, KaisarError, NodeUnavailable
from testnet.containers import end_containers
from testnet.node_api import NodeApi
from testnet.prepare import Member, Prepared, load_prepared
from testnet.processes import Running, exit_code, peak_memory_bytes, spawn, stop, strays, tail

STATE_FILE = "swarm.json"
LOCK_FILE = "swarm.lock"
READY_TIMEOUT_S = 90.0
STOP_GRACE_S = 10.0
POLL_S = 0.1

Report = Callable[[str, str], None]
"""Called with a node's name and what became of it: "starting", "ready", "stopped"."""


class SwarmError(KaisarError):
    """A node of the swarm could not be started, or has died."""


@dataclass(frozen=True)
class NodeStatus:
    """A node as a look from outside finds it; numbers are None where it does not answer."""

    name: str
    roles: tuple[str, ...]
    state: str
    pid: int | None
    peers: int | None
    block: int | None
    memory_bytes: int | None
    peak_memory_bytes: int | None


class Swarm:
    """The processes of a prepared network."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._apis: dict[str, NodeApi] = {}

    @classmethod
    def open(cls, directory: Path) -> Swarm:
        """The swarm in a directory; DataDirectoryError when there is none."""
        return cls(load_prepared(directory))

    @property
    def directory(self) -> Path:
        """Where everything of this swarm is."""
        return self.prepared.directory

    def member(self, name: str) -> Member:
        """A node by name; SwarmError with the names there are."""
        for member in self.prepared.members:
            if member.name == name:
                return member
        names = ", ".join(member.name for member in self.prepared.members)
        raise SwarmError(f"no node is called {name!r}", hint=f"there are {names}")

    def api(self, name: str) -> NodeApi:
        """A node's API."""
        if name not in self._apis:
            self._apis[name] = NodeApi(self.prepared.data_directory(self.member(name).name))
        return self._apis[name]

    def running(self) -> dict[str, Running]:
        """The nodes that run now."""
        return {name: each for name, each in self._read().items() if each.process() is not None}

    # ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def up(self, report: Report, *, timeout_s: float = READY_TIMEOUT_S) -> list[str]:
        """Start what does not run yet and wait until it answers; returns the names started.

        When one of them dies, when the time is up or on Ctrl-C, all that were started are stopped again.
        """
        with self._locked():
            running = self.running()
            wanted = [each.name for each in self.prepared.members if each.start and each.name not in running]
            started: dict[str, Running] = {}
            try:
                self._start_all(wanted, started, report, timeout_s)
            except BaseException:
                self._stop(started, STOP_GRACE_S)
                raise
            return wanted

    def start(self, name: str, *, timeout_s: float = READY_TIMEOUT_S) -> Running:
        """Start one node and wait until it answers; SwarmError when it runs already, or dies."""
        member = self.member(name)
        with self._locked():
            if name in self.running():
                raise SwarmError(f"{name} runs already", hint="`kaisar testnet status` shows it")
            started: dict[str, Running] = {}
            self._start_all([member.name], started, lambda *_: None, timeout_s)
            return started[name]

    def _start_all(self, names: list[str], started: dict[str, Running], report: Report, timeout_s: float) -> None:
        """A few at a time: a node's first second is all computing, and the first one lets the others find peers."""
        at_once = (os.cpu_count() or 1) + 1
        until = time.monotonic() + timeout_s
        waiting, starting = list(names), list[str]()
        while waiting or starting:
            while waiting and len(starting) < at_once:
                name = waiting.pop(0)
                starting.append(name)
                started[name] = self._spawn(name)
                report(name, "starting")
            for name in [each for each in starting if self._answers(each, started[each])]:
                starting.remove(name)
                report(name, "ready")
            self._check_alive(started)
            if starting and time.monotonic() > until:
                raise self._failure(starting[0], f"does not answer after {timeout_s:g} s")
            if starting:
                time.sleep(POLL_S)

    def _spawn(self, name: str) -> Running:
        member = self.member(name)
        faults = {f"KAISAR_FAULT_{fault.upper()}": str(value) for fault, value in member.faults}
        data_directory, log = self.prepared.data_directory(name), self.prepared.log_path(name)
        running = spawn(data_directory, log, self.directory, faults)
        self._write(self._read() | {name: running})
        return running

    def _answers(self, name: str, running: Running) -> bool:
        api = self.api(name)
        try:
            api.get("status")
        except KaisarError:
            api.close()
            return False
        if api.pid != running.pid:  # the file of an earlier run that was killed
            api.close()
            return False
        return True

    def _check_alive(self, started: dict[str, Running]) -> None:
        for name, running in started.items():
            if running.process() is None:
                code = exit_code(running)
                raise self._failure(name, "has died" if code is None else f"ended with exit code {code}")

    def _failure(self, name: str, what: str) -> SwarmError:
        log = self.prepared.log_path(name)
        end = "\n".join(f"  {name} | {line}" for line in tail(log).splitlines()[-12:])
        return SwarmError(f"{name} {what}; the end of its log:\n{end}", hint=f"its whole log is {log}")

    def check_alive(self) -> None:
        """SwarmError, with the end of its log, when a node that was started has died."""
        self._check_alive(self._read())

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def status(self) -> list[NodeStatus]:
        """Every node, as its process and its API say."""
        known = self._read()
        return [self._node_status(member, known.get(member.name)) for member in self.prepared.members]

    def _node_status(self, member: Member, running: Running | None) -> NodeStatus:
        process = running.process() if running is not None else None
        if running is None or process is None:
            state = "stopped" if running is None else "died"
            return NodeStatus(member.name, member.roles, state, None, None, None, None, None)
        peers, block, state = None, None, "running"
        try:
            plain = self.api(member.name).get("status")
            peers, block = int(plain["peers"]), int(plain["chain"]["block"])
        except KaisarError:
            state = "silent"
        try:
            memory = process.memory_info().rss
        except psutil.Error:
            memory = None
        peak = peak_memory_bytes(running.pid)
        return NodeStatus(member.name, member.roles, state, running.pid, peers, block, memory, peak)

    # ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def down(self, *, grace_s: float = STOP_GRACE_S) -> list[str]:
        """Stop every node, end its leases, leave no process; returns the names of those that had to be killed."""
        with self._locked():
            return self._stop(self._read(), grace_s)

    def stop_node(self, name: str, *, grace_s: float = STOP_GRACE_S) -> None:
        """Stop one node and leave its leases as they are, as its owner would."""
        name = self.member(name).name
        with self._locked():
            running = self._read()
            process = running[name].process() if name in running else None
            if process is not None:
                stop([process], grace_s)
            self._write({other: each for other, each in running.items() if other != name})
            self._forget(name)

    def kill(self, name: str) -> None:
        """kill -9, as a power cut would. What its leases run lives on, as after a crash."""
        name = self.member(name).name
        with self._locked():
            running = self._read()
            process = running[name].process() if name in running else None
            if process is None:
                raise SwarmError(f"{name} does not run", hint="`kaisar testnet status` shows who does")
            process.kill()
            stop([process], 5.0)
            self._write({other: each for other, each in running.items() if other != name})
            self._forget(name)

    def _stop(self, running: dict[str, Running], grace_s: float) -> list[str]:
        names = {each.pid: name for name, each in running.items()}
        alive = [process for each in running.values() if (process := each.process()) is not None]
        killed = stop(alive, grace_s)
        left = {name: each for name, each in self._read().items() if name not in running}
        if not left:
            stop(list(strays(self.directory)), 3.0)  # leases, which outlive their node by design
            end_containers(self.prepared)
        self._write(left)
        for name in running:
            self._forget(name)
        return [names[pid] for pid in killed if pid in names]

    def _forget(self, name: str) -> None:
        if (api := self._apis.pop(name, None)) is not None:
            api.close()

    # ── the state file ───────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> dict[str, Running]:
        try:
            plain = json.loads((self.directory / STATE_FILE).read_text(encoding="utf-8"))
            return {str(name): Running(int(each["pid"]), float(each["started_s"])) for name, each in plain.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            path = self.directory / STATE_FILE
            hint = f"remove it once no process of {self.directory} runs"
            raise DataDirectoryError(f"{path} cannot be used: {error}", hint=hint) from None

    def _write(self, running: dict[str, Running]) -> None:
        path = self.directory / STATE_FILE
        if not running:
            path.unlink(missing_ok=True)
            return
        draft = path.with_suffix(".draft")
        plain = {name: {"pid": each.pid, "started_s": each.started_s} for name, each in running.items()}
        draft.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with swarm_lock(self.directory):
            yield


@contextlib.contextmanager
def swarm_lock(directory: Path) -> Iterator[None]:
    """Hold a swarm's directory for one command; SwarmError with the other's process id while it is held."""
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", errors="replace").strip()
            raise SwarmError(
                f"another command (process {holder or '?'}) works on {directory}", hint="wait until it is done"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def wait_until(what: str, found: Callable[[], object], timeout_s: float, *, hint: str = "") -> None:
    """Ask `found` until it says yes; SwarmError after `timeout_s`. A node that does not answer counts as no."""
    until = time.monotonic() + timeout_s
    last = ""
    while True:
        try:
            if found():
                return
        except NodeUnavailable as error:
            last = f": {error.message}"
        if time.monotonic() > until:
            raise SwarmError(f"not seen within {timeout_s:g} s: {what}{last}", hint=hint)
        time.sleep(POLL_S)
