"""What we remember about the behaviour of peers, also after they disconnect."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

log = logging.getLogger(__name__)

REJECTED_POINTS = 10.0
IMPATIENT_POINTS = 2.0  # a GRAFT during backoff
HALF_LIFE_S = 120.0
TOLERATED_POINTS = 25.0  # above it a peer is kept out of our topic meshes
BAN_POINTS = 100.0
_REMEMBERED = 4096


@dataclass(slots=True)
class _Record:
    points: float = 0.0
    updated: float = 0.0
    banned_until: float = 0.0


class Reputation:
    """Penalty points per machine key; they halve every HALF_LIFE_S. Times are seconds of one monotonic clock."""

    def __init__(self, ban_s: float) -> None:
        self._ban_s = ban_s
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def penalise(self, key: bytes, points: float, now: float) -> bool:
        """Add points; True when that bans the peer."""
        record = self._record(key)
        record.points = self._points(record, now) + points
        record.updated = now
        if record.points < BAN_POINTS:
            return False
        self.ban(key, now)
        return True

    def ban(self, key: bytes, now: float) -> None:
        """Refuse the peer for a while; half of the points that ban stay with it."""
        record = self._record(key)
        record.points, record.updated = BAN_POINTS / 2, now
        record.banned_until = now + self._ban_s

    def is_banned(self, key: bytes, now: float) -> bool:
        """The peer is refused at this time."""
        record = self._records.get(key)
        return record is not None and now < record.banned_until

    def score(self, key: bytes, now: float) -> float:
        """0 for a peer without blame, negative otherwise."""
        record = self._records.get(key)
        return -self._points(record, now) if record is not None else 0.0

    def mesh_score(self, key: bytes, now: float) -> float:
        """Negative when the peer should not be in a topic mesh."""
        return min(0.0, self.score(key, now) + TOLERATED_POINTS)

    def _record(self, key: bytes) -> _Record:
        record = self._records.setdefault(key, _Record())
        self._records.move_to_end(key)
        if len(self._records) > _REMEMBERED:
            self._records.popitem(last=False)
        return record

    @staticmethod
    def _points(record: _Record, now: float) -> float:
        return float(record.points * 0.5 ** ((now - record.updated) / HALF_LIFE_S))
