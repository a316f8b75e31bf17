"""Making room: which connection is closed when a better one comes. The rules are in `admission`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.guard.admission import Door, Origin, Standing, gives_way, worst_of
from kaisar_p2p.mesh.limits import MeshLimits

if TYPE_CHECKING:
    from kaisar_p2p.mesh.network import Network

log = logging.getLogger(__name__)

_SUBNET_SHARE = 3  # times as many protected connections as an address
_DEAD_KEEPALIVES = 1.5  # silent for so many intervals of pings, a connection is probably dead


class Pruner:
    """Decides who may stay connected. `is_kept` and `blame` come from the mesh."""

    def __init__(self, network: Network, limits: MeshLimits, door: Door) -> None:
        self._network, self._limits, self._door = network, limits, door
        self.is_kept: Callable[[bytes], bool] = lambda _key: False
        self.blame: Callable[[bytes, Origin], float] = lambda _key, _origin: 0.0
        self.pruned: Counter[str] = Counter()

    def has_room_for_inbound(self, origin: Origin, now: float) -> bool:
        """A connection from there could be taken: worth a handshake."""
        inbound = [c for c in self._network.open_connections() if c.inbound]
        if not self._is_full(inbound=True):
            return True
        newcomer = Standing(blame=self.blame(b"", origin), crowd=self._door.crowd(origin) + 1)
        return self._choose(inbound, newcomer, now) is not None

    def make_room(self, newcomer: Connection, now: float) -> bool:
        """Take the newcomer if there is room, or if somebody worse can go; False when there is nobody."""
        if not self._is_full(inbound=newcomer.inbound):
            return True
        candidates = [c for c in self._network.open_connections() if c.inbound or not newcomer.inbound]
        chosen = self._choose(candidates, self.standing(newcomer, now), now)
        if chosen is None:
            return False
        self.prune(*chosen)
        return True

    def room_for_key(self, key: bytes, now: float) -> bool:
        """One more connection with this key is within the limit; a dead one goes, one that lives never does."""
        known = self._network.connections_with(key)
        most = self._limits.connections_per_key
        if len(known) < 2 * most and sum(not connection.retired for connection in known) < most:
            return True
        silent = min(known, key=lambda connection: connection.muxer.last_received)
        if now - silent.muxer.last_received < _DEAD_KEEPALIVES * self._limits.keepalive_s:
            return False
        self.prune(silent, "silent")
        return True

    def standing(self, connection: Connection, now: float, *, protected: bool = False) -> Standing:
        """What is known for and against a connection."""
        return Standing(
            kept=self.is_kept(connection.key),
            busy=protected,
            blame=self.blame(connection.key, connection.origin),
            useful_s=now - connection.useful_at,
            crowd=self._door.crowd(connection.origin) if connection.inbound else 0,
            age_s=now - connection.since,
        )

    def prune(self, connection: Connection, reason: str) -> None:
        """Close a connection at once; it no longer counts."""
        self.pruned[reason] += 1
        log.debug("pruning the connection with %s: %s", connection.key.hex()[:12], reason)
        self._network.remove_conn(connection)
        connection.muxer.abort()

    def _is_full(self, *, inbound: bool) -> bool:
        connections = self._network.open_connections(joining=True)
        if len(connections) >= self._limits.connections:
            return True
        # Who lowers `connections` alone still lets others in.
        most = max(1, self._limits.connections // 2, self._limits.connections - self._limits.outbound_reserved)
        return inbound and sum(connection.inbound for connection in connections) >= most

    def _protected(self, candidates: list[Connection]) -> set[Connection]:
        """Those that go last because they are busy: of an address and a subnet the oldest few, of ours all."""
        of_account: Counter[str] = Counter()
        of_subnet: Counter[str] = Counter()
        found = set()
        for each in sorted((each for each in candidates if each.busy), key=lambda one: one.since):
            origin, most = each.origin, self._limits.busy_per_address
            if each.inbound:
                most *= self._limits.private_factor if origin.private else 1
                if of_account[origin.account] >= most or of_subnet[origin.subnet] >= _SUBNET_SHARE * most:
                    continue
                of_account[origin.account] += 1
                of_subnet[origin.subnet] += 1
            found.add(each)
        return found

    def _choose(self, candidates: list[Connection], newcomer: Standing, now: float) -> tuple[Connection, str] | None:
        idle_s = self._limits.idle_s
        protected = self._protected(candidates)
        standings = [self.standing(each, now, protected=each in protected) for each in candidates]
        number = worst_of(enumerate(standings), idle_s)
        if number is None:
            return None
        reason = gives_way(standings[number], newcomer, idle_s)
        return None if reason is None else (candidates[number], reason)
