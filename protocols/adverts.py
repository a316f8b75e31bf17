"""Worker adverts and heartbeats: the newest of a worker wins, and expires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.wire.codec import U8, U16, U32, U64, Bytes32, Count, Planck, Text64, Text256, message

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
