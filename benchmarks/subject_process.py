"""Handle on a `benchmarks.mesh_subject` process: start it, ask it, watch its memory and its open files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


class SubjectProcess:
    """A running subject. Not for several threads at once."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.watched = psutil.Process(process.pid)

    @cached_property
    def _hello(self) -> dict[str, Any]:
        return self._read()

    @property
    def key(self) -> str:
        """Its public key in hex; waits until it has started."""
        return str(self._hello["key"])

    @property
    def addresses(self) -> list[str]:
        """Where it listens; waits until it has started."""
        return list(self._hello["addresses"])

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Where it listens."""
        parts = self.addresses[0].split("/")
        return parts[2], int(parts[4])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command; raises RuntimeError when the process has ended."""
        assert self._hello and self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the subject ended with exit code {self._process.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def is_alive(self) -> bool:
        """The process runs."""
        return self._process.poll() is None

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(self.watched.memory_info().rss)

    @property
    def open_files(self) -> int:
        """File descriptors."""
        return int(self.watched.num_fds())

    @property
    def scheduled(self) -> tuple[float, float]:
        """Seconds that its main thread has run, and has waited for a processor; 0 where the system does not tell."""
        try:
            ran_ns, waited_ns, _slices = Path(f"/proc/{self._process.pid}/schedstat").read_text().split()
        except (OSError, ValueError):
            return 0.0, 0.0
        return int(ran_ns) / 1e9, int(waited_ns) / 1e9

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        times = self.watched.cpu_times()
        return float(times.user + times.system)


@contextmanager
def subject(options: Mapping[str, Any] | None = None) -> Iterator[SubjectProcess]:
    """A subject with these options (`limits`, `seed`, `listen`), ended with the context."""
    command = [sys.executable, "-m", "benchmarks.mesh_subject", json.dumps(dict(options or {}))]
    # Its own session: Ctrl-C is for the program that tells what was measured.
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield SubjectProcess(process)
        finally:
            process.kill()
