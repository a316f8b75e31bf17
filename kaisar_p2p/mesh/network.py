"""The libp2p network of one node: listening, dialing, connections and their streams.

A subclass of the library's Swarm, so that its protocols (identify, ping, relay) work on it; what an untrusted peer
can reach is overridden here, and only here. The library, as of 0.8.1:

* listens with SO_REUSEPORT, so that a second node on the same port silently gets half of the connections → `listen_on`;
* holds an inbound slot until the swarm stops: 250 inbound connections in a life → `_serve_inbound`;
* lets an exception of a stream handler end the process → `Connection._handle`;
* waits 250 ms in every dial and remembers a failed one for 60 s → `dial`;
* leaves a reset connection in `connections` when its close is cancelled → `Connection.run` owns the whole life;
* names its own muxer, whatever the options say → `_Upgrader`.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import trio

from kaisar_p2p.errors import ConfigError, KaisarError, PeerUnreachable, PortUnavailable
from kaisar_p2p.mesh.connection import Connection, StreamHandler, TcpStream
from kaisar_p2p.mesh.discovery.addresses import Address, AnyAddress, CircuitAddress, parse
from kaisar_p2p.mesh.discovery.racing import Race
from kaisar_p2p.mesh.guard.admission import Door, Origin, Visitor, origin_of, relayed_origin
from kaisar_p2p.mesh.guard.pruning import Pruner
from kaisar_p2p.mesh.ids import id_of, key_of
from kaisar_p2p.mesh.limits import MeshLimits, PeerBuckets
from kaisar_p2p.mesh.reach.dialed_back import BACK_PROTOCOL, DialBackTransport, DialedBack
from kaisar_p2p.mesh.transport import tcp as sockets
from kaisar_p2p.mesh.transport.pnet import CheckedStream, PreSharedKeyMismatch, protect, protect_circuit
from kaisar_p2p.mesh.transport.upgrade import Upgrader
from kaisar_p2p.mesh.transport.yamux import Muxer

from libp2p.abc import IMuxedConn  # isort: skip
from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.crypto.keys import KeyPair  # isort: skip
from libp2p.io.abc import ReadWriteCloser  # isort: skip
from libp2p.network.config import ConnectionConfig  # isort: skip
from libp2p.network.connection.raw_connection import RawConnection  # isort: skip
from libp2p.network.connection.swarm_connection import SwarmConn  # isort: skip
from libp2p.network.exceptions import SwarmException  # isort: skip
from libp2p.network.swarm import Swarm  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.peer.peerstore import PeerStore  # isort: skip
from multiaddr import Multiaddr  # isort: skip

log = logging.getLogger(__name__)

_GRACE_S = 0.5
_BANNED_EVERY_S = 10.0  # one handshake from a banned address: others may be behind the same NAT
_TOLD_MISMATCHES = 20  # log entries about other pre-shared keys; a stranger could cause any number
_RETIRED_S = 10.0
_RETIRED_RELAYED_S = 24 * 3600.0  # a tunnel that began before the direct connection goes on; the relay has limits
_ANY_ADDRESS = Multiaddr("/ip4/0.0.0.0/tcp/0")  # the library only logs it


class _Upgrader(Upgrader):
    """What peers may do with a new connection: talk to us, or dial us back."""

    def __init__(self, key_pair: KeyPair, limits: MeshLimits) -> None:
        self.take_secret: Callable[[bytes, str], bool] = lambda _secret, _host: False
        back = DialBackTransport(lambda secret, host: self.take_secret(secret, host))
        super().__init__(key_pair, limits, {BACK_PROTOCOL: back.secure_inbound})


class _NotAdmitted(SwarmException):
    """We have no room for the peer, or it is of another network: nothing that it did wrong."""


class Network(Swarm):
    """Connections of one node. `run_in` gives it the nursery that owns them; they are all gone when that ends."""

    def __init__(self, key_pair: KeyPair, limits: MeshLimits, pre_shared_key: bytes | None = None) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        super().__init__(
            peer_id,
            peerstore,
            _Upgrader(key_pair, limits),
            transports=[],
            connection_config=ConnectionConfig(
                inbound_upgrade_timeout=limits.handshake_s,
                outbound_upgrade_timeout=limits.handshake_s,
                max_connections=sys.maxsize,  # `Pruner` decides, also when we are configured for more than 300
            ),
        )
        self.limits = limits
        self._pre_shared_key = pre_shared_key
        self.bound: tuple[Address, ...] = ()
        self.handlers: dict[str, StreamHandler] = {}
        self.on_connected: Callable[[Connection], None] = lambda _connection: None
        self.on_retired: Callable[[Connection], None] = lambda _connection: None
        self.on_disconnected: Callable[[Connection], None] = lambda _connection: None
        self.is_banned: Callable[[bytes], bool] = lambda _key: False
        self.is_origin_banned: Callable[[Origin], bool] = lambda _origin: False
        self.on_failed_handshake: Callable[[Origin], None] = lambda _origin: None
        self.on_offence: Callable[[Connection, Exception], None] = lambda _connection, _error: None
        self.on_doubtful: Callable[[Connection], None] = lambda _connection: None  # relayed, and nothing comes back
        self.on_own_key: Callable[[str], None] = lambda _host: None
        self.on_key_conflict: Callable[[Connection, Connection], None] = lambda _other, _newest: None
        self.is_foreign: Callable[[bytes], bool] = lambda _key: False  # of another network, as it has said itself
        self.dial_circuit: Callable[[bytes, CircuitAddress], Awaitable[Connection]] = _no_relays
        self.refused: Counter[str] = Counter()
        self._open: dict[bytes, list[Connection]] = {}
        self._outbound: set[Connection] = set()
        self._joining: set[Connection] = set()
        self.open_streams = 0  # inbound ones, of all connections
        self._of_banned = PeerBuckets(1 / _BANNED_EVERY_S, 1)
        self.door = Door(limits)
        self.pruner = Pruner(self, limits, self.door)
        self._dialing: dict[bytes, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    def _init_connection_management(self) -> None:
        """None of the library's: its auto-connector, pruner and tag store. `kaisar_p2p.mesh.discovery` does that."""

    # -- connections --------------------------------------------------------------------------------------------------

    def run_in(self, nursery: trio.Nursery) -> None:
        """Connections live in this nursery, until it is cancelled."""
        self._nursery = nursery
        nursery.start_soon(self.upgrader.keeper.run)  # type: ignore[attr-defined]

    def register(self, connection: Connection) -> None:
        """A connection is ready for streams."""
        if not connection.inbound:
            self._outbound.add(connection)
        self._open.setdefault(connection.key, []).append(connection)
        self.connections.setdefault(connection.muxer.peer_id, []).append(connection)
        self.on_connected(connection)

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        """A connection is over."""
        assert isinstance(swarm_conn, Connection)
        key, peer_id = swarm_conn.key, swarm_conn.muxer.peer_id
        if swarm_conn not in self._open.get(key, ()):
            return
        self._outbound.discard(swarm_conn)
        self._open[key] = [c for c in self._open[key] if c is not swarm_conn]
        self.connections[peer_id] = [c for c in self.connections[peer_id] if c is not swarm_conn]
        if not self._open[key]:
            del self._open[key]
            del self.connections[peer_id]
        self.on_disconnected(swarm_conn)

    def connection_to(self, key: bytes) -> Connection | None:
        """The newest open connection with a peer; a relayed, then a retired one only when there is no other."""
        entries = [connection for connection in self._open.get(key, ()) if connection.muxer.is_established]
        if not entries:
            return None
        usable = [connection for connection in reversed(entries) if not connection.retired]
        direct = next((connection for connection in usable if not connection.relayed), None)
        return direct or (usable[0] if usable else entries[-1])

    async def retire(self, connection: Connection) -> None:
        """Open nothing on this connection any more; close it when the streams it has are over, or after a while."""
        connection.retired = True
        self.on_retired(connection)
        with trio.move_on_after(_GRACE_S):  # the peer may open streams on it until it knows of the other
            await connection.event_closed.wait()
        with trio.move_on_after(_RETIRED_RELAYED_S if connection.relayed else _RETIRED_S):
            await connection.muxer.wait_without_streams()
        await connection.close()

    async def say_goodbye(self) -> None:
        """Let what is queued leave, and close all connections."""
        async with trio.open_nursery() as nursery:
            for entries in list(self._open.values()):
                for connection in entries:
                    nursery.start_soon(connection.muxer.close)

    def credit(self, key: bytes) -> None:
        """This peer has just been of use: a new valid message, an answer."""
        now = trio.current_time()
        for connection in self._open.get(key, ()):
            connection.useful_at = now

    def open_connections(self, *, joining: bool = False) -> list[Connection]:
        """All of them; with `joining` also those that are about to be."""
        found = [connection for entries in self._open.values() for connection in entries]
        return [*found, *(self._joining.difference(found))] if joining and self._joining else found

    def outbound_connections(self) -> list[Connection]:
        """Those that we dialed and go on with, at most one for each peer."""
        return list({c.key: c for c in self._outbound if not c.retired}.values())

    def connections_with(self, key: bytes) -> list[Connection]:
        """All open connections with a peer, oldest first."""
        return list(self._open.get(key, ()))

    def connected_keys(self) -> list[bytes]:
        """Peers that we are connected with."""
        return list(self._open)

    @property
    def connection_count(self) -> int:
        """Open connections."""
        return sum(len(entries) for entries in self._open.values())

    def get_total_connections(self) -> int:
        """Open connections, for the library."""
        return self.connection_count

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> Connection:
        """Start a connection that has been upgraded; called by the library's upgrade."""
        assert isinstance(muxed_conn, Muxer)
        key, now = key_of(muxed_conn.peer_id.to_bytes()), trio.current_time()
        if muxed_conn.peer_id == self.self_id:
            self.on_own_key((muxed_conn.get_remote_address() or ("", 0))[0])
        if key is None or muxed_conn.peer_id == self.self_id or self.is_banned(key) or self.is_foreign(key):
            self.refused["peer"] += 1
            kind = _NotAdmitted if key is not None and self.is_foreign(key) else SwarmException
            raise kind(f"not connecting with {muxed_conn.peer_id}: ourselves, unwanted or no ed25519 key")
        connection = Connection(muxed_conn, self, inbound=direction == "inbound", key=key)
        if connection.relayed:
            muxed_conn.be_impatient(lambda: self.on_doubtful(connection))
        if not self.pruner.room_for_key(key, now):
            self.refused["key"] += 1
            raise _NotAdmitted("enough connections with this key")
        if not self.pruner.make_room(connection, now):
            self.refused["connections"] += 1
            raise _NotAdmitted("no connection left")
        assert self._nursery is not None
        self._joining.add(connection)
        try:
            await self._nursery.start(connection.run)
        finally:
            self._joining.discard(connection)
        return connection

    # -- listening ----------------------------------------------------------------------------------------------------

    async def listen_on(self, multiaddrs: Iterable[str]) -> None:
        """Bind and accept; raises PortUnavailable, or ConfigError for what is not ``/ip4/…/tcp/…``."""
        assert self._nursery is not None
        listeners: list[trio.SocketListener] = []
        try:
            for text in multiaddrs:
                listeners += await _bind(text)
        except BaseException:
            for listener in listeners:
                await listener.aclose()
            raise
        self.bound = tuple(_bound_address(listener) for listener in listeners)
        if listeners:
            self._nursery.start_soon(partial(trio.serve_listeners, self._serve_inbound, listeners))

    async def _serve_inbound(self, stream: trio.SocketStream) -> None:
        """One accepted connection, from its first byte to its end."""
        tcp = TcpStream(stream)
        origin, now = origin_of((tcp.get_remote_address() or ("", 0))[0]), trio.current_time()
        reason = self._refusal(origin, now)
        if reason is not None:
            self.refused[reason] += 1
            await stream.aclose()
            return
        sockets.notice_loss(stream.socket, 2.5 * self.limits.keepalive_s)
        with trio.CancelScope() as scope:
            visitor = self.door.enter(origin, now, scope.cancel)
            try:
                muxer = await self._upgrade_inbound(RawConnection(tcp, False), visitor)
                if muxer is not None:
                    await muxer.event_closed.wait()
            finally:
                self.door.leave(visitor)
                await trio.aclose_forcefully(stream)

    def _refusal(self, origin: Origin, now: float) -> str | None:
        if self.is_origin_banned(origin) and not self._of_banned.try_take(origin.account.encode(), now):
            return "banned address"
        reason = self.door.refusal(origin, now)
        if reason is None and not self.pruner.has_room_for_inbound(origin, now):
            reason = "connections"
        return reason

    async def _upgrade_inbound(self, raw: RawConnection, visitor: Visitor) -> Muxer | None:
        try:
            with trio.fail_after(self.limits.handshake_s):
                await self._admit_to_private_swarm(raw)
                muxer = await self.upgrade_inbound_raw_conn(raw, _ANY_ADDRESS)
            assert isinstance(muxer, Muxer)
            return muxer
        except DialedBack:
            return None
        except Exception as error:  # noqa: BLE001  (the edge: a handshake made of garbage can raise anything)
            self._note_failed_handshake(visitor.origin, error)
            return None
        finally:
            self.door.authenticated(visitor)

    async def _admit_to_private_swarm(self, raw: RawConnection) -> None:
        if self._pre_shared_key is None:
            return
        if isinstance(raw.stream, TcpStream):
            raw.stream = await protect(raw.stream, self._pre_shared_key)
        else:
            raw.stream = await protect_circuit(raw.stream, self._pre_shared_key)

    def _note_failed_handshake(self, origin: Origin, error: Exception) -> None:
        reason = _root(error)
        if isinstance(reason, _NotAdmitted):  # counted where it was refused
            return
        if isinstance(reason, PreSharedKeyMismatch):  # somebody's mistake, or a stranger: both are kept out, no more
            self.refused["pre-shared key"] += 1
            level = logging.INFO if self.refused["pre-shared key"] <= _TOLD_MISMATCHES else logging.DEBUG
            log.log(level, "not connecting with %s: %s", origin.account, reason.message)
            return
        self.refused["handshake"] += 1
        self.on_failed_handshake(origin)
        log.debug("inbound handshake with %s failed: %r", origin.account, error)

    # -- dialing ------------------------------------------------------------------------------------------------------

    async def dial(
        self, key: bytes, addresses: Iterable[AnyAddress], *, instead_of: Connection | None = None
    ) -> Connection:
        """The open connection with a peer, or a new one to the first of its addresses that answers as that peer.

        Raises PeerUnreachable. Concurrent dials of one peer share one attempt. `instead_of` is a connection that does
        not count.
        """
        while True:
            connection = self.connection_to(key)
            if connection is not None and connection is not instead_of:
                return connection
            ongoing = self._dialing.get(key)
            if ongoing is None:
                break
            await ongoing.wait()
        self._dialing[key] = done = trio.Event()
        try:
            return await self._dial_each(key, tuple(addresses))
        finally:
            del self._dialing[key]
            done.set()

    async def dial_direct(self, key: bytes, addresses: Iterable[Address]) -> Connection:
        """A new direct connection, whatever there is already; raises PeerUnreachable."""
        return await self._dial_each(key, tuple(addresses))

    async def _dial_each(self, key: bytes, addresses: tuple[AnyAddress, ...]) -> Connection:
        if self.is_banned(key):
            raise PeerUnreachable(
                f"peer {key.hex()[:12]} is banned for misbehaviour", hint="a ban ends by itself, the longer the later"
            )
        race = Race([partial(self._dial_address, key, address) for address in addresses], self.limits.dial_s)
        connection = await race.winner()
        if connection is not None:
            return connection
        causes = [f"{addresses[number]}: {_cause(error)}" for number, error in race.errors]
        raise PeerUnreachable(
            f"peer {key.hex()[:12]} cannot be reached at " + ("; ".join(causes) if causes else "any known address"),
            hint="is it running, and do the networks let you through?",
        )

    async def _dial_address(self, key: bytes, address: AnyAddress) -> Connection:
        if isinstance(address, CircuitAddress):
            return await self.dial_circuit(key, address)
        tcp = await self.open_raw(address)
        connection = await self.upgrade_dialed(tcp, key)
        connection.address = address
        return connection

    async def open_raw(self, address: Address, *, fresh_port: bool = False) -> TcpStream:
        """A TCP connection before any handshake, as the other end's listener expects it, inside the private swarm if
        there is one. Raises OSError, or PreSharedKeyMismatch, which is a ConnectionClosedError, here or on reading.

        Towards public addresses it leaves from a port that we listen on, unless it is to be a fresh one.
        """
        source = None if fresh_port else sockets.dialing_source(address, self.bound)
        stream = await sockets.connect(address, source)
        sockets.notice_loss(stream.socket, 2.5 * self.limits.keepalive_s)
        if self._pre_shared_key is None:
            return CheckedStream(stream)
        try:
            return await protect(TcpStream(stream), self._pre_shared_key, self.limits.private_hello_s)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    async def upgrade_dialed(self, tcp: TcpStream, key: bytes, *, initiator: bool = True) -> Connection:
        """Authenticate a TCP connection that we dialed; with `initiator` False the peer starts the handshakes.

        The latter for a simultaneous open (https://github.com/libp2p/specs/blob/master/relay/DCUtR.md). Raises
        whatever the library makes of a failed handshake, and closes the stream then.
        """
        try:
            if initiator:
                connection = await self.upgrade_outbound_raw_conn(RawConnection(tcp, True), id_of(key))
            else:
                connection = await self._upgrade_as_responder(RawConnection(tcp, False), key)
        except BaseException:
            await trio.aclose_forcefully(tcp.stream)
            raise
        assert isinstance(connection, Connection)
        connection.local_port = tcp.local_port
        return connection

    async def _upgrade_as_responder(self, raw: RawConnection, key: bytes) -> Connection:
        muxer = await self.upgrade_inbound_raw_conn(raw, _ANY_ADDRESS)
        assert isinstance(muxer, Muxer)
        connection = next((c for c in self.connections_with(key) if c.muxer is muxer), None)
        if connection is None:
            muxer.abort()
            raise SwarmException("somebody else answered")
        return connection

    # -- over a relay -------------------------------------------------------------------------------------------------

    async def upgrade_outbound_stream(self, raw: ReadWriteCloser, key: bytes) -> Connection:
        """Authenticate and multiplex a stream of a relay that leads to a peer; raises what a failed handshake does."""
        if self._pre_shared_key is not None:
            raw = await protect_circuit(raw, self._pre_shared_key)
        relayed = RawConnection(raw, True, ConnectionType.RELAYED, [])
        connection = await self.upgrade_outbound_raw_conn(relayed, id_of(key))
        assert isinstance(connection, Connection)
        return connection

    async def upgrade_inbound_stream(self, raw: ReadWriteCloser, relay: bytes, source: bytes) -> Muxer | None:
        """As `upgrade_outbound_stream`, for a stream that a relay brought us; None when the handshake fails.

        `source` is whom the relay names. What goes wrong is held against that key there, not all behind the relay.
        """
        origin, now = relayed_origin(source, relay), trio.current_time()
        reason = self._refusal(origin, now)
        if reason is not None:
            self.refused[reason] += 1
            return None
        muxer = None
        with trio.CancelScope() as scope:
            visitor = self.door.enter(origin, now, scope.cancel)
            try:
                muxer = await self._upgrade_inbound(RawConnection(raw, False, ConnectionType.RELAYED, []), visitor)
            finally:
                if muxer is None:
                    self.door.leave(visitor)
        if muxer is not None:
            assert self._nursery is not None
            self._nursery.start_soon(self._leave_with, muxer, visitor)
        return muxer

    async def _leave_with(self, muxer: Muxer, visitor: Visitor) -> None:
        """Count a relayed connection, as one of its relay, until it ends."""
        for connection in self.open_connections():
            if connection.muxer is muxer:
                connection.origin = visitor.origin
        try:
            await muxer.event_closed.wait()
        finally:
            self.door.leave(visitor)


