"""Whether others can dial us: the rules that turn what peers report into a verdict.

No sockets, no tasks; the time is an argument (seconds of one monotonic clock). `kaisar_p2p.mesh.reach.dialback` asks
the peers. Every peer may lie, so that

* an address of ours is believed when observers of at least two networks name it, and more than half of them all;
* it is told to others only when peers dialed us back there, by what more than half of those say that came through, and
  not when that is another one than the observers'; addresses of interfaces and of the router need one of them;
* "you can be dialed" counts only when a secret of ours came in over the dialed connection; "you cannot" is a vote;
* one network (a /16, or a /32 of IPv6) has one voice, however many peers it has;
* a verdict that is known changes at once only when three or more agree without exception, else at the second round.

After AutoNAT (https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md).
"""

from __future__ import annotations

import ipaddress
import statistics
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from kaisar_p2p.mesh.discovery.addresses import Address

Status = Literal["unknown", "public", "private"]

OBSERVERS = 32  # networks whose statements are kept
OBSERVERS_AGREE = 2
CLOCKS_AGREE = 3
STATEMENT_S = 3600.0  # then it is forgotten
CLEAR_VOTES = 3
CONFIRMED = 8  # addresses
SKEW_TOLERATED_S = 10.0


@dataclass(frozen=True)
class Reachability:
    """What is known about how others reach this node.

    `addresses` are the multiaddrs of ours at which peers dialed us back, `how` says in one sentence how the status was
    found out, `checked_at` is trio's clock of the last round of asking. `observed` are the IP addresses that peers see
    us at, and agree on. `keeps_ports` says whether an address translation between us and them keeps the port of a
    connection (None: unknown), `clock_skew_s` by how much our clock is ahead of the peers' (None: too few to tell).
    """

    status: Status = "unknown"
    addresses: tuple[str, ...] = ()
    how: str = "no peer could be asked yet"
    checked_at: float | None = None
    observed: tuple[str, ...] = ()
    keeps_ports: bool | None = None
    clock_skew_s: float | None = None


