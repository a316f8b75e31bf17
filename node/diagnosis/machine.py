"""Checks that need no running node: files, keys, ledger, clock, ports, runtime, GPUs."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.identity import Keystore
from node.config import Config, check_data_directory, load_config
from node.diagnosis.finding import Findings

LITTLE_BYTES, ENOUGH_BYTES = 100 << 20, 1 << 30
CLOCK_S = 10.0
_DRIVER = Path("/proc/driver/nvidia")


def check_directory(findings: Findings, directory: Path) -> bool:
    """The data directory, and room on its disk; False when there is none to look into."""
    try:
        check_data_directory(directory)
    except KaisarError as error:
        findings.fail("data directory", error.message, error.hint)
        return False
    free = shutil.disk_usage(directory).free
    text = f"{directory}, {free / (1 << 30):.1f} GiB free"
    if free < ENOUGH_BYTES:
        (findings.fail if free < LITTLE_BYTES else findings.warn)("data directory", text, "free some space on its disk")
    else:
        findings.ok("data directory", text)
    return True


def check_configuration(findings: Findings, directory: Path) -> Config | None:
    """The configuration with what its files say; None when it cannot be read."""
    from node.mesh_settings import mesh_config

    try:
        config = load_config(directory)
        mesh = mesh_config(config, "")
    except KaisarError as error:
        findings.fail("configuration", error.message, error.hint)
        return None
    swarm = "private swarm" if mesh.pre_shared_key is not None else "open network"
    findings.ok("configuration", f"roles {', '.join(config.node.roles) or 'none'}; {swarm}")
    key = config.pre_shared_key_path
    if key is not None and key.stat().st_mode & 0o077:
        findings.warn("swarm key", f"other users of this machine can read {key}", f"chmod 600 {key}")
    return config


def check_keys(findings: Findings, config: Config) -> None:
    """The machine key and the wallet are there and whole."""
    with findings.failing("keys"):
        store = Keystore(config.keys_path)
        infos = (store.machine_info(), store.wallet_info(config.node.wallet))
        locked = "encrypted" if all(info.encrypted for info in infos) else "not encrypted"
        findings.ok("keys", f"machine key and wallet {config.node.wallet}, {locked}")


def check_ledger(findings: Findings, config: Config, now_s: float) -> None:
    """The ledger's file can be used, is of our network, and is not from the future."""
    from kaisar_p2p.ledger.file import LedgerFile
    from node.boot import check_network

    with findings.failing("ledger"):
        ledger = LedgerFile(config.ledger_path)
        try:
            check_network(config, ledger.network)
            head = ledger.head()
        finally:
            ledger.close()
        findings.ok("ledger", f"network {ledger.network.hex()[:12]}, block {head.number}")
        if head.time_ms / 1000 > now_s + CLOCK_S:
            findings.warn(
                "clock",
                f"the newest block is {head.time_ms / 1000 - now_s:.0f} s in the future",
                "set this machine's clock, best by NTP",
            )


def check_ports(findings: Findings, config: Config) -> None:
    """The addresses to listen on are free, while no node of ours runs."""
    from kaisar_p2p.mesh.discovery.addresses import parse

    for text in config.network.listen:
        try:
            address, _ = parse(text)
        except ValueError:
            findings.fail("port", f"{text} cannot be listened on", "/ip4/<address>/tcp/<port>")
            continue
        family = socket.AF_INET6 if address.kind == "ip6" else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the node: what has just ended is no hindrance
            try:
                probe.bind((address.host, address.port))
                probe.listen(1)
            except OSError as error:
                holder = _holder(address.port)
                hint = f"stop {holder}, or choose another port" if holder else "choose another with network.listen"
                findings.fail("port", f"{address.host} port {address.port}: {error.strerror}", hint)
            else:
                port = f"port {address.port}" if address.port else "any port"
                findings.ok("port", f"{address.host} {port} is free")


def _holder(port: int) -> str:
    """The process that listens on a port, as far as we may know."""
    import psutil

    try:
        found = [
            c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr[1:] == (port,) and c.pid
        ]
        return f"process {found[0]} ({psutil.Process(found[0]).name()})" if found else ""
    except psutil.Error:
        return ""


def check_runtime(findings: Findings, config: Config) -> None:
    """What a provider's tenants run in."""
    if "provider" not in config.node.roles:
        return
    import trio

    from kaisar_p2p.runtime import select_runtime

    with findings.failing("runtime"):
        base = config.data_directory / "leases"
        found = trio.run(select_runtime, config.provider.runtime, base, "doctor").name
        if found == "process":
            findings.warn(
                "runtime",
                "tenants would run as plain processes, without isolation",
                "for more than development, start Docker and let this user reach its socket",
            )
        else:
            findings.ok("runtime", f"{found} answers")


def check_gpus(findings: Findings, config: Config) -> None:
    """The GPUs that a provider offers."""
    if "provider" not in config.node.roles:
        return
    from kaisar_p2p.hardware.probe import probe

    gpus, wanted = probe(config.data_directory).gpus, config.provider.gpus
    if wanted is not None and wanted > len(gpus):
        findings.fail(
            "GPUs", f"{wanted} are offered, {len(gpus)} found", "install NVIDIA's driver, or set provider.gpus lower"
        )
    elif gpus:
        findings.ok("GPUs", ", ".join(gpu.name for gpu in gpus))
    elif wanted != 0 and _DRIVER.exists():
        findings.warn(
            "GPUs", "there is a driver, and NVML shows no GPU", "does nvidia-smi work? In a container, pass --gpus all"
        )
    else:
        findings.ok("GPUs", "none: the processor is offered")


def wall_clock_s() -> float:
    """Unix time."""
    return time.time()
