"""From what peers do on their connections to their accounts, and from the accounts to who is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.guard.admission import Origin
from kaisar_p2p.mesh.guard.reputation import BROKEN_STREAM_POINTS, HANDSHAKE_POINTS, UNAUTHENTIC_POINTS, Reputation
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.transport.yamux_frames import NotAuthentic, ProtocolViolation

log = logging.getLogger(__name__)

_BLAMELESS_POINTS = 1.0


class Conduct:
    """Charges accounts for broken handshakes, frames and streams; answers for the accounts at the network's door."""

    def __init__(self, network: Network, is_kept: Callable[[bytes], bool]) -> None:
        limits = network.limits
        self._network = network
        self.reputation = Reputation(
            limits.ban_s, limits.ban_max_s, remembered=limits.remembered_peers, address_of=self._account_of
        )
        network.is_banned = lambda key: self.reputation.is_banned(key, trio.current_time())
        network.is_origin_banned = self._is_origin_banned
        network.on_failed_handshake = self._on_failed_handshake
        network.on_offence = self._on_offence
        network.pruner.is_kept = is_kept
        network.pruner.blame = self._blame

    def _account(self, origin: Origin) -> str | None:
        """Many nodes may share a private address, and all that come over a relay share its."""
        exempt = origin.private and self._network.limits.private_factor > 1
        return None if exempt or not origin.account else origin.account

    def _account_of(self, key: bytes) -> str | None:
        direct = [connection for connection in self._network.connections_with(key) if not connection.relayed]
        return self._account(direct[-1].origin) if direct else None

    def _is_origin_banned(self, origin: Origin) -> bool:
        """Not while somebody without blame is connected from there: then it is several, behind one NAT."""
        account, now = self._account(origin), trio.current_time()
        if account is None or not self.reputation.is_address_banned(account, now):
            return False
        from_there = (each.key for each in self._network.open_connections() if each.origin.account == account)
        return not any(self.reputation.blame(key, None, now) < _BLAMELESS_POINTS for key in from_there)

    def _blame(self, key: bytes, origin: Origin) -> float:
        return self.reputation.blame(key, self._account(origin), trio.current_time())

    def _on_failed_handshake(self, origin: Origin) -> None:
        account = self._account(origin)
        if account is not None:
            self.reputation.penalise_address(account, HANDSHAKE_POINTS, trio.current_time())

    def _on_offence(self, connection: Connection, error: Exception) -> None:
        key, now = connection.key, trio.current_time()
        if isinstance(error, ProtocolViolation) and not isinstance(error, NotAuthentic):
            self._refuse(key, self.reputation.ban(key, now), f"it broke the connection's protocol: {error}")
            return
        if isinstance(error, NotAuthentic) and connection.relayed:
            self._on_failed_handshake(connection.origin)  # the relay can change any byte: the key is not to blame
            return
        points = UNAUTHENTIC_POINTS if isinstance(error, NotAuthentic) else BROKEN_STREAM_POINTS
        if self.reputation.penalise(key, points, now):
            self._refuse(key, self.reputation.ban_left_s(key, now), f"again: {error}")

    def _refuse(self, key: bytes, ban_s: float, reason: str) -> None:
        log.warning("disconnecting and refusing peer %s for %.0f s: %s", key.hex()[:12], ban_s, reason)
        for connection in self._network.connections_with(key):
            connection.muxer.abort()
