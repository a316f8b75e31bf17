"""What we remember about the behaviour of peers: after they disconnect, and after we restart.

Points count offences of the last minutes and lead to a ban. Each ban is a strike, strikes last for hours, and make
the next ban longer. What honest nodes can do costs nothing: a message that is late, unknown, or judged by a newer
block than ours is IGNOREd, never REJECTed. Part of every point goes to the account of the address that it came
from, so that a new key from the same place has no clean sheet; accounts of addresses are milder, because several
may share one. Times are arguments, seconds of one monotonic clock.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

REJECTED_POINTS = 10.0  # a message that its own author sends us
FORWARDED_POINTS = 4.0  # of another author: the sender should have checked it, but did not make it
IMPATIENT_POINTS = 2.0  # a GRAFT during backoff
BROKEN_STREAM_POINTS = 10.0  # a stream that is not multistream-select, a message that cannot be decoded
UNAUTHENTIC_POINTS = 20.0  # a frame that does not authenticate: somebody on the way may have changed it
HANDSHAKE_POINTS = 1.0  # of an address: a handshake that came to nothing
BAN_POINTS = 100.0
TOLERATED_POINTS = 25.0  # above it a peer is kept out of our topic meshes
HALF_LIFE_S = 600.0
STRIKE_POINTS = 20.0  # what one strike takes from the score
STRIKE_HALF_LIFE_S = 6 * 3600.0
_STRIKES_MOST = 16.0
_ESCALATION = 5.0  # times longer with each strike
_ADDRESS_SHARE = 0.25  # of a key's points and strikes that its address gets
_INHERITED_STRIKES = 1.0  # at most, that a new key gets from its address
_ADDRESS_BAN_MOST_S = 3600.0

_HEADER = struct.Struct(">4sI")
_SUBJECT_BYTES = 48
_ENTRY = struct.Struct(f">BB{_SUBJECT_BYTES}sfff")  # kind, length and subject, points, strikes, seconds of ban left
_MAGIC = b"KRP1"
_KEY, _ADDRESS = 0, 1


@dataclass(slots=True)
class _Record:
    points: float = 0.0
    strikes: float = 0.0
    updated: float = 0.0
    banned_until: float = -math.inf

    def decay(self, now: float) -> None:
        passed = max(0.0, now - self.updated)
        self.points *= 0.5 ** (passed / HALF_LIFE_S)
        self.strikes *= 0.5 ** (passed / STRIKE_HALF_LIFE_S)
        self.updated = max(self.updated, now)

    def blame(self, now: float) -> float:
        passed = max(0.0, now - self.updated)
        strikes = self.strikes * 0.5 ** (passed / STRIKE_HALF_LIFE_S)
        return float(self.points * 0.5 ** (passed / HALF_LIFE_S) + STRIKE_POINTS * strikes)


class _Accounts:
    """Records of one kind of subject; when they are too many, those with the least blame are forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.records: dict[bytes, _Record] = {}

    def open(self, subject: bytes, now: float) -> _Record:
        record = self.records.get(subject)
        if record is None:
            record = self.records[subject] = _Record(updated=now)
            if len(self.records) > self._most + self._most // 8:  # an eighth at a time: sorting costs
                self.trim(now)
        record.decay(now)
        return record

    def trim(self, now: float) -> None:
        newest = next(reversed(self.records))
        worst = sorted(
            (subject for subject in self.records if subject != newest),
            key=lambda subject: (self.records[subject].banned_until > now, self.records[subject].blame(now)),
            reverse=True,
        )
        self.records = {subject: self.records[subject] for subject in (*worst[: self._most - 1], newest)}

    def blame(self, subject: bytes, now: float) -> float:
        record = self.records.get(subject)
        return record.blame(now) if record is not None else 0.0

    def ban_left_s(self, subject: bytes, now: float) -> float:
        record = self.records.get(subject)
        return max(0.0, record.banned_until - now) if record is not None else 0.0


