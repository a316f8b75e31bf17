"""Finding peers: bootstrap records of the ledger, `--join`, and the addresses that workers advertise."""

from __future__ import annotations

import logging

from immutables import Map

from kaisar_p2p.mesh import Mesh, peer_of
from kaisar_p2p.wire.envelope import Verified
from protocols.actions import Action, BlockApplied, Event, Gossip
from protocols.adverts import WorkerAdvert
from protocols.interpreter.state import State

log = logging.getLogger(__name__)

MAX_BOOTSTRAP = 16
"""Records that are ever dialed for good. A record costs nothing, so the machines that were bound first come first."""


class PeerKeeper:
    """A machine without decisions: it keeps the mesh's address book."""

    deadline: float | None = None

    def __init__(self, mesh: Mesh, join: tuple[str, ...]) -> None:
        self._mesh = mesh
        self._records: Map[bytes, tuple[str, ...]] | None = None
        self._kept: set[bytes] = set()
        for addr in join:
            mesh.keep_connected(peer_of(addr)[0], (addr,), asked_for=True)

    def step(self, event: Event, now: float) -> list[Action]:
        """New bootstrap records and adverts."""
        if isinstance(event, BlockApplied) and event.state.bootstrap is not self._records:
            self._follow(event.state)
        if isinstance(event, Gossip) and event.topic == "advert" and isinstance(event.message, Verified):
            advert = event.message.message
            if isinstance(advert, WorkerAdvert):
                self._mesh.add_addresses(advert.worker, advert.addrs)
        return []

    def _follow(self, state: State) -> None:
        before, self._records = self._records or Map(), state.bootstrap
        changed = [(key, addrs) for key, addrs in state.bootstrap.items() if before.get(key) != addrs]
        for key, addrs in sorted(changed, key=lambda each: (_age(state, each[0]), each[0])):
            if key in self._kept or len(self._kept) < MAX_BOOTSTRAP:
                self._kept.add(key)
                self._mesh.keep_connected(key, addrs)
            else:
                self._mesh.add_addresses(key, addrs)


def _age(state: State, key: bytes) -> int:
    machine = state.machines.get(key)
    return machine.bound_block if machine is not None else state.number
