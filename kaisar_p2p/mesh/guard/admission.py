"""Who may connect, and who makes room: rules without IO, times are arguments.

An unauthenticated connection costs a task and a handshake, so those are counted by IP address before anything is
read. An authenticated one is judged by what is known of its key: when the node is full, whoever is worst gives way
to a newcomer that is better, and otherwise the newcomer is refused. Loopback and private addresses may have
`MeshLimits.private_factor` times what one public address may, because many nodes can be behind one.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from kaisar_p2p.mesh.limits import MeshLimits, PeerBuckets

_BURST_S = 5.0  # of the handshake rate, at once
_BLAME_MARGIN = 10.0  # penalty points; less than this is noise
_EVICTABLE_S = 1.0  # an honest handshake takes three round trips


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from. `account` is what one party certainly has: an IPv4 address, an IPv6 /64."""

    account: str
    subnet: str  # IPv4 /24, IPv6 /56
    private: bool


@lru_cache(maxsize=4096)
def origin_of(host: str) -> Origin:
    """The origin of an IP address; text that is none (a relay's, a closed socket's) is an origin of its own."""
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return Origin(host[:64], host[:64], False)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    account, subnet = (32, 24) if address.version == 4 else (64, 56)
    return Origin(
        str(ipaddress.ip_network((address, account), strict=False)),
        str(ipaddress.ip_network((address, subnet), strict=False)),
        not address.is_global,
    )


def relayed_origin(source: bytes, relay: bytes) -> Origin:
    """The origin of a circuit. The relay may lie about its source, so what goes wrong counts on this relay only."""
    return Origin(f"{relay[:8].hex()}/{source[:12].hex()}", relay.hex(), False)


class Visitor:
    """An accepted TCP connection, until it ends. `expel` ends it during its handshake."""

    __slots__ = ("expel", "half_open", "origin", "since")

    def __init__(self, origin: Origin, since: float, expel: Callable[[], None]) -> None:
        self.origin = origin
        self.since = since
        self.expel = expel
        self.half_open = True


