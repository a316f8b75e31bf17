"""What a node has heard: adverts, certificates, lease events. Every node indexes it; there is no central explorer."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kaisar_p2p.wire.envelope import Verified
from protocols.actions import Action, Event, Gossip
from protocols.adverts import Heartbeat, WorkerAdvert
from protocols.deploy import LeaseEvent
from protocols.lease_client import ClientLease
from protocols.params import PERMILLE
from protocols.popw import PASS
from protocols.quorum import QuorumCertificate, VerdictCore

V = TypeVar("V")

CERTIFICATES_KEPT = 2_000
LEASES_KEPT = 1_000
EVENTS_PER_LEASE = 32
WORKERS_KEPT = 10_000


@dataclass
class Index:
    """A machine that never acts: it only remembers, within bounds."""

    adverts: OrderedDict[bytes, WorkerAdvert] = field(default_factory=OrderedDict)
    heartbeats: OrderedDict[bytes, Heartbeat] = field(default_factory=OrderedDict)
    certificates: deque[tuple[float, QuorumCertificate]] = field(
        default_factory=lambda: deque(maxlen=CERTIFICATES_KEPT)
    )
    lease_events: OrderedDict[bytes, deque[LeaseEvent]] = field(default_factory=OrderedDict)
    evidence: deque[tuple[float, object]] = field(default_factory=lambda: deque(maxlen=CERTIFICATES_KEPT))

    own_lease: Callable[[bytes], ClientLease | None] = lambda _: None
    """What this node itself keeps of an order that it placed: gossip is not repeated after a restart."""

    deadline: float | None = None

    def step(self, event: Event, now: float) -> list[Action]:
        """Remember gossip."""
        if isinstance(event, Gossip):
            message = event.message.message if isinstance(event.message, Verified) else event.message
            self._remember(message, event)
        return []

    def _remember(self, message: object, event: Gossip) -> None:
        match message:
            case WorkerAdvert():
                known = self.adverts.get(message.worker)
                if known is None or known.issued_ms < message.issued_ms:
                    _keep(self.adverts, message.worker, message, WORKERS_KEPT)
            case Heartbeat():
                _keep(self.heartbeats, message.node, message, WORKERS_KEPT)
            case QuorumCertificate():
                self.certificates.append((event.received_at, message))
            case LeaseEvent():
                if message.order_id not in self.lease_events:
                    _keep(self.lease_events, message.order_id, deque(maxlen=EVENTS_PER_LEASE), LEASES_KEPT)
                self.lease_events[message.order_id].append(message)
            case _ if event.topic == "evidence":
                self.evidence.append((event.received_at, message))
            case _:
                pass

    def pass_permille(self) -> dict[bytes, int]:
        """Of each worker, how many of its certified checks were passed, in thousandths."""
        passed: Counter[bytes] = Counter()
        checked: Counter[bytes] = Counter()
        for _, certificate in self.certificates:
            if isinstance(certificate.core, VerdictCore):
                checked[certificate.core.worker] += 1
                passed[certificate.core.worker] += certificate.core.verdict == PASS
        return {worker: PERMILLE * passed[worker] // count for worker, count in checked.items()}

    def live_adverts(self, now: float, ttl_ms: int) -> list[WorkerAdvert]:
        """Adverts that have not expired."""
        oldest = int(now * 1000) - ttl_ms
        return [advert for advert in self.adverts.values() if advert.issued_ms >= oldest]


def _keep(table: OrderedDict[bytes, V], key: bytes, value: V, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)
