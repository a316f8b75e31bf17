"""Worker adverts and heartbeats: the newest of a worker wins, and expires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, Bytes32, Count, Planck, Text64, Text256, message
from kaisar_p2p.wire.envelope import Verified
from kaisar_p2p.wire.judge import judge_signature, peek_signed
from kaisar_p2p.wire.verdict import Verdict

if TYPE_CHECKING:
    from protocols.interpreter.state import State

GPU_CLASS, CPU_CLASS, MOBILE_CLASS = range(1, 4)


@message(10)
@dataclass(frozen=True)
class Spec:
    """Resources of a worker, or those that an order asks for."""

    device_class: U8
    cpu_cores: U16
    memory_mb: U32
    disk_mb: U32
    gpus: U8
    gpu_memory_mb: U32
    gpu_model: Text64


@message(11)
@dataclass(frozen=True)
class WorkerAdvert:
    """Signed by the worker. `workload_permille` 0 = idle; `runtime` is "docker" or "process" (development)."""

    DOMAIN: ClassVar[str] = "kaisar/advert"
    worker: Bytes32
    owner: Bytes32
    issued_ms: U64
    addrs: Annotated[tuple[Text256, ...], Count(8)]
    spec: Spec
    free: Spec
    price_planck_per_hour: Planck
    workload_permille: U16
    leases: U16
    runtime: Text64


@message(12)
@dataclass(frozen=True)
class Heartbeat:
    """Signed status of any node; a hint, never proof."""

    DOMAIN: ClassVar[str] = "kaisar/heartbeat"
    node: Bytes32
    issued_ms: U64
    roles: U8
    workload_permille: U16
    leases: U16


# ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────────

ADVERT_BYTES_MAX = 4_096
HEARTBEAT_BYTES_MAX = 512
MAX_SKEW_MS = 60_000
"""Clocks differ; a message from further in the future than this waits for nobody."""
RUNTIMES = ("docker", "process")
WHOLE_PERMILLE = 1000


def validate_advert(
    data: bytes, received_at: float, state: State
) -> tuple[Verdict, str, Verified[WorkerAdvert] | None]:
    """Gossip on `advert`; `received_at` in seconds since the Unix epoch."""
    seen = peek_signed(WorkerAdvert, data, ADVERT_BYTES_MAX)
    # [REJECT] It is a canonical envelope of an advert.
    if seen is None:
        return Verdict.REJECT, "not an advert", None
    signer, advert = seen
    # [REJECT] It makes sense in itself.
    if signer != advert.worker or not _plausible(advert):
        return Verdict.REJECT, "impossible advert", None
    # [IGNORE] It is neither from the future nor expired.
    if not _timely(advert.issued_ms, received_at, state.params.advert_ttl_ms):
        return Verdict.IGNORE, "from the future, or expired", None
    # [IGNORE] The ledger, as far as this node has it, knows the worker under that owner, and it has not left.
    if not _on_ledger(advert, state):
        return Verdict.IGNORE, "not a worker of that owner", None
    # [REJECT] The signature is right.
    return judge_signature(WorkerAdvert, data, state.network)


def validate_heartbeat(
    data: bytes, received_at: float, state: State
) -> tuple[Verdict, str, Verified[Heartbeat] | None]:
    """Gossip on `heartbeat`; `received_at` in seconds since the Unix epoch."""
    seen = peek_signed(Heartbeat, data, HEARTBEAT_BYTES_MAX)
    # [REJECT] It is a canonical envelope of a heartbeat, by the node that it names.
    if seen is None or seen[0] != seen[1].node or seen[1].workload_permille > WHOLE_PERMILLE:
        return Verdict.REJECT, "not a heartbeat of its sender", None
    # [IGNORE] It is neither from the future nor expired.
    if not _timely(seen[1].issued_ms, received_at, state.params.advert_ttl_ms):
        return Verdict.IGNORE, "from the future, or expired", None
    # [IGNORE] The node is bound to an account: anybody else could send as many as it likes.
    if seen[1].node not in state.machines:
        return Verdict.IGNORE, "not a bound machine", None
    # [REJECT] The signature is right.
    return judge_signature(Heartbeat, data, state.network)


def fits(wanted: Spec, offered: Spec) -> bool:
    """Whether resources `offered` cover those `wanted`; an empty GPU model, and class 0, mean any."""
    return (
        wanted.device_class in (0, offered.device_class)
        and wanted.cpu_cores <= offered.cpu_cores
        and wanted.memory_mb <= offered.memory_mb
        and wanted.disk_mb <= offered.disk_mb
        and wanted.gpus <= offered.gpus
        and (not wanted.gpus or wanted.gpu_memory_mb <= offered.gpu_memory_mb)
        and wanted.gpu_model in ("", offered.gpu_model)
    )


def _plausible(advert: WorkerAdvert) -> bool:
    return (
        GPU_CLASS <= advert.spec.device_class <= MOBILE_CLASS
        and fits(advert.free, advert.spec)
        and advert.workload_permille <= WHOLE_PERMILLE
        and advert.runtime in RUNTIMES
    )


def _timely(issued_ms: int, received_at: float, ttl_ms: int) -> bool:
    now_ms = received_at * 1000
    return now_ms - ttl_ms <= issued_ms <= now_ms + MAX_SKEW_MS


def _on_ledger(advert: WorkerAdvert, state: State) -> bool:
    # The state holds specs of this module, so these names can be imported only when both modules are complete.
    from protocols.interpreter.calls import PROVIDER
    from protocols.interpreter.state import RETIRED

    worker, machine = state.workers.get(advert.worker), state.machines.get(advert.worker)
    if worker is not None:
        return worker.owner == advert.owner and worker.status != RETIRED
    return machine is not None and machine.owner == advert.owner and bool(machine.roles & PROVIDER)


# ── the book ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class AdvertBook:
    """The newest advert of each worker, until it expires. About 1 kB each, at most `capacity` of them."""

    def __init__(self, ttl_ms: int, capacity: int = 100_000) -> None:
        """`ttl_ms` after its issue an advert is gone (`Params.advert_ttl_ms`)."""
        self._ttl_ms = ttl_ms
        self._capacity = capacity
        self._adverts: dict[bytes, Verified[WorkerAdvert]] = {}

    def __len__(self) -> int:
        return len(self._adverts)

    def add(self, advert: Verified[WorkerAdvert], now: float) -> bool:
        """Keep it if it is the worker's newest; `now` in seconds. False when it is old or the book is full."""
        message = advert.message
        held = self._adverts.get(message.worker)
        if message.issued_ms + self._ttl_ms < now * 1000 or (held and held.message.issued_ms >= message.issued_ms):
            return False
        if held is None and len(self._adverts) >= self._capacity:
            self.expire(now)
            if len(self._adverts) >= self._capacity:
                return False
        self._adverts[message.worker] = advert
        return True

    def expire(self, now: float) -> int:
        """Drop what is over; returns how many."""
        old = [key for key, advert in self._adverts.items() if advert.message.issued_ms + self._ttl_ms < now * 1000]
        for key in old:
            del self._adverts[key]
        return len(old)

    def remove(self, worker: bytes) -> None:
        """Forget a worker that has left."""
        self._adverts.pop(worker, None)

    def get(self, worker: bytes, now: float) -> Verified[WorkerAdvert] | None:
        """The worker's advert if it is still valid."""
        advert = self._adverts.get(worker)
        return advert if advert and advert.message.issued_ms + self._ttl_ms >= now * 1000 else None

    def current(self, now: float) -> tuple[Verified[WorkerAdvert], ...]:
        """All valid adverts, sorted by worker."""
        valid = [advert for advert in self._adverts.values() if advert.message.issued_ms + self._ttl_ms >= now * 1000]
        return tuple(sorted(valid, key=lambda advert: advert.message.worker))

    def matching(self, wanted: Spec, now: float) -> tuple[Verified[WorkerAdvert], ...]:
        """Valid adverts whose free resources cover `wanted`, sorted by worker."""
        return tuple(advert for advert in self.current(now) if fits(wanted, advert.message.free))
