"""An authenticated connection with one peer, and the TCP stream below it."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.mesh.discovery.addresses import AnyAddress
from kaisar_p2p.mesh.guard.admission import origin_of
from kaisar_p2p.mesh.transport.negotiation import BrokenNegotiation, respond
from kaisar_p2p.mesh.transport.noise import PROTOCOL_ID as NOISE_ID
from kaisar_p2p.mesh.transport.yamux import Muxer
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.io.exceptions import ConnectionClosedError  # isort: skip
from libp2p.io.trio import TrioTCPStream  # isort: skip
from libp2p.network.connection.swarm_connection import SwarmConn  # isort: skip
from libp2p.rcmgr import Direction  # isort: skip

if TYPE_CHECKING:
    from kaisar_p2p.mesh.network import Network

log = logging.getLogger(__name__)

YAMUX_ID = TProtocol("/yamux/1.0.0")

_STREAMS_FOR_EACH = 8  # that a peer may have also when all together have too many

StreamHandler = Callable[["Connection", MuxedStream], Awaitable[None]]


class TcpStream(TrioTCPStream):
    """The library's TCP stream, with an answer for IPv6 and without its locks: a session has one reader, one writer."""

    _held = b""  # of `write_soon`

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, b"" at the end; raises ConnectionClosedError."""
        try:
            return bytes(await self.stream.receive_some(n))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the TCP connection broke: {error}") from None

    async def write(self, data: bytes) -> None:
        """Send all of `data`; raises ConnectionClosedError."""
        if self._held:
            data, self._held = b"".join((self._held, data)), b""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the TCP connection broke: {error}") from None

    def write_soon(self, data: bytes) -> bool:
        """Send a few bytes at once; False: part of them leaves with the next `write`. Not while one is under way."""
        data = self._held + data
        try:
            sent = os.write(self.stream.socket.fileno(), data)
        except OSError:  # the system takes nothing now, or the connection is broken: the next write will say so
            sent = 0
        self._held = data[sent:]
        return not self._held

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        if self._cached_remote_address is None:
            try:
                host, port = self.stream.socket.getpeername()[:2]
            except OSError:
                return None
            self._cached_remote_address = (str(host), int(port))
        return self._cached_remote_address

    @property
    def local_port(self) -> int | None:
        """Port of our end."""
        try:
            return int(self.stream.socket.getsockname()[1])
        except OSError:
            return None


class Connection(SwarmConn):
    """An authenticated connection and the tasks of its streams; `run` is its whole life."""

    swarm: Network

    def __init__(self, muxer: Muxer, network: Network, *, inbound: bool, key: bytes) -> None:
        # Not SwarmConn.__init__: it logs to the root logger, which then prints everything of every library.
        self.muxed_conn = muxer
        self.muxer = muxer
        self.swarm = network
        self.streams = set()
        self.event_closed, self.event_started = trio.Event(), trio.Event()
        self._created_at = trio.current_time()
        self._resource_scope = None
        self._direction = Direction.INBOUND if inbound else Direction.OUTBOUND
        self._actual_transport_addresses = muxer.get_transport_addresses()
        self._connection_type = muxer.get_connection_type()
        self._negotiated_security_protocol = str(NOISE_ID)
        self._negotiated_muxer_protocol = str(YAMUX_ID)
        self.key = key
        self.inbound = inbound
        self.retired = False  # another connection with the same peer takes over
        self.instance: bytes | None = None  # of the peer's process, told in the peer exchange
        self.origin = origin_of(self.remote_host)
        self.since = self.useful_at = self._created_at
        self._handling = 0
        self.serving = 0  # inbound streams that are a request or a tunnel
        self.address: AnyAddress | None = None  # that we dialed
        self.local_port: int | None = None  # that we dialed from

    @property
    def relayed(self) -> bool:
        """A relay is between us."""
        return self._connection_type is ConnectionType.RELAYED

    @property
    def remote_host(self) -> str:
        """IP address of the other end, "" when it is gone or behind a relay."""
        address = self.muxer.get_remote_address()
        return address[0] if address else ""

    @property
    def busy(self) -> bool:
        """A request or tunnel is open, in either direction; our gossip takes one stream."""
        return self.serving > 0 or self.muxer.outbound_count > 1

    @contextmanager
    def in_use(self, *, at_once: bool = True) -> Iterator[Callable[[], None]]:
        """A request or tunnel of the peer is being served: others are pruned first.

        Not `at_once`: from the first call of what is given. An open stream that asks for nothing protects nobody.
        """
        counted = False

        def begin() -> None:
            nonlocal counted
            self.serving += not counted
            counted = True

        if at_once:
            begin()
        try:
            yield begin
        finally:
            self.serving -= counted

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until either side closes; never raises but for cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                self.muxer.on_stream = partial(self._take_stream, nursery)
                nursery.start_soon(self.muxer.start)
                await self.muxer.event_started.wait()
                self.event_started.set()
                self.swarm.register(self)
                task_status.started()
                await self.muxer.event_closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.event_closed.set()
            if self.muxer.violation is not None:
                self.swarm.on_offence(self, self.muxer.violation)
            self.swarm.remove_conn(self)

    def _take_stream(self, nursery: trio.Nursery, stream: MuxedStream) -> None:
        if self.swarm.open_streams >= self.swarm.limits.streams and self._handling >= _STREAMS_FOR_EACH:
            self.swarm.refused["streams"] += 1
            stream.reset_nowait()
        else:
            self._handling += 1
            self.swarm.open_streams += 1
            nursery.start_soon(self._handle, stream)

    async def _handle(self, stream: MuxedStream) -> None:
        """One inbound stream. Nothing that it does, and no bug of its handler, leaves this task."""
        try:
            with trio.fail_after(self.swarm.limits.negotiation_s):
                protocol = await respond(stream, self.swarm.handlers.__contains__)
            await self.swarm.handlers[protocol](self, stream)
        except Exception as error:  # noqa: BLE001  (the edge of the stream's task)
            log.debug("stream from %s ends: %r", self.muxer.peer_id, error)
            stream.reset_nowait()
            if isinstance(error, BrokenNegotiation | DecodeError):
                self.swarm.on_offence(self, error)
        finally:
            self._handling -= 1
            self.swarm.open_streams -= 1

    async def close(self) -> None:
        """Close politely; `run` does the rest."""
        with trio.CancelScope(shield=True):
            await self.muxer.close()
