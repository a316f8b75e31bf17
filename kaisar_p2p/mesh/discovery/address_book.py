"""The address book: which peers are known, where they may be dialed, and who says so.

Three kinds of sources. A person, the ledger or the peer itself over its authenticated connection: `add`. The peer's
signature, brought by anybody: `take`. The local network (mDNS), which cannot prove anything: `add` with `lan`, a few
addresses that never displace others. No source fills the book: each may bring a quarter of it, and pushes out only
its own when that is used up.
"""

from __future__ import annotations

import ipaddress
import json
import math
import random
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kaisar_p2p.mesh.discovery.addresses import AnyAddress, CircuitAddress, parse_any
from kaisar_p2p.mesh.discovery.records import Record

_LAN_ADDRESSES = 4
_DEAD_FAILURES, _DEAD_S = 8, 3600.0
_FAILING = 3  # failures in a row after which an address comes after all others
_DUMPED_PEERS, _DUMP_BYTES = 256, 512 * 1024
_SHARE_OF_A_SOURCE = 4
_REMEMBERED = "memory"
_UNPRIVILEGED_PORT = 1024


@dataclass(slots=True)
class _Spot:
    """What is known about one address."""

    noted: int  # counts up: newer ones are better
    signed: bool = False  # only the peer's record says so
    lan: bool = False
    failures: int = 0
    failing_since: float = 0.0
    worked_at: float = 0.0  # Unix seconds, 0 never

    def is_dead(self, now: float) -> bool:
        return self.failures >= _DEAD_FAILURES and now - self.failing_since >= _DEAD_S


@dataclass(slots=True)
class _Known:
    """What is known about one peer."""

    source: str
    spots: dict[AnyAddress, _Spot] = field(default_factory=dict)
    record: Record | None = None
    expires: float = 0.0  # of the record