class Door:
    """Counts inbound TCP connections by where they come from."""

    def __init__(self, limits: MeshLimits) -> None:
        self._limits = limits
        self._half_open: dict[Visitor, None] = {}  # oldest first
        self._half_open_of: Counter[str] = Counter()
        self._half_open_in: Counter[str] = Counter()  # of a subnet
        self._of_account: Counter[str] = Counter()
        self._of_subnet: Counter[str] = Counter()
        rate = limits.handshakes_per_s
        self._rate = PeerBuckets(rate, rate * _BURST_S)
        self._private_rate = PeerBuckets(
            rate * limits.private_factor, rate * limits.private_factor * _BURST_S, peers=64
        )

    @property
    def half_open(self) -> int:
        """Connections whose handshake is going on."""
        return len(self._half_open)

    @property
    def inside(self) -> int:
        """Connections in all, half-open ones included."""
        return self._of_account.total()

    def crowd(self, origin: Origin) -> int:
        """Connections from the same subnet; 0 for private ones, where many are no sign of anything."""
        return 0 if origin.private and self._limits.private_factor > 1 else self._of_subnet[origin.subnet]

    def refusal(self, origin: Origin, now: float) -> str | None:
        """Why one more connection from there is refused: rate, handshakes, address or subnet; None when it is not."""
        limits, factor = self._limits, self._limits.private_factor if origin.private else 1
        if self._of_account[origin.account] >= limits.connections_per_address * factor:
            return "address"
        if self._of_subnet[origin.subnet] >= limits.connections_per_subnet * factor:
            return "subnet"
        if self._half_open_of[origin.account] >= self._most_half_open(origin):
            return "handshakes"  # one address cannot keep the others out
        if not origin.private and self._half_open_in[origin.subnet] >= max(1, limits.handshakes // 2):
            return "handshakes"  # nor can one subnet, or one relay
        if len(self._half_open) >= limits.handshakes and self._to_expel(origin, now) is None:
            return "handshakes"
        rate = self._private_rate if origin.private else self._rate
        return None if rate.try_take(origin.account.encode(), now) else "rate"

    def _most_half_open(self, origin: Origin) -> int:
        half = max(1, self._limits.handshakes // 2)
        return half if origin.private else min(half, self._limits.handshakes_per_address)

    def enter(self, origin: Origin, now: float, expel: Callable[[], None]) -> Visitor:
        """A connection was let in; when handshakes are many, the oldest of the address that has most gives way."""
        if len(self._half_open) >= self._limits.handshakes:
            oldest = self._to_expel(origin, now)
            if oldest is not None:
                self._close(oldest)
                oldest.expel()
        visitor = Visitor(origin, now, expel)
        self._half_open[visitor] = None
        self._half_open_of[origin.account] += 1
        self._half_open_in[origin.subnet] += 1
        self._of_account[origin.account] += 1
        self._of_subnet[origin.subnet] += 1
        return visitor

    def _to_expel(self, newcomer: Origin, now: float) -> Visitor | None:
        most, count = max(self._half_open_of.items(), key=lambda item: item[1], default=("", 0))
        if count <= self._half_open_of[newcomer.account] + 1:  # many addresses with one each: time decides
            if self._half_open_of[newcomer.account]:
                return None
            oldest, patience_s = next(iter(self._half_open)), self._limits.handshake_s / 3
        else:
            oldest = next(visitor for visitor in self._half_open if visitor.origin.account == most)
            patience_s = _EVICTABLE_S
        return oldest if now - oldest.since >= patience_s else None

    def authenticated(self, visitor: Visitor) -> None:
        """The handshake is over; the connection still counts for its address."""
        self._close(visitor)

    def _close(self, visitor: Visitor) -> None:
        if visitor.half_open:
            visitor.half_open = False
            del self._half_open[visitor]
            _decrement(self._half_open_of, visitor.origin.account)
            _decrement(self._half_open_in, visitor.origin.subnet)

    def leave(self, visitor: Visitor) -> None:
        """The connection has ended."""
        self._close(visitor)
        _decrement(self._of_account, visitor.origin.account)
        _decrement(self._of_subnet, visitor.origin.subnet)


def _decrement(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if counts[name] <= 0:
        del counts[name]


@dataclass(frozen=True, slots=True)
class Standing:
    """What decides who keeps a connection when there are too many.

    `kept`: we want this peer (`Mesh.keep_connected`). `busy`: a tunnel or request is open. `blame`: penalty points of
    the key and its address. `useful_s`: seconds since it last gave us a message that was new and valid or answered a
    request, or since it connected. `crowd`: connections from its subnet, 0 for private ones.
    """

    kept: bool = False
    busy: bool = False
    blame: float = 0.0
    useful_s: float = 0.0
    crowd: int = 0
    age_s: float = 0.0

    def badness(self, idle_s: float) -> tuple[bool, float, bool, int, float]:
        """Sorts peers from the best to the worst."""
        blame = self.blame if self.blame >= _BLAME_MARGIN else 0.0
        return (not self.busy, blame, self.useful_s > idle_s, self.crowd, -self.age_s)


def worst_of(standings: Iterable[tuple[int, Standing]], idle_s: float) -> int | None:
    """The number of the one to close first; never one that is kept, a busy one only when all others are busy."""
    open_to_it = [(standing.badness(idle_s), -number) for number, standing in standings if not standing.kept]
    return -max(open_to_it)[1] if open_to_it else None


def gives_way(worst: Standing, newcomer: Standing, idle_s: float) -> str | None:
    """Why `worst` is closed for `newcomer`: kept, blame, idle or crowd; None when the newcomer is refused instead.

    A newcomer without merits does not replace a peer just because it is new: then whoever dials most would win.
    """
    if worst.kept:
        return None
    if newcomer.kept:
        return "kept"
    if worst.blame > newcomer.blame + _BLAME_MARGIN:
        return "blame"  # also one that is busy: an open request costs nothing
    if worst.busy:
        return None
    if newcomer.blame > worst.blame + _BLAME_MARGIN:
        return None
    if worst.useful_s > idle_s:
        return "idle"
    return "crowd" if worst.crowd > newcomer.crowd + 1 else None
