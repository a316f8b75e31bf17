"""Several connections with one key: of the same process, one is enough; of two processes, somebody should know."""

from __future__ import annotations

from collections.abc import Iterator

from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.network import Network


class Settling:
    """Says which connections are surplus, the same on both sides; tells when two processes use one key."""

    def __init__(self, network: Network, own_key: bytes) -> None:
        self._network, self._own = network, own_key

    def surplus_with(self, newest: Connection) -> Iterator[Connection]:
        """Connections to close, now that the process behind `newest` is known, or is told again."""
        if newest.retired:
            return
        others = [
            connection
            for connection in self._network.connections_with(newest.key)
            if connection is not newest and connection.instance is not None and not connection.retired
        ]
        for other in others:
            if other.instance == newest.instance:
                surplus = self._surplus(other, newest)
                if surplus is not None:
                    yield surplus
                if surplus is newest:
                    return
            else:
                self._network.on_key_conflict(other, newest)

    def _surplus(self, other: Connection, newest: Connection) -> Connection | None:
        """Of two connections, the one to close: a relayed one, or that which the larger key dialed.

        Of two in the same direction the older, if we dialed them: each side could take another for the older.
        """
        if other.relayed != newest.relayed:
            return other if other.relayed else newest
        if other.inbound == newest.inbound:
            return None if newest.inbound else min(other, newest, key=lambda one: one.since)
        keep_inbound = newest.key < self._own
        return other if other.inbound != keep_inbound else newest
