"""Finding peers: bootstrap records of the ledger, `--join`, and the addresses that workers advertise."""

from __future__ import annotations

import logging

from immutables import Map

from kaisar_p2p.mesh import Mesh, peer_of
from kaisar_p2p.wire.envelope import Verified
from protocols.actions import Action, BlockApplied, Event, Gossip
from protocols.adverts import WorkerAdvert

log = logging.getLogger(__name__)

MAX_BOOTSTRAP = 16


class PeerKeeper:
    """A machine without decisions: it keeps the mesh's address book."""

    deadline: float | None = None

    def __init__(self, mesh: Mesh, join: tuple[str, ...]) -> None:
        self._mesh = mesh
        self._records: Map[bytes, tuple[str, ...]] | None = None
        for addr in join:
            mesh.keep_connected(peer_of(addr)[0], (addr,))

    def step(self, event: Event, now: float) -> list[Action]:
        """New bootstrap records and adverts."""
        if isinstance(event, BlockApplied) and event.state.bootstrap is not self._records:
            self._records = event.state.bootstrap
            for key, addrs in list(self._records.items())[:MAX_BOOTSTRAP]:
                self._mesh.keep_connected(key, addrs)
        if isinstance(event, Gossip) and event.topic == "advert" and isinstance(event.message, Verified):
            advert = event.message.message
            if isinstance(advert, WorkerAdvert):
                self._mesh.add_addresses(advert.worker, advert.addrs)
        return []
