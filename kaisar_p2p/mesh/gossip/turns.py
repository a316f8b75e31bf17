"""What peers' gossip makes us do is done in short steps, so that requests are answered in between."""

from __future__ import annotations

import trio

STEP_S = 0.004  # of all readers together; then other tasks have their turn


class Turns:
    """The time that all readers have used since other tasks had their turn."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._number = 0

    def spend(self, duration_s: float) -> bool:
        """Count work; True when it was enough for now: `rest`."""
        self._spent_s += duration_s
        return self._spent_s >= STEP_S

    async def rest(self) -> None:
        """Let other tasks run until there is time again; at once if there is."""
        while self._spent_s >= STEP_S:
            number = self._number
            await trio.lowlevel.checkpoint()
            if number == self._number:  # the first one to be back: all others have had their turn too
                self._number += 1
                self._spent_s = 0.0
