"""Finding out which peers are gone: one task for all connections of a node.

A peer that we have not heard of for `keepalive_s` is pinged; one that stays silent for 1.75 times that, or that does
not take what we send for `send_stall_s`, is dead. Whoever talks anyway is pinged rarely, for the round-trip time.
Over a relay, of which there are others, what goes unanswered for a second is followed by a ping, and a ping that is
not back after two seconds makes the connection doubtful: it lives on, but what is new looks for another way.
"""

from __future__ import annotations

import logging
import secrets
from typing import Protocol

import trio

log = logging.getLogger(__name__)

_MEASURED_EVERY = 20  # keepalive intervals
_DEAD_AFTER = 1.75  # times keepalive_s
_TICKS = 10  # in keepalive_s
_SELDOM = 0.3  # times keepalive_s: between two looks at a connection with which all is well
_DIALER_WAITS = 1.2  # times keepalive_s: more than a tick longer
_UNANSWERED_S, _DOUBTFUL_S = 1.0, 2.0


class Kept(Protocol):
    """A connection that wants to be looked at, but not before the trio time `tend_at`."""

    tend_at: float

    def tend(self, now: float) -> None:
        """Do what is due at trio time `now`."""

    def abort(self) -> None:
        """End the connection at once."""


class Keeper:
    """Looks at all connections of a node, ten times in `keepalive_s`."""

    def __init__(self, keepalive_s: float) -> None:
        self._tick_s = keepalive_s / _TICKS
        self._kept: dict[Kept, None] = {}

    def add(self, kept: Kept) -> None:
        """Begin to look at a connection."""
        self._kept[kept] = None

    def discard(self, kept: Kept) -> None:
        """Stop looking at it."""
        self._kept.pop(kept, None)

    async def run(self) -> None:
        """Look at connections for ever."""
        while True:
            planned = trio.current_time() + self._tick_s
            await trio.sleep_until(planned)
            now = trio.current_time()
            for kept in [kept for kept in self._kept if kept.tend_at <= now]:
                self._tend(kept, now)

    def _tend(self, kept: Kept, now: float) -> None:
        try:
            kept.tend(now)
        except Exception:  # the edge of a task that all connections share: a bug of ours costs the one it met
            log.exception("a connection could not be looked after, and ends")
            self.discard(kept)
            kept.abort()


class Liveness:
    """What one connection knows about its peer being alive. Times are trio's clock."""

    def __init__(self, keepalive_s: float, stall_s: float) -> None:
        self.rtt_s: float | None = None
        self.write_began: float | None = None  # a write that has not returned
        self.unanswered_since = 0.0  # the first write since something was received, when it is later than that
        self.impatient = False
        self._keepalive_s, self._stall_s = keepalive_s, stall_s
        self._patience_s = keepalive_s
        self._looked = self._excused_until = 0.0
        self._ping_id, self._pinged = 0, 0.0

    def begin(self, now: float, *, dialed: bool = False) -> None:
        """The connection begins. Who dialed leaves the pings to the other side, unless that one forgets them: nodes
        with many connections have been dialed, and what they do for many at once costs them less.
        """
        self._patience_s = self._keepalive_s * (_DIALER_WAITS if dialed else 1)
        self._looked = self._excused_until = now
        self._ping_id = secrets.randbits(32)
        self._pinged = now - self._keepalive_s

    def look(self, now: float, last_received: float) -> str | None:
        """Why the peer is to be given up, or None."""
        if now - self._looked > self._keepalive_s / 2:  # we were busy, or asleep: what it sent has not been read yet
            self._excused_until = now + self._keepalive_s
        self._looked = now
        if now < self._excused_until:
            return None
        if now - last_received > _DEAD_AFTER * self._keepalive_s:
            return f"silent for {now - last_received:.0f} s"
        if self.write_began is not None and now - self.write_began > self._stall_s:
            return f"has not taken what we sent for {self._stall_s:.0f} s"
        return None

    def next_look(self, now: float, last_received: float) -> float:
        """When there may be something to do. Nothing is urgent while no ping is under way."""
        if self.impatient or self.write_began is not None or last_received < self._pinged:
            return now
        return min(now + _SELDOM * self._keepalive_s, last_received + self._patience_s)

    def ping_due(self, now: float, last_received: float) -> int | None:
        """The value of a ping to send now, or None."""
        patience = 1 if self.rtt_s is None else _MEASURED_EVERY  # a busy connection is not silent
        quiet_s, unmeasured_s = now - max(last_received, self._pinged), now - self._pinged
        if (
            quiet_s < self._patience_s
            and unmeasured_s < patience * self._keepalive_s
            and not (self.impatient and self._is_unanswered(now, last_received))
        ):
            return None
        self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
        self._pinged = now
        return self._ping_id

    def _is_unanswered(self, now: float, last_received: float) -> bool:
        """We have sent something since we last heard of the peer, a while ago, and no ping after it."""
        since = self.unanswered_since
        return last_received < since and self._pinged < since and now - since >= _UNANSWERED_S

    def is_doubtful(self, now: float, last_received: float) -> bool:
        """A ping is late, and nothing else has come since."""
        return last_received < self._pinged and now - self._pinged >= _DOUBTFUL_S

    def on_pong(self, value: int, now: float) -> None:
        """A ping came back."""
        if value == self._ping_id:
            self.rtt_s = now - self._pinged
