"""Network namespaces, the cables between them, and slow lines; nothing is left of them when a run has ended or died."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

_NAME = re.compile(r"^kaisar-(\d+)-[0-9a-f]{6}-\d+$")
_RUN = f"kaisar-{os.getpid()}-{secrets.token_hex(3)}"  # process ids are used again
_PLACE = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count(1)


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def inside(namespace: str, *command: str) -> None:
    """The same in a namespace."""
    run("ip", "netns", "exec", namespace, *command)


def enter(namespace: str) -> None:
    """Put this process there, with all the sockets that it opens from now on."""
    fd = os.open(_PLACE / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(fd)


def add() -> str:
    """A new namespace with a loopback interface; its name."""
    name = f"{_RUN}-{next(_numbers)}"
    run("ip", "netns", "add", name)
    run("ip", "-n", name, "link", "set", "lo", "up")
    return name


def remove(name: str) -> None:
    """With whatever still runs there."""
    found = subprocess.run(("ip", "netns", "pids", name), capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True)


def remove_leftovers() -> None:
    """Those of earlier runs that were killed, as their process is gone."""
    for name in os.listdir(_PLACE) if _PLACE.is_dir() else ():
        named = _NAME.match(name)
        if named is not None and not Path(f"/proc/{named[1]}").exists():
            remove(name)


def plug(inner: str, outer: str, network: str) -> str:
    """Connect two namespaces by a cable; the outer one is .1 and the way to everywhere. Returns its interface."""
    outer_name = f"c{next(_numbers)}"
    run("ip", "link", "add", "up0", "netns", inner, "type", "veth", "peer", "name", outer_name, "netns", outer)
    configure(inner, outer, outer_name, network)
    return outer_name


def configure(inner: str, outer: str, outer_name: str, network: str) -> None:
    """Give both ends of a cable their addresses."""
    for namespace, interface, host in ((inner, "up0", 2), (outer, outer_name, 1)):
        run("ip", "-n", namespace, "addr", "add", f"{network}.{host}/24", "dev", interface)
        run("ip", "-n", namespace, "link", "set", interface, "up")
    run("ip", "-n", inner, "route", "add", "default", "via", f"{network}.1")


def new_interface() -> str:
    """A name for the outer end of a line."""
    return f"c{next(_numbers)}"


def working_iptables() -> str | None:
    """The name of an iptables that can translate addresses: which of the two backends the kernel has differs."""
    for name in ("iptables", "iptables-legacy", "iptables-nft"):
        if shutil.which(name) is None:
            continue
        probe = None
        try:
            probe = add()
            inside(probe, name, "-t", "nat", "-A", "POSTROUTING", "-o", "w", "-p", "tcp", "-j", "MASQUERADE")
            inside(probe, name, "-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
        except subprocess.CalledProcessError:
            continue
        else:
            return name
        finally:
            if probe is not None:
                remove(probe)
    return None


def masquerade(gateway: str, iptables: str, *, random_ports: bool) -> None:
    """A NAT that lets in what belongs to connections from inside only, and drops the rest without a word."""
    inside(gateway, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    ports = ("--random-fully",) if random_ports else ()
    for rule in (
        ("-t", "nat", "-A", "POSTROUTING", "-o", "up0", "-p", "tcp", "-j", "MASQUERADE", *ports),
        ("-A", "FORWARD", "-i", "up0", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"),
        ("-A", "FORWARD", "-i", "up0", "-j", "DROP"),
        ("-A", "INPUT", "-i", "up0", "-j", "DROP"),
    ):
        inside(gateway, iptables, *rule)


def forward(gateway: str, iptables: str, port: int, destination: str) -> None:
    """Let a port in, to a host inside."""
    to = ("-i", "up0", "-p", "tcp", "--dport", str(port))
    inside(
        gateway,
        iptables,
        "-t",
        "nat",
        "-A",
        "PREROUTING",
        *to,
        "-j",
        "DNAT",
        "--to-destination",
        f"{destination}:{port}",
    )
    inside(gateway, iptables, "-I", "FORWARD", *to, "-j", "ACCEPT")
