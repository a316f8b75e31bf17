"""Being reachable through relays, and reaching others: the client's sides of circuit relay v2.

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md. A node that cannot be dialed keeps reservations at a
few of the peers it is connected with, those that it must stay connected with first. Who relays is found by asking;
whoever refuses is asked again later and later. A relay that is gone is replaced at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import trio

from kaisar_p2p.errors import PeerUnreachable, RequestFailed
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import Address, CircuitAddress, local_addresses
from kaisar_p2p.mesh.ids import id_bytes_of, key_of
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.protobuf import MalformedMessage
from kaisar_p2p.mesh.reach.circuit_wire import (
    HOP,
    STOP,
    HopMessage,
    HopType,
    Status,
    StopMessage,
    StopType,
    addresses_of,
    receive,
    send,
)
from kaisar_p2p.mesh.reach.relay_stream import RelayedStream
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError  # isort: skip

log = logging.getLogger(__name__)

_ASK_S = 5.0
_ADDRESSES_PER_RELAY = 2
_LIFETIME_S = (60.0, 24 * 3600.0)  # whatever a relay's clock says
_REFRESH_AT = 0.75  # of the lifetime
_ASK_AGAIN_S, _ASK_AGAIN_MAX_S = 2.0, 300.0
_IDLE_S = 60.0


@dataclass(frozen=True)
class _Held:
    """A reservation of ours. `refresh` is trio time."""

    connection: Connection
    addresses: tuple[CircuitAddress, ...]
    refresh: float


@dataclass
class _Refused:
    """A peer that gave us no reservation; ask again at `retry` (trio time)."""

    times: int = 0
    retry: float = 0.0


class RelayClient:
    """Keeps reservations while `wanted`, dials through relays, accepts what they bring. `run` is its life."""

    def __init__(
        self,
        network: Network,
        *,
        preferred: Callable[[], Iterable[bytes]],
        connect: Callable[[bytes], Awaitable[Connection]],
        allow_private: bool | None,
        rng: random.Random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.on_changed: Callable[[], None] = lambda: None  # `addresses` are others
        self._network = network
        self._preferred, self._connect = preferred, connect
        self._allow_private = allow_private
        self._rng = rng
        self._wall_clock = wall_clock
        self._wanted = False
        self._held: dict[bytes, _Held] = {}
        self._asking: set[bytes] = set()  # a circuit may come before we have read that we have a slot
        self._refused: dict[bytes, _Refused] = {}
        self._woken = trio.Event()
        network.handlers[STOP] = self._accept
        network.dial_circuit = self.dial

    @property
    def addresses(self) -> tuple[CircuitAddress, ...]:
        """Where relays take connections for us."""
        return tuple(address for held in self._held.values() for address in held.addresses)

    @property
    def relays(self) -> tuple[bytes, ...]:
        """Peers that we hold a reservation at."""
        return tuple(self._held)

    def want(self, wanted: bool) -> None:
        """Keep reservations, or let them run out."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._refused.clear()
            self.wake()

    def wake(self) -> None:
        """Connections came or went: look again who relays."""
        self._woken.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep as many reservations as wanted."""
        task_status.started()
        while True:
            self._woken = trio.Event()
            before = self.addresses
            self._forget_ended()
            if self._wanted:
                await self._look_after()
            if self.addresses != before:
                self.on_changed()
            with trio.move_on_after(self._pause_s()):
                await self._woken.wait()

    # -- reservations -------------------------------------------------------------------------------------------------

    def _forget_ended(self) -> None:
        """Without their connection reservations are void."""
        for key, held in list(self._held.items()):
            if held.connection.event_closed.is_set() or not self._wanted:
                del self._held[key]
        now, connected = trio.current_time(), set(self._network.connected_keys())
        self._refused = {key: r for key, r in self._refused.items() if key in connected or r.retry > now}

    async def _look_after(self) -> None:
        """Ask relays: ours whose reservation grows old, and new ones for those that are missing."""
        now = trio.current_time()
        old = [held.connection for held in self._held.values() if held.refresh <= now]
        missing = max(0, self._network.limits.relays - len(self._held))
        new = self._candidates(now)[:missing]
        async with trio.open_nursery() as nursery:
            for connection in old + new:
                nursery.start_soon(self._ask, connection)
            for key in self._absent(now)[: missing - len(new)]:
                nursery.start_soon(self._approach, key)

    def _absent(self, now: float) -> list[bytes]:
        """Peers said to relay that we are not connected with."""
        keys = [key for key in self._preferred() if self._may_ask(key, now) and not self._network.connection_to(key)]
        self._rng.shuffle(keys)
        return keys

    def _may_ask(self, key: bytes, now: float) -> bool:
        return key not in self._held and self._refused.get(key, _Refused()).retry <= now

    def _candidates(self, now: float) -> list[Connection]:
        preferred = list(self._preferred())
        others = [key for key in self._network.connected_keys() if key not in preferred]
        self._rng.shuffle(others)
        return [
            connection
            for key in preferred + others
            if self._may_ask(key, now)
            for connection in (self._network.connection_to(key),)
            if connection is not None and self._may_relay(connection)
        ]

    def _may_relay(self, connection: Connection) -> bool:
        if connection.relayed or connection.retired:
            return False
        host = connection.remote_host
        return host != "" and self._is_usable(Address("ip6" if ":" in host else "ip4", host, 1))

    async def _approach(self, key: bytes) -> None:
        try:
            with trio.fail_after(_ASK_S):
                await self._connect(key)
        except (PeerUnreachable, trio.TooSlowError) as error:
            self._note_refusal(key, error)

    def _note_refusal(self, key: bytes, error: Exception) -> None:
        log.debug("no reservation at %s: %s", key.hex()[:12], error)
        self._held.pop(key, None)
        refused = self._refused.setdefault(key, _Refused())
        delay_s = min(_ASK_AGAIN_S * 2**refused.times, _ASK_AGAIN_MAX_S) * self._rng.uniform(0.75, 1.25)
        refused.times = min(refused.times + 1, 16)
        refused.retry = trio.current_time() + delay_s
        self.wake()  # there may be somebody else

    async def _ask(self, connection: Connection) -> None:
        key = connection.key
        self._asking.add(key)
        try:
            held = await self._reserve(connection)
        except (RequestFailed, MuxedStreamError, MuxedConnUnavailable, trio.TooSlowError) as error:
            self._note_refusal(key, error)
        else:
            if key not in self._held:
                log.info("reachable through the relay %s at %s", key.hex()[:12], held.addresses[0].through)
            self._held[key] = held
            self._refused.pop(key, None)
        finally:
            self._asking.discard(key)

    async def _reserve(self, connection: Connection) -> _Held:
        answer = await self._hop(connection, HopMessage(HopType.RESERVE))
        reservation = answer.reservation
        if reservation is None:
            raise MalformedMessage("a reservation without its terms")
        addresses = self._addresses_at(connection, reservation.addresses)
        if not addresses:
            raise RequestFailed("the relay tells no address that others could dial")
        shortest_s, longest_s = _LIFETIME_S
        lifetime_s = min(max(reservation.expires_at - self._wall_clock(), shortest_s), longest_s)
        return _Held(connection, addresses, trio.current_time() + _REFRESH_AT * lifetime_s)

    def _addresses_at(self, connection: Connection, told: tuple[bytes, ...]) -> tuple[CircuitAddress, ...]:
        """Where others dial the relay: what it says, else where we dialed it."""
        found = [address for address, key in addresses_of(told) if key in (None, connection.key)]
        usable = [a for a in found if isinstance(a, Address) and self._is_usable(a)]
        if not usable and isinstance(connection.address, Address):
            usable = [connection.address]
        return tuple(CircuitAddress(connection.key, a) for a in dict.fromkeys(usable))[:_ADDRESSES_PER_RELAY]

    def _is_usable(self, address: Address) -> bool:
        allowed = self._allow_private
        if allowed is None:  # in a network without public addresses others are as private as we are
            allowed = all(own.is_private for own in local_addresses(self._network.bound))
        return address.is_dialable and (allowed or not address.is_private)

    async def _hop(self, connection: Connection, message: HopMessage) -> HopMessage:
        """Ask something that ends with the answer."""
        stream = connection.muxer.open_stream_nowait()
        try:
            with trio.fail_after(_ASK_S):
                answer = await _ask_hop(stream, message)
                await stream.close()
                return answer
        except BaseException:
            stream.reset_nowait()
            raise

    def _pause_s(self) -> float:
        if not self._wanted:
            return _IDLE_S
        due = [held.refresh for held in self._held.values()]
        if len(self._held) < self._network.limits.relays:
            due += [refused.retry for refused in self._refused.values()]
        return min(max(min(due, default=_IDLE_S) - trio.current_time(), 0.05), _IDLE_S)

    # -- circuits -----------------------------------------------------------------------------------------------------

    async def dial(self, key: bytes, address: CircuitAddress) -> Connection:
        """A connection with a peer through a relay, authenticated end to end; raises PeerUnreachable."""
        if address.relay == key:
            raise PeerUnreachable("a relay is not behind itself")
        relay = await self._network.dial(address.relay, (address.through,))
        if relay.relayed:
            raise PeerUnreachable("the relay is behind a relay itself")
        stream = relay.muxer.open_stream_nowait()
        try:
            await _ask_hop(stream, HopMessage(HopType.CONNECT, peer=id_bytes_of(key)))
            connection = await self._network.upgrade_outbound_stream(RelayedStream(stream), key)
        except (RequestFailed, MuxedStreamError) as error:
            stream.reset_nowait()
            raise PeerUnreachable(f"through the relay {address.relay.hex()[:12]}: {error}") from None
        except BaseException:
            stream.reset_nowait()
            raise
        connection.address = address
        return connection

    async def _accept(self, relay: Connection, stream: MuxedStream) -> None:
        """A relay brings a connection; serve it like any other until it ends."""
        try:
            with trio.fail_after(self._network.limits.negotiation_s):
                message = StopMessage.decode(await receive(stream))
                status, source = self._judge(relay, message)
                await send(stream, StopMessage(StopType.STATUS, status=status))
        except MalformedMessage:
            await send(stream, StopMessage(StopType.STATUS, status=Status.MALFORMED_MESSAGE))
            await stream.close()
            return
        if source is None:
            await stream.close()
            return
        try:
            muxer = await self._network.upgrade_inbound_stream(RelayedStream(stream), relay.key, source)
            if muxer is None:
                return
            if key_of(muxer.peer_id.to_bytes()) != source:
                muxer.abort()  # the relay named somebody else
            with relay.in_use():
                await muxer.event_closed.wait()
        finally:
            stream.reset_nowait()

    def _judge(self, relay: Connection, message: StopMessage) -> tuple[Status, bytes | None]:
        """The answer, and who comes if that is yes."""
        if message.type != StopType.CONNECT:
            return Status.UNEXPECTED_MESSAGE, None
        source = key_of(message.peer) if message.peer is not None else None
        if source is None:
            return Status.MALFORMED_MESSAGE, None
        ours = relay.key in self._held or relay.key in self._asking
        if relay.relayed or not ours or self._network.is_banned(source):
            return Status.PERMISSION_DENIED, None
        return Status.OK, source


async def _ask_hop(stream: MuxedStream, message: HopMessage) -> HopMessage:
    """Ask a relay; raises RequestFailed for any status but OK."""
    await stream.write(proposal(HOP))
    await confirm(stream, HOP)
    await send(stream, message)
    answer = HopMessage.decode(await receive(stream))
    if answer.type != HopType.STATUS or answer.status is None:
        raise MalformedMessage("the relay does not answer with a status")
    if answer.status != Status.OK:
        known = answer.status in Status._value2member_map_
        name = Status(answer.status).name.lower().replace("_", " ") if known else str(answer.status)
        raise RequestFailed(f"the relay says: {name}")
    return answer
