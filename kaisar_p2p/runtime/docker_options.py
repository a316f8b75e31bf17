"""What a lease's container is made with, and what the engine's description of one means.

Every label that a node reads is written on every container: images bring labels of their own, and must not name a
node, a lease or a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from docker.types import DeviceRequest, LogConfig

from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus

LEASE_LABEL, NODE_LABEL, ROOT_LABEL = "kaisar.lease", "kaisar.node", "kaisar.root"
GPUS_LABEL, DISK_LABEL, PORTS_LABEL = "kaisar.gpus", "kaisar.disk-mb", "kaisar.ports"
HOST = "127.0.0.1"
PROGRAM_HOST = "0.0.0.0"  # inside the container's own network
NETWORK = "kaisar"
NETWORK_OPTIONS = {"com.docker.network.bridge.enable_icc": "false"}
"""Tenants on one network do not reach each other."""
MAX_PROCESSES = 256
LEAST_MEMORY_MB = 16
LEAST_TMPFS_MB = 16
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"]
LOGS = LogConfig(type=LogConfig.types.JSON, config={"max-size": "4m", "max-file": "2"})
_PHASES = {"created": "created", "running": "running", "paused": "running", "restarting": "running"}
_PORT = re.compile(r"\{port:(\d{1,5})\}")


def arguments(spec: ContainerSpec, node_id: str, gpus: tuple[str, ...], *, read_only: bool) -> dict[str, Any]:
    """What `containers.create` gets besides the image and the disk's limit; `gpus` are the engine's indices."""
    memory = f"{max(spec.memory_mb, LEAST_MEMORY_MB)}m"
    made: dict[str, Any] = {
        "command": [_filled(part) for part in spec.command] or None,
        "name": f"kaisar-{node_id[:8]}-{spec.lease[:16]}",
        "labels": {
            LEASE_LABEL: spec.lease,
            NODE_LABEL: node_id,
            GPUS_LABEL: ",".join(gpus),
            DISK_LABEL: "",
            PORTS_LABEL: _joined(spec.ports),
        },
        "environment": _environment(spec),
        "use_config_proxy": False,  # the operator's proxy, and its password, are nobody else's
        "ports": {f"{port}/tcp": (HOST, None) for port in spec.ports},
        "network": NETWORK,
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": max(1, spec.cpu_cores) * 10**9,
        "pids_limit": MAX_PROCESSES,
        "cap_drop": ["ALL"],
        "cap_add": CAPABILITIES,
        "security_opt": ["no-new-privileges"],
        "log_config": LOGS,
        "init": True,
        "detach": True,
    }
    if read_only:
        size = f"size={max(LEAST_TMPFS_MB, spec.disk_mb)}m"
        made |= {"read_only": True, "tmpfs": dict.fromkeys(("/tmp", "/run"), size)}
    if gpus:
        made["device_requests"] = [DeviceRequest(device_ids=list(gpus), capabilities=[["gpu"]])]
    return made


def _joined(ports: tuple[int, ...]) -> str:
    return ",".join(map(str, ports))


def _filled(part: str) -> str:
    """Templates run in any runtime: here the image's own interpreter, and the ports as they are."""
    return _PORT.sub(r"\1", part.replace("{python}", "python3").replace("{host}", PROGRAM_HOST))


def _environment(spec: ContainerSpec) -> dict[str, str]:
    told = {f"{prefix}PORT_{port}": str(port) for port in spec.ports for prefix in ("", "KAISAR_")}
    if spec.ports:
        told["PORT"] = str(spec.ports[0])
    return told | dict(spec.environment) | {"KAISAR_LEASE": spec.lease, "KAISAR_HOST": PROGRAM_HOST}


def free_gpus(count: int, containers: Iterable[Any]) -> tuple[str, ...]:
    """The lowest indices that none of this node's containers has; the engine itself shares GPUs without a word."""
    taken = {index for each in containers for index in each.labels.get(GPUS_LABEL, "").split(",")}
    free = (str(index) for index in range(len(taken) + count) if str(index) not in taken)
    return tuple(index for index, _ in zip(free, range(count), strict=False))


def status_of(container: Any) -> ContainerStatus:
    """From what `inspect` says of a container."""
    state = container.attrs.get("State", {})
    phase = _PHASES.get(state.get("Status", ""), "exited")
    code = int(state.get("ExitCode", 255)) if phase == "exited" else None
    ports = []
    for name, bindings in ((container.attrs.get("NetworkSettings") or {}).get("Ports") or {}).items():
        if bindings:
            ports.append((int(name.partition("/")[0]), (HOST, int(bindings[0]["HostPort"]))))
    order = container.labels.get(PORTS_LABEL, "").split(",")  # the engine has its own
    ports.sort(key=lambda pair: order.index(str(pair[0])) if str(pair[0]) in order else len(order))
    return ContainerStatus(container.labels.get(LEASE_LABEL, ""), phase, code, tuple(ports))
