"""What peers' gossip makes us do is done in short steps and leaves time for everything else.

However much arrives, reading and judging it takes at most SHARE of a core in the long run: what is sent beyond that is
read later, so its senders are slowed down, and requests are answered in between.
"""

from __future__ import annotations

import time

import trio

from kaisar_p2p.mesh.limits import TokenBucket

STEP_S = 0.004  # of all readers together; then other tasks have their turn
SHARE = 0.3
_BURST_S = 0.03

worked_s = time.thread_time  # of the processor: what others do on this machine is not held against gossip


class Turns:
    """The processor time that all readers and judges have used since other tasks had their turn."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._number = 0
        self._budget = TokenBucket(SHARE, _BURST_S, 0.0)
        self._resume = 0.0  # trio time

    def spend(self, duration_s: float) -> bool:
        """Count work; True when it was enough for now: `rest`."""
        now = trio.current_time()
        self._spent_s += duration_s
        self._resume = now + self._budget.take(duration_s, now)
        return self._spent_s >= STEP_S

    async def rest(self) -> None:
        """Let other tasks run until there is time again; at once if there is."""
        while self._spent_s >= STEP_S:
            number = self._number
            await trio.sleep_until(self._resume)
            if number == self._number:  # the first one to be back: all others have had their turn too
                self._number += 1
                self._spent_s = 0.0
