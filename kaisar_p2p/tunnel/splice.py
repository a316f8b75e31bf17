"""Copy bytes both ways between a TCP connection and a stream, with half-close, bounded buffers and an idle limit."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from kaisar_p2p.errors import KaisarError, MeshError, PortUnavailable

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 * 1024


class TunnelStream(Protocol):
    """The far end: a `MeshStream`, or anything like it. Its methods raise MeshError when it breaks."""

    async def send_some(self, data: bytes) -> None:
        """Send all of `data`, waiting while the other side does not read."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, b"" at the end."""

    async def send_eof(self) -> None:
        """Nothing more will be sent."""

    async def aclose(self) -> None:
        """Finish both directions."""

    async def reset(self) -> None:
        """End both directions at once."""


@dataclass
class TunnelCounters:
    """Bytes carried: `sent` from TCP to the stream, `received` from the stream to TCP."""

    sent_bytes: int = 0
    received_bytes: int = 0


class _Idle:
    """Ends a scope when nothing has moved for a while."""

    def __init__(self, scope: trio.CancelScope, timeout_s: float) -> None:
        self._scope, self._timeout_s = scope, timeout_s
        self.moved()

    def moved(self) -> None:
        """Something moved."""
        self._scope.deadline = trio.current_time() + self._timeout_s


async def splice(
    stream: TunnelStream,
    tcp: trio.SocketStream,
    *,
    idle_timeout_s: float,
    counters: TunnelCounters | None = None,
) -> TunnelCounters:
    """Carry bytes both ways until both sides have finished, one breaks, or nothing moves for `idle_timeout_s`.

    The end of one direction is passed on while the other goes on (half-close). At most one chunk per direction is
    held here, the rest is bounded by the stream's window and the kernel's buffers. Both ends are closed on return;
    after a break or when idle, the stream is reset, so that the other side notices. `counters` may be given to
    watch the bytes while they move. Never raises but for cancellation.
    """
    counters = counters if counters is not None else TunnelCounters()
    finished = False
    try:
        with trio.CancelScope() as scope:
            idle = _Idle(scope, idle_timeout_s)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_outward, stream, tcp, counters, idle, scope)
                nursery.start_soon(_inward, stream, tcp, counters, idle, scope)
            finished = not scope.cancel_called
    finally:
        await trio.aclose_forcefully(tcp) if not finished else await tcp.aclose()
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await (stream.aclose() if finished else stream.reset())
    return counters


async def _outward(
    stream: TunnelStream, tcp: trio.SocketStream, counters: TunnelCounters, idle: _Idle, scope: trio.CancelScope
) -> None:
    try:
        while data := await tcp.receive_some(_CHUNK_BYTES):
            await stream.send_some(data)
            counters.sent_bytes += len(data)
            idle.moved()
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError, MeshError) as error:
        log.debug("tunnel broke on the way out: %r", error)
        scope.cancel()


async def _inward(
    stream: TunnelStream, tcp: trio.SocketStream, counters: TunnelCounters, idle: _Idle, scope: trio.CancelScope
) -> None:
    try:
        while data := await stream.receive_some(_CHUNK_BYTES):
            await tcp.send_all(data)
            counters.received_bytes += len(data)
            idle.moved()
        await tcp.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError, MeshError) as error:
        log.debug("tunnel broke on the way in: %r", error)
        scope.cancel()


async def serve_local(
    listen_host: str,
    port: int,
    open_remote: Callable[[], Awaitable[TunnelStream]],
    *,
    max_connections: int = 64,
    idle_timeout_s: float = 3600.0,
    counters: TunnelCounters | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on `listen_host` and carry every connection over a stream of its own from `open_remote`.

    `port` 0 takes any free one; the bound port is reported with `task_status` (``port = await
    nursery.start(serve_local, …)``). Connections over `max_connections` are closed at once; so is one whose stream
    cannot be opened, with a log entry. Runs until cancelled.

    Raises PortUnavailable.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=listen_host)
    except OSError as error:
        raise PortUnavailable(
            f"cannot listen on {listen_host} port {port}: {error.strerror or error}",
            hint="another program uses it: choose another local port, or 0 for any",
        ) from None
    slots = trio.Semaphore(max_connections)
    carry = partial(_carry, open_remote, slots, idle_timeout_s, counters)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, carry, listeners))
        task_status.started(listeners[0].socket.getsockname()[1])


async def _carry(
    open_remote: Callable[[], Awaitable[TunnelStream]],
    slots: trio.Semaphore,
    idle_timeout_s: float,
    counters: TunnelCounters | None,
    tcp: trio.SocketStream,
) -> None:
    """One local connection."""
    try:
        slots.acquire_nowait()
    except trio.WouldBlock:
        log.warning("too many connections through one tunnel: one is refused")
        await trio.aclose_forcefully(tcp)
        return
    try:
        stream = await open_remote()
        await splice(stream, tcp, idle_timeout_s=idle_timeout_s, counters=counters)
    except KaisarError as error:
        log.warning("a connection through a tunnel failed: %s", error)
    except Exception:  # the edge of the connection's task
        log.exception("a connection through a tunnel failed")
    finally:
        slots.release()
        await trio.aclose_forcefully(tcp)
