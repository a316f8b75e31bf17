"""A victim, two honest bystanders that talk through it, and an undisturbed pair beside them: processes of their own.

The bystanders ask the victim and publish certificates to each other all the time; each delay is measured where it is
felt. `Scene.attacked_by` measures them idle, runs an attack in yet another process, and says what it did.

What "three times idle" means on a machine that others use, too: idle p99 is taken right before each attack and counts
as at least `FLOOR_S`, because the 99th percentile of a few hundred round trips of 1 ms is the scheduler's. The attacker
runs at the lowest priority. A pair of nodes that nobody attacks is measured during the attack, and p99 may be three
times theirs; and as the system tells for how long the victim could have run and was not let, the limit is stretched by
that. On a machine with nothing else to do both change nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from benchmarks.subject_process import ROOT, SubjectProcess, subject

FLOOR_S = 0.010
IDLE_S = 1.0
LEAST_S = 2.0
TIMES_IDLE = 3.0
MEMORY_BYTES = 32 * 1024 * 1024
MEASURABLE = 4.0
"""Where others have the processors for three quarters of the time that the victim needs, delays say nothing."""
PROBE_INTERVAL_S = 0.02
PATIENCE = {"handshake_s": 4.0, "negotiation_s": 4.0}
"""The only limits of the victim that are not the defaults, so that nobody has to wait for ten seconds."""
_READY_S = 20.0
_SAMPLE_S = 0.02


@dataclass
class Outcome:
    """What an attack did to the others, and what it says itself."""

    told: dict[str, Any]
    idle: dict[str, list[float]]
    during: dict[str, list[float]]
    beside: list[float]
    failures: list[str]
    published: int
    grown_bytes: int
    before: dict[str, Any]
    after: dict[str, Any]
    stretch: float  # how much longer everything took because others had the processor

    def p99(self, kind: str) -> tuple[float, float]:
        """During the attack, and what it may be; s."""
        usual = max(FLOOR_S, _p99(self.idle[kind]), _p99(self.beside))
        return _p99(self.during[kind]), TIMES_IDLE * usual * self.stretch

    def refused(self, *reasons: str) -> int:
        """How often the victim refused for one of these reasons (all, when none is named) during the attack."""
        after, before = self.after["refused"], self.before["refused"]
        return sum(n - before.get(reason, 0) for reason, n in after.items() if not reasons or reason in reasons)

    def messages(self, key: str) -> int:
        """How many messages had this "topic/verdict" during the attack."""
        return int(self.after["messages"].get(key, 0) - self.before["messages"].get(key, 0))

    def __str__(self) -> str:
        found = {kind: [round(1e3 * value, 1) for value in self.p99(kind)] for kind in ("requests", "gossip")}
        grown = f"grown {self.grown_bytes >> 10} KiB"
        return f"p99 and limit in ms {found} at stretch {self.stretch:.1f}, {grown}, told {self.told}"


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else 0.0


class Scene:
    """The processes of one module of tests."""

    def __init__(self, processes: ExitStack, **victim_options: Any) -> None:
        victim = {"limits": PATIENCE, **victim_options}
        started = [processes.enter_context(subject(options)) for options in (victim, {}, {}, {}, {})]
        self.victim, self.first, self.second, self._quiet, self._quiet_peer = started
        for bystander, centre in (
            (self.first, self.victim),
            (self.second, self.victim),
            (self._quiet_peer, self._quiet),
        ):
            bystander.ask("connect", key=centre.key, addresses=centre.addresses)
        self._wait_until(self._is_connected)
        for bystander, centre in (
            (self.first, self.victim),
            (self.second, self.victim),
            (self._quiet_peer, self._quiet),
        ):
            bystander.ask("probe", peers=[centre.key], interval_s=PROBE_INTERVAL_S)
        self._wait_until(lambda: all(p.ask("latencies")["gossip"] for p in (self.first, self.second)))
        # Growth counts from here: what one attack has left is there already when the next one begins.
        self._rss_bytes = self.victim.rss_bytes
        self.is_spent = self.attacked = False

    def _is_connected(self) -> bool:
        figures = [self.victim.ask("figures"), self._quiet.ask("figures")]
        return all(f["subscribers"]["certificate"] >= want for f, want in zip(figures, (2, 1), strict=True))

    @staticmethod
    def _wait_until(condition: Any) -> None:
        end = time.monotonic() + _READY_S
        while not condition():
            assert time.monotonic() < end, "the honest peers do not find each other"
            time.sleep(0.1)

    @property
    def lives(self) -> bool:
        """The victim runs, and answers."""
        return self.victim.is_alive and "tasks" in self.victim.ask("figures")

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _take(self) -> tuple[dict[str, list[float]], list[str], int, list[float]]:
        told = [self.first.ask("latencies"), self.second.ask("latencies")]
        beside = self._quiet_peer.ask("latencies")["requests"]
        delays = {kind: told[0][kind] + told[1][kind] for kind in ("requests", "gossip")}
        return delays, told[0]["failures"] + told[1]["failures"], told[0]["published"] + told[1]["published"], beside

    def attacked_by(self, name: str, /, **arguments: Any) -> Outcome:
        """Run one of `tests.attacks.attackers` against the victim."""
        self._take()
        time.sleep(IDLE_S)
        idle, *_ = self._take()
        before, scheduled = self.victim.ask("figures"), self.victim.scheduled
        began = time.monotonic()
        with self._watched() as peak:
            told = run_attacker(name, self.victim, **arguments)
            time.sleep(max(0.0, began + LEAST_S - time.monotonic()))  # enough round trips for a percentile
        ran, waited = (now - then for now, then in zip(self.victim.scheduled, scheduled, strict=True))
        during, failures, published, beside = self._take()
        after = self.victim.ask("figures")
        return Outcome(
            told=told,
            idle=idle,
            during=during,
            beside=beside,
            failures=failures,
            published=published,
            grown_bytes=max(0, peak[0] - self._rss_bytes),
            before=before,
            after=after,
            stretch=(ran + waited) / ran if ran else 1.0,
        )

    @contextmanager
    def _watched(self) -> Iterator[list[int]]:
        """The victim's largest resident memory while the context lasts."""
        peak, ended = [self.victim.rss_bytes], threading.Event()

        def watch() -> None:
            while not ended.wait(_SAMPLE_S) and self.victim.is_alive:
                peak[0] = max(peak[0], self.victim.rss_bytes)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield peak
        finally:
            ended.set()
            thread.join()


def run_attacker(name: str, victim: SubjectProcess, /, **arguments: Any) -> dict[str, Any]:
    """The attack in a process of its own, at the lowest priority; what it says on its last line."""
    target = {"host_and_port": victim.host_and_port, "key": victim.key, **arguments}
    command = [sys.executable, "-m", "tests.attacks.attackers", name, json.dumps(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"the attacker itself failed:\n{done.stderr[-3000:]}"
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def check(scene: Scene, outcome: Outcome) -> None:
    """What holds after every attack."""
    assert scene.lives
    assert not outcome.failures, outcome
    if outcome.stretch <= MEASURABLE:
        for kind in ("requests", "gossip"):
            found, limit = outcome.p99(kind)
            assert found <= limit, f"{kind}: {outcome}"
    assert len(outcome.during["gossip"]) >= 0.95 * outcome.published, f"certificates are missing: {outcome}"
    assert outcome.grown_bytes <= MEMORY_BYTES, outcome
    assert outcome.after["subscribers"]["certificate"] >= 2, "a bystander is gone"