class AddressBook:
    """Known addresses of peers, bounded in every direction. Times are seconds of one monotonic clock."""

    def __init__(
        self, *, allow_private: bool, peers: int, addresses_per_peer: int, allow_loopback: bool | None = None
    ) -> None:
        self._allow_private = allow_private
        self._allow_loopback = allow_private if allow_loopback is None else allow_loopback
        self._peers = peers
        self._per_peer = addresses_per_peer
        self._known: dict[bytes, _Known] = {}
        self._sources: dict[str, OrderedDict[bytes, None]] = {}
        self._pinned: set[bytes] = set()
        self._noted = 0

    # -- learning -----------------------------------------------------------------------------------------------------

    def pin(self, key: bytes) -> None:
        """Never forget this peer."""
        self._pinned.add(key)

    def add(
        self,
        key: bytes,
        multiaddrs: Iterable[str],
        *,
        trusted: bool = False,
        private: bool = False,
        lan: bool = False,
        told: bool | None = None,
        source: str = "",
    ) -> int:
        """Note addresses of a peer, newest last; what cannot be dialed is left out. Returns how many were new.

        Only for what a person, the ledger or the peer itself says, or, with `lan`, for what the local network does.
        `trusted` admits any address, `private` and `lan` private ones. `told`: by a stranger, who names no private one
        that is not a node's; by default whenever there is a `source`, which is who brought it, "" for ourselves.
        """
        taken, told = 0, bool(source) if told is None else told
        for text in multiaddrs:
            address = self._dialable(key, text, trusted=trusted, told=told, near=private or lan)
            if address is not None:
                taken += self._note(key, address, source, lan=lan)
        return taken

    def take(self, record: Record, source: str, now: float, *, itself: bool = False) -> bool:
        """Note what a peer has signed; False when that is not newer than what is known.

        The addresses take the place of those in the record before. `itself`: the peer brought it, so that it counts
        as its own from now on, and cannot be pushed out by whoever spoke of it first.
        """
        told = record.message
        known = self._known.get(told.key)
        if known is not None and itself and known.source not in ("", source):
            self._move(told.key, known, source)
        before = known.record if known is not None else None
        if before is not None and told.sequence <= before.message.sequence:
            return False
        known = self._entry(told.key, source)
        if known is None:
            return False
        known.record, known.expires = record, now + told.lifetime_s
        addresses = [self._dialable(told.key, text, trusted=False, told=True) for text in told.addresses]
        usable = [address for address in addresses if address is not None][: self._per_peer]
        for gone in [each for each, spot in known.spots.items() if spot.signed and each not in usable]:
            del known.spots[gone]
        for address in reversed(usable):  # what the peer names first is the best
            self._note(told.key, address, source, signed=True)
        return True

    def _dialable(
        self, key: bytes, text: str, *, trusted: bool, told: bool = False, near: bool = False
    ) -> AnyAddress | None:
        """The address in a text, unless it is not one to dial."""
        try:
            address, named = parse_any(text)
        except ValueError:
            return None
        if named not in (None, key) or not address.is_dialable:
            return None
        if isinstance(address, CircuitAddress) and address.relay == key:
            return None
        return address if trusted or self._may_be_told(address, told=told, near=near) else None

    def _may_be_told(self, address: AnyAddress, *, told: bool, near: bool) -> bool:
        """Whether an address that nobody vouches for may be dialed: strangers are not to knock around in our network.

        A name may lead anywhere, to this very machine too; ports below 1024 belong to routers and printers.
        """
        direct = address.through if isinstance(address, CircuitAddress) else address
        in_lab = self._allow_private and self._allow_loopback
        if not direct.kind.startswith("ip"):
            return in_lab or not told
        if not direct.is_private or in_lab:
            return True
        if direct.is_loopback or ipaddress.ip_address(direct.host).is_link_local:
            return direct.is_loopback and self._allow_loopback
        return near or (self._allow_private and (not told or direct.port >= _UNPRIVILEGED_PORT))

    def _note(self, key: bytes, address: AnyAddress, source: str, *, signed: bool = False, lan: bool = False) -> int:
        known = self._entry(key, source)
        if known is None:
            return 0
        self._noted += 1
        spot = known.spots.get(address)
        if spot is not None:
            spot.noted = self._noted
            spot.signed, spot.lan = spot.signed and signed, spot.lan and lan
            return 0
        if lan and sum(each.lan for each in known.spots.values()) >= _LAN_ADDRESSES:
            return 0
        known.spots[address] = _Spot(self._noted, signed, lan)
        while len(known.spots) > self._per_peer:
            del known.spots[max(known.spots, key=lambda each: self._rank(each, known.spots[each], worst=True))]
        return int(address in known.spots)

    # -- who may fill it ----------------------------------------------------------------------------------------------

    def _entry(self, key: bytes, source: str) -> _Known | None:
        """The entry of a peer, made if there is room or somebody gives way; None when there is none."""
        known = self._known.get(key)
        if known is not None:
            if known.source and not source:
                self._move(key, known, source)
            self._sources[known.source].move_to_end(key)
            return known
        if source and len(self._sources.get(source, ())) >= max(1, self._peers // _SHARE_OF_A_SOURCE):
            self._forget_oldest_of(source)
        if len(self._known) >= self._peers:
            self._forget_oldest_of(max(self._sources, key=lambda each: (bool(each), len(self._sources[each]))))
        if len(self._known) >= self._peers and source:
            return None
        known = self._known[key] = _Known(source)
        self._sources.setdefault(source, OrderedDict())[key] = None
        return known

    def _forget_oldest_of(self, source: str) -> None:
        oldest = next((key for key in self._sources.get(source, ()) if key not in self._pinned), None)
        if oldest is not None:
            self._forget(oldest)

    def _forget(self, key: bytes) -> None:
        self._leave(key, self._known.pop(key).source)

    def _leave(self, key: bytes, source: str) -> None:
        del self._sources[source][key]
        if not self._sources[source]:
            del self._sources[source]

    def _move(self, key: bytes, known: _Known, source: str) -> None:
        """From now on another source has brought this peer."""
        if source and len(self._sources.get(source, ())) >= max(1, self._peers // _SHARE_OF_A_SOURCE):
            return
        self._leave(key, known.source)
        known.source = source
        self._sources.setdefault(source, OrderedDict())[key] = None

    # -- what became of it --------------------------------------------------------------------------------------------

    def confirm(self, key: bytes, address: AnyAddress) -> None:
        """The peer answered there: dial it first next time."""
        known = self._known.get(key)
        spot = known.spots.get(address) if known is not None else None
        if spot is None:
            self._note(key, address, known.source if known is not None else "")
            spot = self._known[key].spots.get(address) if key in self._known else None
        if spot is not None:
            spot.failures, spot.worked_at = 0, time.time()

    def blame(self, key: bytes, addresses: Iterable[AnyAddress], now: float) -> None:
        """The peer did not answer there. An address that has failed for an hour, and often, is forgotten."""
        known = self._known.get(key)
        if known is None:
            return
        for address in addresses:
            spot = known.spots.get(address)
            if spot is None:
                continue
            spot.failures += 1
            if spot.failures == 1:
                spot.failing_since = now
            if key not in self._pinned and spot.is_dead(now):
                del known.spots[address]
        if not known.spots and key not in self._pinned:
            self._forget(key)

    def expire(self, now: float) -> None:
        """Forget records that are over, and peers of which nothing is left."""
        for key, known in list(self._known.items()):
            if known.record is None or known.expires > now:
                continue
            known.record = None
            for address in [each for each, spot in known.spots.items() if spot.signed and not spot.worked_at]:
                del known.spots[address]
            if not known.spots and key not in self._pinned:
                self._forget(key)

    # -- asking -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _rank(address: AnyAddress, spot: _Spot, *, worst: bool = False) -> tuple[float, ...]:
        """Smaller is dialed earlier: direct before relayed, but what keeps failing after everything else."""
        failing, relayed = spot.failures >= _FAILING, isinstance(address, CircuitAddress)
        if worst:  # to make room, what nothing proves goes first
            return (spot.lan, failing, -spot.worked_at, -spot.noted)
        return (failing, relayed, spot.failures, -spot.worked_at, spot.lan, -spot.noted)

    def of(self, key: bytes) -> tuple[AnyAddress, ...]:
        """Addresses to dial, the most promising first."""
        known = self._known.get(key)
        if known is None:
            return ()
        return tuple(sorted(known.spots, key=lambda each: self._rank(each, known.spots[each])))

    def peers(self) -> list[bytes]:
        """All known peers."""
        return list(self._known)

    def source_of(self, key: bytes) -> str:
        """Who brought this peer; "" for ourselves, a person or the ledger."""
        known = self._known.get(key)
        return known.source if known is not None else ""

    def draw(self, most: int, rng: random.Random) -> Iterator[list[bytes]]:
        """For each source, in random order, up to `most` of the peers that it brought, drawn at random."""
        for source in rng.sample(list(self._sources), len(self._sources)):
            keys = list(self._sources[source])
            yield rng.sample(keys, min(most, len(keys)))

    def record_of(self, key: bytes, now: float) -> Record | None:
        """The signed record of a peer, while it is valid."""
        known = self._known.get(key)
        return known.record if known is not None and known.expires > now else None

    def offering(self, services: int, now: float) -> list[bytes]:
        """Peers whose valid record offers all of these services."""
        return [
            key
            for key, known in self._known.items()
            if known.record is not None and known.expires > now and known.record.message.services & services == services
        ]

    def sample(self, most: int, rng: random.Random, now: float, *, without: Iterable[bytes] = ()) -> list[Record]:
        """Some random valid records, each known peer alike."""
        left_out = set(without)
        found: list[Record] = []
        keys = list(self._known)
        for key in rng.sample(keys, min(len(keys), 4 * most)):
            record = self.record_of(key, now) if key not in left_out else None
            if record is not None:
                found.append(record)
                if len(found) >= most:
                    break
        return found

    # -- over restarts ------------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """Peers that have answered, the latest first, for `load` after a restart; at most some hundred kilobytes."""
        worked = {
            key: [(address, spot) for address, spot in known.spots.items() if spot.worked_at]
            for key, known in self._known.items()
        }
        newest = {key: max(spot.worked_at for _, spot in spots) for key, spots in worked.items() if spots}
        keys = sorted(newest, key=lambda key: -newest[key])[:_DUMPED_PEERS]
        rows = [[key.hex(), [[str(address), int(spot.worked_at)] for address, spot in worked[key]]] for key in keys]
        return json.dumps(rows, separators=(",", ":")).encode()

    def load(self, data: bytes) -> int:
        """Take what `dump` gave; whatever cannot be read is left out. Returns how many peers that brought."""
        try:
            rows = json.loads(data) if len(data) <= _DUMP_BYTES else []
            return sum(self._load_peer(bytes.fromhex(key), spots) for key, spots in rows[:_DUMPED_PEERS])
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
            return 0

    def _load_peer(self, key: bytes, spots: list[tuple[str, float]]) -> bool:
        if len(key) != 32:
            return False
        for text, worked_at in sorted(spots, key=lambda each: each[1])[-self._per_peer :]:
            address = self._dialable(key, text, trusted=True)
            if address is not None and math.isfinite(worked_at):
                self._note(key, address, _REMEMBERED)
                known = self._known.get(key)
                spot = known.spots.get(address) if known is not None else None
                if spot is not None:
                    spot.worked_at = float(worked_at)
        return key in self._known
