"""Relays and hole punching as one part of a mesh: what it does depends on whether others can dial us."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Literal

import trio
from nacl.signing import SigningKey

from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import Address, AnyAddress, CircuitAddress
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach.holepunch import HolePunch
from kaisar_p2p.mesh.reach.relay import Relay
from kaisar_p2p.mesh.reach.relay_client import RelayClient


class Relaying:
    """A private node keeps reservations, a public one relays for others; either dials through relays and punches."""

    def __init__(
        self,
        network: Network,
        signing_key: SigningKey,
        *,
        relay: bool | None,
        preferred: Callable[[], Iterable[bytes]],
        connect: Callable[[bytes], Awaitable[Connection]],
        own_addresses: Callable[[], tuple[str, ...]],
        known_addresses: Callable[[bytes], Iterable[AnyAddress]],
        confirmed: Callable[[], Iterable[Address]],
        allow_private: bool | None,
        rng: random.Random,
    ) -> None:
        self.server = Relay(network, signing_key, own_addresses)
        self.client = RelayClient(network, preferred=preferred, connect=connect, allow_private=allow_private, rng=rng)
        self._punch = HolePunch(network, known=known_addresses, confirmed=confirmed, rng=rng)
        self.on_offer: Callable[[bool], None] = lambda _offered: None  # we began or ceased to relay
        self._relay = relay
        is_kept = network.pruner.is_kept
        network.pruner.is_kept = lambda key: is_kept(key) or key in self.client.relays

    @property
    def addresses(self) -> tuple[CircuitAddress, ...]:
        """Where relays take connections for us."""
        return self.client.addresses

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live with the mesh."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.client.run)
            await nursery.start(self._punch.run)
            if self._relay:
                self._offer(True)
            task_status.started()

    def on_connected(self, connection: Connection) -> None:
        """A connection came."""
        self._punch.on_connected(connection)
        self.client.wake()

    def on_disconnected(self, connection: Connection) -> None:
        """A connection went."""
        self.server.on_disconnected(connection)
        self._punch.on_disconnected(connection)
        self.client.wake()

    def on_told(self, connection: Connection) -> None:
        """A peer has told its addresses."""
        self._punch.on_told(connection)

    def on_woken(self) -> None:
        """The network may be another one now."""
        self._punch.on_addresses_changed()

    def on_reachability(self, status: Literal["unknown", "public", "private"]) -> None:
        """What is known about us may have changed; while nothing is known, things stay as they are."""
        self._punch.on_addresses_changed()
        if status == "unknown":
            return
        self.client.want(status == "private")
        if self._relay is None:
            self._offer(status == "public")

    def _offer(self, offered: bool) -> None:
        if offered:
            self.server.start()
        else:
            self.server.stop()
        self.on_offer(offered)