def host_of(text: str) -> str:
    """An IP address in its plain form: IPv4 instead of IPv4 inside IPv6, no zone. ValueError for what is none."""
    address = ipaddress.ip_address(text.split("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def is_public(host: str) -> bool:
    """An address of the open internet."""
    try:
        return ipaddress.ip_address(host_of(host)).is_global
    except ValueError:
        return False


def voice_of(host: str, key: bytes) -> bytes:
    """Who counts as one: a public peer's /16 (/32 of IPv6); a peer at another address, in labs, counts by its key."""
    if not is_public(host):
        return key
    address = ipaddress.ip_address(host_of(host))
    return address.packed[: 2 if address.version == 4 else 4]


def kind_of(host: str) -> str:
    """The multiaddr protocol of an IP address."""
    return "ip6" if ":" in host else "ip4"


@dataclass(frozen=True)
class _Statement:
    host: str
    kept_port: bool | None
    at: float


class ObservedAddresses:
    """What peers say about where our connections come from; the newest statement of each voice."""

    def __init__(self) -> None:
        self._said: OrderedDict[tuple[bytes, str], _Statement] = OrderedDict()

    def note(self, voice: bytes, host: str, now: float, *, kept_port: bool | None = None) -> None:
        """A peer of this voice sees us at `host`."""
        key = (voice, kind_of(host))
        self._said.pop(key, None)
        self._said[key] = _Statement(host, kept_port, now)
        while len(self._said) > OBSERVERS:
            self._said.popitem(last=False)

    def forget(self) -> None:
        """Our addresses have changed: what was said is of the past."""
        self._said.clear()

    def agreed(self, now: float) -> tuple[str, ...]:
        """At most one address of each family: named by two or more voices, and by more than half of them."""
        found = []
        for kind in ("ip4", "ip6"):
            hosts = Counter(each.host for each in self._fresh(now) if kind_of(each.host) == kind)
            if hosts:
                host, voices = hosts.most_common(1)[0]
                if voices >= OBSERVERS_AGREE and 2 * voices > hosts.total():
                    found.append(host)
        return tuple(found)

    def keeps_ports(self, now: float) -> bool | None:
        """Whether most observers saw the very port that the connection left from; None when too few could tell."""
        kept = [each.kept_port for each in self._fresh(now) if each.kept_port is not None]
        return 2 * sum(kept) > len(kept) if len(kept) >= OBSERVERS_AGREE else None

    def _fresh(self, now: float) -> list[_Statement]:
        return [each for each in self._said.values() if now - each.at < STATEMENT_S]


class PeerClocks:
    """How far our clock is from those of others: the median of the voices, so that a minority cannot move it."""

    def __init__(self) -> None:
        self._ahead: OrderedDict[bytes, float] = OrderedDict()

    def note(self, voice: bytes, ahead_s: float) -> None:
        """By a peer's clock, ours is so many seconds ahead."""
        self._ahead.pop(voice, None)
        self._ahead[voice] = ahead_s
        while len(self._ahead) > OBSERVERS:
            self._ahead.popitem(last=False)

    def forget(self) -> None:
        """Our clock was set."""
        self._ahead.clear()

    def skew_s(self) -> float | None:
        """Seconds that our clock is ahead; None before three voices were heard."""
        return statistics.median(self._ahead.values()) if len(self._ahead) >= CLOCKS_AGREE else None


@dataclass
class Round:
    """What one round of asking brought, by voice."""

    reached: dict[bytes, set[Address]] = field(default_factory=dict)  # our secret came in over the dialed connection
    failed: set[bytes] = field(default_factory=set)  # dialed, it says, without success
    strangers: set[bytes] = field(default_factory=set)  # that connected to us unasked since the last round

    @property
    def yes(self) -> int:
        """Voices that we can be dialed."""
        return len(self.reached) + int(bool(self.strangers - self.reached.keys()))  # all strangers have one voice

    @property
    def no(self) -> int:
        """Voices that we cannot."""
        return len(self.failed - self.reached.keys())

    @property
    def opinion(self) -> Status:
        """What the majority says; "unknown" when nobody answered or it is a tie."""
        if self.yes == self.no:
            return "unknown"
        return "public" if self.yes > self.no else "private"

    @property
    def is_clear(self) -> bool:
        """Enough voices, and no other."""
        return self.yes + self.no >= CLEAR_VOTES and not (self.yes and self.no)


class Verdicts:
    """The verdict over rounds, with hysteresis."""

    def __init__(self) -> None:
        self.status: Status = "unknown"
        self.how = Reachability.how
        self.confirmed: tuple[Address, ...] = ()
        self._contradicted = 0

    def judge(self, asked: Round, trusted_hosts: Iterable[str], observed_hosts: Iterable[str] = ()) -> bool:
        """Take a round into account; True when status or confirmed addresses have changed.

        `trusted_hosts` are IP addresses that are ours for certain, `observed_hosts` those that the observers agree on.
        A secret that came in proves that we can be dialed, but not where: for that there is only the dialers' word.
        """
        before = (self.status, self.confirmed)
        opinion = asked.opinion
        if opinion in ("unknown", self.status):
            self._contradicted = 0
        elif self.status == "unknown" or asked.is_clear or self._contradicted:
            self.status, self._contradicted = opinion, 0
        else:
            self._contradicted += 1
        if opinion == self.status:
            self.how = _how(asked)
        if self.status != "public":
            self.confirmed = ()
        elif asked.reached:
            self.confirmed = self._confirm(asked, set(trusted_hosts), {kind_of(each): each for each in observed_hosts})
        return before != (self.status, self.confirmed)

    @property
    def is_contradicted(self) -> bool:
        """The last round spoke against the verdict: look again soon."""
        return bool(self._contradicted)

    def reset(self) -> None:
        """Our addresses have changed: nothing is known any more."""
        self.status, self.how, self.confirmed, self._contradicted = "unknown", Reachability.how, (), 0

    @staticmethod
    def _confirm(asked: Round, trusted_hosts: set[str], observed: dict[str, str]) -> tuple[Address, ...]:
        voices = Counter(address for addresses in asked.reached.values() for address in addresses)
        of_host = Counter(host for told in asked.reached.values() for host in {address.host for address in told})

        def is_believed(address: Address) -> bool:
            if address.host in trusted_hosts:
                return True
            same_kind = sum(count for host, count in of_host.items() if kind_of(host) == address.kind)
            agreed = observed.get(address.kind)
            enough = 1 if agreed == address.host else OBSERVERS_AGREE
            return (
                agreed in (None, address.host) and voices[address] >= enough and 2 * of_host[address.host] > same_kind
            )

        return tuple(address for address, _ in voices.most_common() if is_believed(address))[:CONFIRMED]


def _how(asked: Round) -> str:
    total = len(asked.reached) + asked.no
    if asked.reached:
        where = sorted(str(address) for addresses in asked.reached.values() for address in addresses)
        return f"{len(asked.reached)} of {total} peers that were asked to dial us back came through, at {where[0]}"
    if asked.opinion == "public":
        return "a stranger from the internet connected to us"
    return f"none of {total} peers that were asked to dial us back came through"
