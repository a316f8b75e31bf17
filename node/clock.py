"""Wall time that never runs backwards."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the Unix epoch: the wall clock at start plus monotonic time since.

    A change of the system clock while the node runs does not disturb deadlines and measured times.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since 1970, UTC."""
        return self._offset + time.monotonic()
