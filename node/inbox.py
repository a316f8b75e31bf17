"""One bounded inbox with lanes: each kind of event has a priority, a length and a rule for what to drop when full.

A flood in one lane never delays a lane above it, and our own backlog never makes a message "late": events carry the
time at which they were received.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass

import trio

from protocols.actions import Event


class Lane(enum.IntEnum):
    """In order of service."""

    BLOCK = 0
    RESULT = 1
    CERTIFICATE = 2
    REQUEST = 3
    LEASE = 4
    EPOCH = 5
    ADVERT = 6


@dataclass(frozen=True)
class LaneRule:
    """`newest_wins` drops the oldest event when full, otherwise the new one is refused."""

    length: int
    newest_wins: bool
    reason: str


RULES = {
    Lane.BLOCK: LaneRule(4096, False, "blocks wait in the ledger: the follower pauses while this lane is full"),
    Lane.RESULT: LaneRule(4096, False, "answers to our own requests are bounded by the number of requests"),
    Lane.CERTIFICATE: LaneRule(2048, False, "a certificate that is refused here comes again with the epoch body"),
    Lane.REQUEST: LaneRule(512, False, "a refused request is closed and its sender retries"),
    Lane.LEASE: LaneRule(1024, False, "tenants wait for these"),
    Lane.EPOCH: LaneRule(1024, False, "proposals and signatures; members repeat them in the next round"),
    Lane.ADVERT: LaneRule(1024, True, "the newest advert of a worker replaces the older ones anyway"),
}


class Inbox:
    """Many producers, one consumer (the driver)."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[Event]] = {lane: deque() for lane in Lane}
        self._filled = trio.Event()
        self._room = trio.Event()
        self.dropped: Counter[str] = Counter()

    def put(self, lane: Lane, event: Event, *, over_limit: bool = False) -> bool:
        """Queue an event; False if the lane is full and its rule refuses the new one.

        `over_limit` is for the consumer's own step, which cannot wait for itself: at most one event for each action.
        """
        queue, rule = self._lanes[lane], RULES[lane]
        if len(queue) >= rule.length and not over_limit:
            self.dropped[lane.name.lower()] += 1
            if not rule.newest_wins:
                return False
            queue.popleft()
        queue.append(event)
        self._filled.set()
        return True

    async def put_patiently(self, lane: Lane, event: Event) -> None:
        """Queue an event, waiting for room: for producers that can pause."""
        while len(self._lanes[lane]) >= RULES[lane].length:
            if self._room.is_set():  # others may be waiting for the present one
                self._room = trio.Event()
            await self._room.wait()
        self.put(lane, event)

    def get_nowait(self) -> Event | None:
        """The oldest event of the first lane that has one."""
        for queue in self._lanes.values():
            if queue:
                event = queue.popleft()
                self._room.set()
                return event
        return None

    async def get(self) -> Event:
        """As `get_nowait`, waiting for an event."""
        while True:
            event = self.get_nowait()
            if event is not None:
                return event
            self._filled = trio.Event()
            await self._filled.wait()

    def depths(self) -> dict[str, int]:
        """Events waiting in each lane."""
        return {lane.name.lower(): len(queue) for lane, queue in self._lanes.items()}
