"""Worker adverts and heartbeats: the newest of a worker counts, until it expires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, Bytes32, Count, Planck, Text64, Text256, message
from kaisar_p2p.wire.envelope import Verified
from kaisar_p2p.wire.judge import judge_signature, peek_signed
from kaisar_p2p.wire.verdict import Verdict

if TYPE_CHECKING:
    from protocols.interpreter.state import State

MAX_ADDRS = 8
"""Addresses in an advert, and in a bootstrap record."""
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
    addrs: Annotated[tuple[Text256, ...], Count(MAX_ADDRS)]
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
