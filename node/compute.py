"""Proofs and checks run one at a time in a worker thread: there is one GPU, and a checker must not starve itself."""

from __future__ import annotations

import trio

from kaisar_p2p.hardware.prove import Backend, Proof
from kaisar_p2p.wire import matproof
from protocols.actions import CheckTask, ProveTask


class Computer:
    """Runs tasks on a backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, task: ProveTask | CheckTask) -> Proof | matproof.CheckResult:
        """The task's result; HardwareError when the backend fails. Abandoned between panels when cancelled."""
        cancelled = False

        def work() -> Proof | matproof.CheckResult:
            if isinstance(task, ProveTask):
                return self._backend.prove(task.job, task.seed, lambda: cancelled)
            tags = [matproof.tags_from_bytes(task.job, each) for each in task.tags]
            return matproof.check(task.job, task.seed, task.roots, tags, task.randomness, task.samples)

        try:
            return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
        except trio.Cancelled:
            cancelled = True
            raise
