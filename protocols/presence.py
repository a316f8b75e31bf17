"""A node says that it is there: heartbeats from everybody, adverts from workers (`protocols/README.md`, "Presence")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from protocols.actions import Action, BlockApplied, Event, Publish, Wake
from protocols.adverts import MAX_ADDRS, Heartbeat, Spec, WorkerAdvert
from protocols.interpreter.state import ORDER_OPEN, RETIRED, State
from protocols.params import PERMILLE


def free_of(state: State, worker: bytes, spec: Spec) -> Spec:
    """What open orders leave of a worker's registered resources."""
    free = spec
    for order in state.orders.values():
        if order.worker == worker and order.status == ORDER_OPEN:
            taken = order.resources
            free = replace(
                free,
                cpu_cores=max(0, free.cpu_cores - taken.cpu_cores),
                memory_mb=max(0, free.memory_mb - taken.memory_mb),
                disk_mb=max(0, free.disk_mb - taken.disk_mb),
                gpus=max(0, free.gpus - taken.gpus),
            )
    return free


@dataclass
class Presence:
    """Publishes at start and every `advert_interval_ms`, and with the next block when the worker's state on the ledger
    or its addresses have changed."""

    keys: KeyPair
    owner: bytes
    roles: int
    addrs: Callable[[], tuple[str, ...]]
    runtime: str = ""
    deadline: float | None = None
    _state: State | None = None
    _published: tuple[int, int, tuple[str, ...]] | None = None

    def step(self, event: Event, now: float) -> list[Action]:
        """Blocks and the timer drive it."""
        if isinstance(event, BlockApplied):
            self._state = event.state
            if not event.live:
                return []
            due = self.deadline is None or now >= self.deadline
            return self._publish(event.state, now) if due or self._situation(event.state) != self._published else []
        if isinstance(event, Wake) and self._state is not None and self.deadline is not None and now >= self.deadline:
            return self._publish(self._state, now)
        return []

    def _situation(self, state: State) -> tuple[int, int, tuple[str, ...]]:
        worker = state.workers.get(self.keys.public_key)
        return (worker.status if worker else 0, self._leases(state), self.addrs()[:MAX_ADDRS] if worker else ())

    def _leases(self, state: State) -> int:
        mine = self.keys.public_key
        return sum(order.worker == mine and order.status == ORDER_OPEN for order in state.orders.values())

    def _publish(self, state: State, now: float) -> list[Action]:
        self.deadline = now + state.params.advert_interval_ms / 1000
        self._published = self._situation(state)
        issued_ms, leases = int(now * 1000), self._leases(state)
        worker = state.workers.get(self.keys.public_key)
        if worker is None or worker.status == RETIRED or not self.runtime:  # without a runtime, there is no offer
            heartbeat = Heartbeat(self.keys.public_key, issued_ms, self.roles, 0, 0)
            return [Publish("heartbeat", seal(heartbeat, self.keys, state.network))]
        free = free_of(state, self.keys.public_key, worker.spec)
        cores = worker.spec.cpu_cores
        workload = PERMILLE * (cores - free.cpu_cores) // max(1, cores)
        advert = WorkerAdvert(
            worker=self.keys.public_key,
            owner=self.owner,
            issued_ms=issued_ms,
            addrs=self.addrs()[:MAX_ADDRS],
            spec=worker.spec,
            free=free,
            price_planck_per_hour=worker.price_planck_per_hour,
            workload_permille=workload,
            leases=leases,
            runtime=self.runtime,
        )
        heartbeat = Heartbeat(self.keys.public_key, issued_ms, self.roles, workload, leases)
        return [
            Publish("advert", seal(advert, self.keys, state.network)),
            Publish("heartbeat", seal(heartbeat, self.keys, state.network)),
        ]