async def _no_relays(_key: bytes, address: CircuitAddress) -> Connection:
    raise PeerUnreachable(f"no relays are used: {address}")


def _root(error: BaseException) -> BaseException:
    """The reason at the bottom of wrapped errors."""
    while True:
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
        if inner is None:
            return error
        error = inner


def _cause(error: BaseException) -> str:
    """The reason at the bottom of wrapped errors, for people."""
    error = _root(error)
    if isinstance(error, KaisarError):
        return error.message
    if isinstance(error, trio.TooSlowError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):  # its numbers are not the system's
        return f"the name is not known: {error.strerror}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__} {error}".strip()


async def _bind(text: str) -> list[trio.SocketListener]:
    try:
        address, _ = parse(text)
    except ValueError as error:
        raise ConfigError(f"cannot listen on {text!r}: {error}", hint="/ip4/<address>/tcp/<port>") from None
    try:
        return await sockets.listen(address)
    except OSError as error:
        ours = error.errno != errno.EADDRNOTAVAIL
        hint = "stop what uses it, or choose another" if ours else "this machine does not have it: choose another"
        raise PortUnavailable(
            f"cannot listen on {address.host} port {address.port}: {error.strerror or error}",
            hint=f"{hint} address with --listen",
        ) from None


def _bound_address(listener: trio.SocketListener) -> Address:
    host, port = listener.socket.getsockname()[:2]
    return Address("ip6" if ":" in host else "ip4", host, port)
