"""What gossip remembers of messages: which were seen lately, and how far each author has come."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

_EARLIEST_NS = 1_700_000_000 * 10**9  # no sequence number below it is a time of ours
_SKEW_NS = 3 * 3600 * 10**9  # by which an author's clock may be ahead of ours
_NEWEST_OF_NOBODY = 0


class SeenMessages:
    """Ids of messages seen lately: those of the last `keep_s` for sure, while there are no more than `most` / 2."""

    def __init__(self, most: int, keep_s: float) -> None:
        self._most, self._keep_s = most, keep_s
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()
        self._began: float | None = None

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._new or message_id in self._old

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def add(self, message_id: bytes, now: float) -> None:
        """Remember an id."""
        if self._began is None:
            self._began = now
        self._new.add(message_id)
        if 2 * len(self._new) >= self._most:
            self._shift(now)

    def expire(self, now: float) -> None:
        """Forget what is old; at the latest after twice the time."""
        if self._began is not None and now - self._began >= self._keep_s:
            self._shift(now)

    def _shift(self, now: float) -> None:
        self._old, self._new, self._began = self._new, set(), now


@dataclass(slots=True)
class _Author:
    newest: int
    heard: float  # when, on our monotonic clock


class AuthorSequences:
    """Tells replays from news when the seen-cache has forgotten a message.

    Our sequence numbers are the author's clock in nanoseconds, never repeated. A message that is not newer than the
    newest accepted one, and that its author made more than `window_s` ago by its own clock, is a replay: `window_s` is
    what the seen-cache covers. Only the author's clock and elapsed time of ours are compared, so it does not matter
    how wrong either clock is.

    An author whose clock was set back over a restart says nothing newer for a while. It is believed again `forget_s`
    after we last accepted something of it; that is also when somebody could replay what a silent author said, each
    message once in `window_s` and rising. The topics' own rules decide what such a message is worth.

    Other implementations count otherwise: Go's numbers start at a time and go up by one, which the same rule fits;
    JavaScript's are random, and an author with a number that cannot be a time is left to the seen-cache. Of the
    authors heard of least recently, above `authors`, nothing is known.
    """

    def __init__(self, authors: int, window_s: float, forget_s: float) -> None:
        self._most, self._window_s, self._forget_s = authors, window_s, forget_s
        self._authors: OrderedDict[bytes, _Author] = OrderedDict()

    def __len__(self) -> int:
        return len(self._authors)

    def is_replay(self, author: bytes, sequence: int, now: float) -> bool:
        """The message is an old one; `now` is our monotonic clock."""
        known = self._authors.get(author)
        if known is None or sequence > known.newest or now - known.heard > self._forget_s:
            return False
        return (known.newest - sequence) / 1e9 + (now - known.heard) > self._window_s

    def accepted(self, author: bytes, sequence: int, now: float) -> None:
        """A message of this author, not a replay, was accepted."""
        known = self._authors.get(author)
        is_time = _EARLIEST_NS <= sequence <= time.time_ns() + _SKEW_NS
        if known is None or now - known.heard > self._forget_s:
            known = self._authors[author] = _Author(sequence if is_time else _NEWEST_OF_NOBODY, now)
            if len(self._authors) > self._most:
                self._authors.popitem(last=False)
        elif not is_time:
            known.newest = _NEWEST_OF_NOBODY
        elif sequence > known.newest != _NEWEST_OF_NOBODY:
            known.newest, known.heard = sequence, now
        if known.newest == _NEWEST_OF_NOBODY:
            known.heard = now
        self._authors.move_to_end(author)