class Reputation:
    """Accounts of machine keys and of the addresses that they came from.

    `ban_s` is the length of a first ban, each further one is five times as long, at most `ban_max_s`. `address_of`
    says where a connected peer comes from, None when that is nobody's account (a private address, a relay).
    """

    def __init__(
        self,
        ban_s: float,
        ban_max_s: float = 86_400.0,
        *,
        remembered: int = 4096,
        address_of: Callable[[bytes], str | None] = lambda _key: None,
    ) -> None:
        self._ban_s, self._ban_max_s = ban_s, ban_max_s
        self._keys, self._addresses = _Accounts(remembered), _Accounts(remembered)
        self._address_of = address_of
        self.changes = 0  # since the start; what is saved is saved again when it grows

    # -- offences -----------------------------------------------------------------------------------------------------

    def penalise(self, key: bytes, points: float, now: float) -> bool:
        """Add points; True when that bans the peer."""
        self.changes += 1
        record = self._open(key, now)
        record.points += points
        if record.points >= BAN_POINTS:
            self.ban(key, now)
            return True
        self._charge_address(key, points, 0.0, now)
        return False

    def ban(self, key: bytes, now: float) -> float:
        """Refuse the peer for the returned seconds; half of the points that ban stay with it.

        Several offences found at once, on connections that are just being closed, are one strike.
        """
        self.changes += 1
        record = self._open(key, now)
        if record.banned_until > now:
            record.points = min(record.points, BAN_POINTS / 2)
            return record.banned_until - now
        self._charge_address(key, BAN_POINTS, 1.0, now)
        return self._strike(record, 1.0, self._ban_max_s, now)

    def penalise_address(self, account: str, points: float, now: float) -> None:
        """Add points to the account of an address, for what nobody has signed."""
        self.changes += 1
        record = self._addresses.open(account.encode(), now)
        record.points += points
        if record.points >= BAN_POINTS:
            self._strike(record, _ADDRESS_SHARE, min(_ADDRESS_BAN_MOST_S, self._ban_max_s), now)

    def _open(self, key: bytes, now: float) -> _Record:
        is_new = key not in self._keys.records
        record = self._keys.open(key, now)
        if is_new and (account := self._address_of(key)) is not None:
            address = self._addresses.records.get(account.encode())
            if address is not None:
                record.strikes = min(_INHERITED_STRIKES, address.strikes)
        return record

    def _charge_address(self, key: bytes, points: float, strikes: float, now: float) -> None:
        account = self._address_of(key)
        if account is not None:
            address = self._addresses.open(account.encode(), now)
            address.strikes = min(_STRIKES_MOST, address.strikes + strikes * _ADDRESS_SHARE)
            self.penalise_address(account, points * _ADDRESS_SHARE, now)

    def _strike(self, record: _Record, strikes: float, most_s: float, now: float) -> float:
        record.strikes = min(_STRIKES_MOST, record.strikes + strikes)
        record.points = BAN_POINTS / 2
        length_s = min(most_s, self._ban_s * _ESCALATION ** max(0.0, record.strikes - 1.0))
        record.banned_until = max(record.banned_until, now + length_s)
        return float(length_s)

    # -- judgement ----------------------------------------------------------------------------------------------------

    def is_banned(self, key: bytes, now: float) -> bool:
        """The peer is refused at this time."""
        return self._keys.ban_left_s(key, now) > 0

    def ban_left_s(self, key: bytes, now: float) -> float:
        """Seconds for which the peer is still refused."""
        return self._keys.ban_left_s(key, now)

    def is_address_banned(self, account: str, now: float) -> bool:
        """Whoever comes from there is refused at this time."""
        return self._addresses.ban_left_s(account.encode(), now) > 0

    def banned(self, now: float) -> int:
        """How many keys and addresses are refused at this time."""
        records = (*self._keys.records.values(), *self._addresses.records.values())
        return sum(record.banned_until > now for record in records)

    def score(self, key: bytes, now: float) -> float:
        """0 for a peer without blame, negative otherwise."""
        return -self._keys.blame(key, now)

    def blame(self, key: bytes, account: str | None, now: float) -> float:
        """Points of a key, and a share of those of the address that it comes from."""
        of_address = self._addresses.blame(account.encode(), now) if account is not None else 0.0
        return self._keys.blame(key, now) + _ADDRESS_SHARE * of_address

    def mesh_score(self, key: bytes, now: float) -> float:
        """Negative when the peer should not be in a topic mesh."""
        return min(0.0, self.score(key, now) + TOLERATED_POINTS)

    # -- over restarts ------------------------------------------------------------------------------------------------

    def dump(self, now: float) -> bytes:
        """All accounts that matter, for `load`; at most 62 bytes for each of the remembered."""
        entries = []
        for kind, accounts in ((_KEY, self._keys), (_ADDRESS, self._addresses)):
            if accounts.records:
                accounts.trim(now)
            for subject, record in accounts.records.items():
                record.decay(now)
                left_s = max(0.0, record.banned_until - now)
                fits = len(subject) <= _SUBJECT_BYTES
                if fits and (left_s > 0 or record.points >= 1 or record.strikes >= 0.05):
                    entries.append(_ENTRY.pack(kind, len(subject), subject, record.points, record.strikes, left_s))
        return _HEADER.pack(_MAGIC, len(entries)) + b"".join(entries)

    def load(self, data: bytes, passed_s: float, now: float) -> int:
        """Take over what `dump` gave `passed_s` seconds ago; returns how many accounts. Raises ValueError."""
        if len(data) < _HEADER.size:
            raise ValueError("too short")
        magic, count = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) != _HEADER.size + count * _ENTRY.size:
            raise ValueError("not what this version writes")
        then = now - max(0.0, passed_s)
        for kind, length, padded, points, strikes, left_s in _ENTRY.iter_unpack(data[_HEADER.size :]):
            if kind not in (_KEY, _ADDRESS) or length > len(padded) or not _sane(points, strikes, left_s):
                raise ValueError("an impossible account")
            accounts = self._keys if kind == _KEY else self._addresses
            record = _Record(min(points, BAN_POINTS), min(strikes, _STRIKES_MOST), then)
            record.banned_until = then + min(left_s, self._ban_max_s)
            accounts.records[padded[:length]] = record
        for accounts in (self._keys, self._addresses):
            if accounts.records:
                accounts.trim(now)
        return int(count)


def _sane(*numbers: float) -> bool:
    return all(math.isfinite(number) and number >= 0 for number in numbers)
