"""TCP sockets of the mesh: listening alone on a port, and dialing from that same port.

A NAT gives each local port a port of its own outside. Dialing from the port that we listen on makes the outside port
the one that others can dial; hole punching depends on it (https://pdos.csail.mit.edu/papers/p2pnat.pdf).
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable

import trio

from kaisar_p2p.mesh.discovery.addresses import Address

_BACKLOG = 128
_PORT_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)


async def listen(address: Address) -> list[trio.SocketListener]:
    """Listen where nobody else does; raises OSError.

    SO_REUSEPORT lets us dial from the port. It is set when we listen already: set before, a second process could
    listen on the port too and would silently get half of the connections.
    """
    listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=_BACKLOG)
    if hasattr(socket, "SO_REUSEPORT"):
        for listener in listeners:
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return listeners


async def connect(address: Address, source: Address | None = None) -> trio.SocketStream:
    """Dial, from the listening address `source` if that is free for it; raises OSError."""
    if source is not None:
        try:
            return await connect_from(source, address)
        except OSError as error:
            if error.errno not in _PORT_TAKEN:  # the same two ports are connected already, or were a moment ago
                raise
    return await trio.open_tcp_stream(address.host, address.port)


def dialing_source(address: Address, bound: Iterable[Address]) -> Address | None:
    """The listening address to dial a public address from; None for others: no NAT is on the way."""
    if address.is_private or not address.kind.startswith("ip"):
        return None
    usable = [b for b in bound if b.kind == address.kind and not b.is_loopback]
    return usable[0] if usable else None


async def connect_from(source: Address, address: Address) -> trio.SocketStream:
    """Dial an IP address from one that we listen on; raises OSError."""
    family = socket.AF_INET6 if address.kind == "ip6" else socket.AF_INET
    dialer = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            dialer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        dialer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            dialer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await dialer.bind((source.host, source.port))
        await dialer.connect((address.host, address.port))
    except BaseException:
        dialer.close()
        raise
    return trio.SocketStream(dialer)


def notice_loss(sock: trio.socket.SocketType, silence_s: float) -> None:
    """Let the kernel give up a connection whose other end is gone for `silence_s`, also while nobody pings.

    The muxer's pings find a peer that hangs; this covers handshakes, and what is written to a pulled cable
    (https://datatracker.ietf.org/doc/html/rfc5482). Systems without an option do without it.
    """
    third_s = max(1, round(silence_s / 3))
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    for name, value in (
        ("TCP_KEEPIDLE", third_s),
        ("TCP_KEEPINTVL", third_s),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", 3000 * third_s),
    ):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    for level, option, value in options:
        with contextlib.suppress(OSError):  # a peer that is gone already; a kernel that has the name, not the option
            sock.setsockopt(level, option, value)
