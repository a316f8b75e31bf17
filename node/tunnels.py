"""Tunnels into leases: the worker's side (who may open what), the client's local ports, probes as a user would."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import NamedTuple

import trio

from kaisar_p2p.errors import (
    ContainerError,
    DecodeError,
    KaisarError,
    MeshError,
    PortUnavailable,
    RequestFailed,
    ungrouped,
)
from kaisar_p2p.mesh import Mesh, MeshStream
from kaisar_p2p.runtime.interface import ContainerRuntime, ExecSession
from kaisar_p2p.runtime.reach import stays_open
from kaisar_p2p.tunnel import serve_local, splice
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.ids import short
from protocols.actions import Action, BlockApplied, Event
from protocols.deploy import TUNNEL_PROTOCOL, TunnelOpen, TunnelReply
from protocols.interpreter.state import ORDER_OPEN, OrderState, State

log = logging.getLogger(__name__)

FRAME_BYTES = 1 << 17
IDLE_TIMEOUT_S = 600.0
OPEN_TIMEOUT_S = 10.0
FIRST_FRAME_S = 10.0
HANG_UP_POLL_S = 0.5
LOG_TAIL_BYTES = 1 << 16
STDIN, STDOUT, STDERR, EXIT = range(4)


def may_open(order: OrderState | None, peer: bytes, worker: bytes, service: str) -> str:
    """ "" if `peer` may use the service of a lease on this worker, else the reason.

    The client may do everything; a witness of the deploy committee may only connect to a port, as a user would.
    """
    if order is None or order.worker != worker:
        return "no such lease on this worker"
    if order.status != ORDER_OPEN:
        return "the order has ended"
    if peer == order.client_key or (peer in order.seats and service == "tcp"):
        return ""
    return "only the lease's client may open this"


class TunnelServer:
    """The worker's side of `/kaisar/tunnel/1`."""

    def __init__(self, runtime: ContainerRuntime, key: bytes, state: Callable[[], State]) -> None:
        self._runtime = runtime
        self._key = key
        self._state = state

    async def handle(self, stream: MeshStream) -> None:
        """One tunnel, from its first frame to its end."""
        try:
            with trio.fail_after(FIRST_FRAME_S):
                opening = decode(TunnelOpen, await stream.receive_frame())
        except DecodeError as error:
            raise RequestFailed(f"bad tunnel request: {error.message}") from error
        except trio.TooSlowError:
            raise RequestFailed(f"no tunnel request within {FIRST_FRAME_S:.0f} s") from None
        refusal = may_open(self._state().orders.get(opening.order_id), stream.peer, self._key, opening.service)
        serve = {"tcp": self._serve_tcp, "logs": self._serve_logs, "exec": self._serve_exec}.get(opening.service)
        if refusal or serve is None:
            await stream.send_frame(encode(TunnelReply(0, refusal or f"unknown service {opening.service!r}")))
            return
        try:
            with ungrouped():
                await serve(stream, opening)
        except (ContainerError, OSError) as error:
            log.info("tunnel %s into %s ended: %s", opening.service, short(opening.order_id), error)

    async def _serve_tcp(self, stream: MeshStream, opening: TunnelOpen) -> None:
        status = await self._runtime.status(opening.order_id.hex())
        if status is None or status.phase != "running":  # what listens on its old port now may be somebody else's
            await stream.send_frame(encode(TunnelReply(0, "the container does not run")))
            return
        if opening.port == 0:  # a witness asks about a program without a port
            await stream.send_frame(encode(TunnelReply(1, "")))
            return
        address = status.address(opening.port)
        if address is None:
            await stream.send_frame(encode(TunnelReply(0, f"the container has no port {opening.port}")))
            return
        try:
            with trio.fail_after(OPEN_TIMEOUT_S):
                tcp = await trio.open_tcp_stream(*address)
        except (OSError, trio.TooSlowError):
            await stream.send_frame(encode(TunnelReply(0, f"nothing listens on port {opening.port} of the container")))
            return
        async with tcp:
            if self._probes(stream.peer, opening.order_id) and not await stays_open(tcp):
                await stream.send_frame(encode(TunnelReply(0, f"nothing listens on port {opening.port}")))
                return
            await stream.send_frame(encode(TunnelReply(1, "")))
            await splice(stream, tcp, idle_timeout_s=IDLE_TIMEOUT_S)

    def _probes(self, peer: bytes, order_id: bytes) -> bool:
        """Whether this is a witness; a client is not kept waiting, and sees for itself when nothing listens."""
        order = self._state().orders.get(order_id)
        return order is not None and peer != order.client_key

    async def _serve_logs(self, stream: MeshStream, opening: TunnelOpen) -> None:
        lease, follow = opening.order_id.hex(), "follow" in opening.arguments
        if await self._runtime.status(lease) is None:
            await stream.send_frame(encode(TunnelReply(0, "the container is gone, and its logs with it")))
            return
        await stream.send_frame(encode(TunnelReply(1, "")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_hang_up, stream, nursery.cancel_scope)
            logs = self._runtime.logs(lease, follow=follow, tail_bytes=LOG_TAIL_BYTES)
            async with aclosing(logs):  # type: ignore[type-var]  # every runtime's is a generator
                async for chunk in logs:
                    for start in range(0, len(chunk), FRAME_BYTES // 2):
                        await stream.send_frame(chunk[start : start + FRAME_BYTES // 2])
            await stream.send_eof()
            nursery.cancel_scope.cancel()

    async def _serve_exec(self, stream: MeshStream, opening: TunnelOpen) -> None:
        if not opening.arguments:
            await stream.send_frame(encode(TunnelReply(0, "no command")))
            return
        async with self._runtime.exec(opening.order_id.hex(), opening.arguments) as session:
            await stream.send_frame(encode(TunnelReply(1, "")))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_feed_stdin, stream, session, nursery.cancel_scope)
                async for channel, data in session.output():
                    for start in range(0, len(data), FRAME_BYTES // 2):
                        await stream.send_frame(bytes([channel]) + data[start : start + FRAME_BYTES // 2])
                code = await session.exit_code()
                await stream.send_frame(bytes([EXIT]) + str(code).encode())
                await stream.send_eof()
                nursery.cancel_scope.cancel()


async def _feed_stdin(stream: MeshStream, session: ExecSession, scope: trio.CancelScope) -> None:
    """Frames of the client are the command's input; its end is the input's end, a reset ends the command."""
    try:
        while True:
            frame = await stream.receive_frame()
            if frame[:1] == bytes([STDIN]):
                await session.send(frame[1:])
    except ContainerError:  # the command reads no more
        pass
    except MeshError:
        with suppress(ContainerError):
            await session.send_eof()
    try:
        while await stream.receive_some():
            pass
        while True:  # a reset after the end of what comes in shows only when something goes out
            await stream.send_some(b"")
            await trio.sleep(HANG_UP_POLL_S)
    except MeshError:
        scope.cancel()


async def _until_hang_up(stream: MeshStream, scope: trio.CancelScope) -> None:
    """The client of a log says nothing more; without this, a silent program's log would be followed for ever."""
    try:
        while await stream.receive_some():
            pass
    except MeshError:
        pass
    scope.cancel()


@dataclass(frozen=True)
class LocalPort:
    """A port on this machine that leads into a lease."""

    order_id: bytes
    port: int
    host: str
    local_port: int
    scope: trio.CancelScope


class TunnelRefused(RequestFailed):
    """The worker answered, and refused, with its reason."""


class Probed(NamedTuple):
    """What a probe found: the program (`up`), at least its worker (`answered`), or nobody; `detail` is for people."""

    up: bool
    detail: str
    answered: bool


class TunnelClient:
    """Opens tunnels into leases on other nodes, keeps local ports listening, probes.

    As a machine, it closes the local ports of orders that have ended.
    """

    deadline: float | None = None

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.local_ports: list[LocalPort] = []
        self._starts, self._start_requests = trio.open_memory_channel[_PortRequest](16)

    async def run(self) -> None:
        """Owns the listening tasks; until cancelled."""
        async with trio.open_nursery() as nursery:
            async for request in self._start_requests:
                nursery.start_soon(self._listen, request)

    async def open(self, worker: bytes, opening: TunnelOpen) -> MeshStream:
        """A stream into the lease; the caller closes it. TunnelRefused when the worker refuses."""
        stream = await self._mesh.open_stream(
            worker, TUNNEL_PROTOCOL, timeout_s=OPEN_TIMEOUT_S, max_frame_bytes=FRAME_BYTES
        )
        try:
            with trio.fail_after(OPEN_TIMEOUT_S):
                await stream.send_frame(encode(opening))
                reply = decode(TunnelReply, await stream.receive_frame())
            if not reply.accepted:
                raise TunnelRefused(f"the worker refused: {reply.text}")
        except trio.TooSlowError as error:
            await stream.reset()
            raise RequestFailed("the worker did not answer the tunnel request in time") from error
        except DecodeError as error:
            await stream.reset()
            raise RequestFailed("the worker answered the tunnel request with garbage") from error
        except BaseException:
            with trio.move_on_after(1, shield=True):
                await stream.reset()
            raise
        return stream

    async def probe(self, order_id: bytes, worker: bytes, port: int, deadline_s: float) -> Probed:
        """Connect as a user would: up when the tunnel opens, which means that the program accepted a connection."""
        try:
            with trio.fail_after(deadline_s):
                stream = await self.open(worker, TunnelOpen(order_id, "tcp", port, ()))
        except (MeshError, trio.TooSlowError) as error:
            return Probed(False, str(error) or "timed out", isinstance(error, TunnelRefused))
        await stream.aclose()
        return Probed(True, "", True)

    async def listen(self, order_id: bytes, worker: bytes, port: int, host: str, local_port: int) -> LocalPort:
        """Listen on a local port (0: any free one); every connection is forwarded through a tunnel of its own."""
        for existing in self.local_ports:
            same = (existing.order_id, existing.port, existing.host) == (order_id, port, host)
            if same and local_port in (0, existing.local_port):
                return existing
        if not 0 <= local_port < 1 << 16:
            raise PortUnavailable(f"{local_port} is not a port", hint="choose one from 1 to 65535, or 0 for any")
        request = _PortRequest(order_id, worker, port, host, local_port)
        await self._starts.send(request)
        await request.done.wait()
        if request.error is not None:
            raise request.error
        assert request.result is not None
        return request.result

    def step(self, event: Event, now: float) -> list[Action]:
        """Blocks tell which orders are over."""
        if isinstance(event, BlockApplied):
            for order_id in {each.order_id for each in self.local_ports}:
                order = event.state.orders.get(order_id)
                if order is None or order.status != ORDER_OPEN:
                    self.close_ports(order_id)
        return []

    def close_ports(self, order_id: bytes) -> None:
        """Stop listening for a lease."""
        for each in self.local_ports:
            if each.order_id == order_id:
                each.scope.cancel()

    async def _listen(self, request: _PortRequest) -> None:
        async def open_remote() -> MeshStream:
            return await self.open(request.worker, TunnelOpen(request.order_id, "tcp", request.port, ()))

        local: LocalPort | None = None
        try:
            async with trio.open_nursery() as nursery:
                bound = await nursery.start(serve_local, request.host, request.local_port, open_remote)
                local = LocalPort(request.order_id, request.port, request.host, bound, nursery.cancel_scope)
                self.local_ports.append(local)
                request.result = local
                request.done.set()
        except* (KaisarError, OSError) as group:
            failure = group.exceptions[0]
            log.warning("local port %d: %s", request.local_port, failure)
            request.error = failure if isinstance(failure, KaisarError) else MeshError(str(failure))
        finally:
            request.done.set()
            if local is not None:
                self.local_ports.remove(local)


class _PortRequest:
    def __init__(self, order_id: bytes, worker: bytes, port: int, host: str, local_port: int) -> None:
        self.order_id, self.worker, self.port, self.host, self.local_port = order_id, worker, port, host, local_port
        self.done = trio.Event()
        self.result: LocalPort | None = None
        self.error: KaisarError | None = None
