"""Carrying connections for peers that cannot be dialed: the relay's side of circuit relay v2.

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md. A peer reserves a slot and stays connected; others
ask for a circuit to it. We see Noise ciphertext only. Reservations are for direct connections, circuits end at peers
that hold one, and nothing is dialed for anybody.

Who may send how much: a circuit between two members has the limits `relay_member_s` and `relay_member_bytes`, any
other circuit `relay_stranger_s` and `relay_stranger_bytes`, enough to punch a hole or to talk, not for bulk; with no
such bytes there is no such circuit. A member is whom `is_member` says (the node: workers with a bond), or, without
that, whoever holds a reservation here. Circuits of strangers take at most half of the places.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio
from nacl.signing import SigningKey

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.guard.admission import Origin
from kaisar_p2p.mesh.ids import id_bytes_of, key_of
from kaisar_p2p.mesh.limits import PeerBuckets, TokenBucket
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.protobuf import MalformedMessage
from kaisar_p2p.mesh.reach.circuit_wire import (
    HOP,
    STOP,
    HopMessage,
    HopType,
    Limit,
    Reservation,
    Status,
    StopMessage,
    StopType,
    binary_of,
    receive,
    send,
    voucher,
)
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError  # isort: skip

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 * 1024
_ADDRESSES = 8  # told in a reservation
_SHARE_OF_AN_ADDRESS = 4  # of all circuits
_SUBNET_SHARE = 4  # a subnet may hold so many times what one address may


@dataclass(frozen=True)
class RelayStatistics:
    """What the relay carries now, and since the start; `refused` by reason."""

    reservations: int
    circuits: int
    circuits_total: int
    relayed_bytes: int
    refused: dict[str, int]


@dataclass(frozen=True)
class _Slot:
    host: str
    expires: float  # trio time


class _Refusal(Exception):
    """Why a request is refused; the peer gets the status."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Relay:
    """Serves `hop` between `start` and `stop`."""

    def __init__(
        self,
        network: Network,
        signing_key: SigningKey,
        addresses: Callable[[], tuple[str, ...]],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.is_member: Callable[[bytes], bool] = self.has_reservation
        self._network = network
        self._signing_key = signing_key
        self._addresses = addresses
        self._wall_clock = wall_clock
        self._limits = network.limits
        self._slots: dict[bytes, _Slot] = {}
        self._ends: Counter[bytes] = Counter()  # circuits by peer, at either end
        self._comers: Counter[tuple[str, bytes]] = Counter()  # by where their source is, and target; b"": any
        self._circuits = self._strange_circuits = self._circuits_total = self._relayed_bytes = 0
        self._refused: Counter[str] = Counter()
        self._asking = PeerBuckets(self._limits.relay_asks_per_s, max(1.0, 8 * self._limits.relay_asks_per_s))
        self._rate: TokenBucket | None = None

    def start(self) -> None:
        """Offer to relay."""
        self._network.handlers[HOP] = self._serve

    def stop(self) -> None:
        """Offer it no more; circuits that exist go on to their limits."""
        self._network.handlers.pop(HOP, None)
        self._slots.clear()

    @property
    def statistics(self) -> RelayStatistics:
        """What is carried."""
        self._expire()
        return RelayStatistics(
            reservations=len(self._slots),
            circuits=self._circuits,
            circuits_total=self._circuits_total,
            relayed_bytes=self._relayed_bytes,
            refused=dict(self._refused),
        )

    def has_reservation(self, key: bytes) -> bool:
        """The peer holds a slot here."""
        slot = self._slots.get(key)
        return slot is not None and slot.expires > trio.current_time()

    def on_disconnected(self, connection: Connection) -> None:
        """A reservation ends with the last direct connection."""
        if all(other.relayed for other in self._network.connections_with(connection.key)):
            self._slots.pop(connection.key, None)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _serve(self, connection: Connection, stream: MuxedStream) -> None:
        """One stream of `hop`, with its circuit if it becomes one."""
        try:
            with trio.fail_after(self._limits.negotiation_s):
                message = HopMessage.decode(await receive(stream))
            self._check_asker(connection)
            if message.type == HopType.RESERVE:
                await self._reserve(connection, stream)
            elif message.type == HopType.CONNECT:
                await self._connect(connection, stream, message)
            else:
                raise _Refusal(Status.UNEXPECTED_MESSAGE, "unexpected")
        except MalformedMessage:
            await self._refuse(stream, Status.MALFORMED_MESSAGE, "malformed")
        except _Refusal as refusal:
            log.debug("relay: refused %s: %s", connection.key.hex()[:12], refusal.reason)
            await self._refuse(stream, refusal.status, refusal.reason)

    def _check_asker(self, connection: Connection) -> None:
        if connection.relayed:
            raise _Refusal(Status.PERMISSION_DENIED, "asked over a relay")
        if not self._asking.try_take(connection.key, trio.current_time()):
            raise _Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "asks too often")

    async def _refuse(self, stream: MuxedStream, status: Status, reason: str) -> None:
        self._refused[reason] += 1
        with trio.move_on_after(self._limits.negotiation_s):
            await send(stream, HopMessage(HopType.STATUS, status=status))
            await stream.close()

    # -- reservations -------------------------------------------------------------------------------------------------

    async def _reserve(self, connection: Connection, stream: MuxedStream) -> None:
        key = connection.key
        self._expire()
        if key not in self._slots:
            self._check_room_for(connection.remote_host)
        lifetime_s = self._limits.relay_reservation_s
        self._slots[key] = _Slot(connection.remote_host, trio.current_time() + lifetime_s)
        if self._refuses_strangers and not self.is_member(key):
            del self._slots[key]
            raise _Refusal(Status.PERMISSION_DENIED, "strangers")
        expires_at = int(self._wall_clock() + lifetime_s)
        reservation = Reservation(
            expires_at, self._own_addresses(), voucher(self._signing_key, peer=key, expires_at=expires_at)
        )
        answer = HopMessage(HopType.STATUS, reservation=reservation, limit=self._limit(key, key), status=Status.OK)
        await send(stream, answer)
        await stream.close()

    def _own_addresses(self) -> tuple[bytes, ...]:
        return tuple(binary_of(text) for text in self._addresses() if "/p2p-circuit" not in text)[:_ADDRESSES]

    def _check_room_for(self, host: str) -> None:
        if len(self._slots) >= self._limits.relay_reservations:
            raise _Refusal(Status.RESERVATION_REFUSED, "reservations")
        hosts = [slot.host for slot in self._slots.values()]
        most = self._limits.relay_reservations_per_address
        if hosts.count(host) >= most or [*map(_subnet, hosts)].count(_subnet(host)) >= _SUBNET_SHARE * most:
            raise _Refusal(Status.RESERVATION_REFUSED, "reservations of an address")

    def _expire(self) -> None:
        now = trio.current_time()
        for key in [key for key, slot in self._slots.items() if slot.expires <= now]:
            del self._slots[key]

    # -- circuits -----------------------------------------------------------------------------------------------------

    async def _connect(self, source: Connection, stream: MuxedStream, message: HopMessage) -> None:
        target = key_of(message.peer) if message.peer is not None else None
        if target is None or target == source.key:
            raise _Refusal(Status.MALFORMED_MESSAGE, "malformed")
        onward_connection = self._connection_with(target) if self.has_reservation(target) else None
        if onward_connection is None:
            raise _Refusal(Status.NO_RESERVATION, "no reservation")
        limit = self._limit(source.key, target)
        with self._place(source, target), source.in_use():
            onward = await self._open_stop(onward_connection, source.key, limit)
            try:
                await send(stream, HopMessage(HopType.STATUS, limit=limit, status=Status.OK))
                await self._bridge(stream, onward, limit)
            finally:
                stream.reset_nowait()
                onward.reset_nowait()

    def _connection_with(self, key: bytes) -> Connection | None:
        usable = [c for c in self._network.connections_with(key) if not c.relayed]
        return next((c for c in reversed(usable) if not c.retired), usable[-1] if usable else None)

    @property
    def _refuses_strangers(self) -> bool:
        return not self._limits.relay_stranger_bytes  # on the wire, 0 would say that there is no limit

    def _are_members(self, source: bytes, target: bytes) -> bool:
        return self.is_member(source) and self.is_member(target)

    def _limit(self, source: bytes, target: bytes) -> Limit:
        limits = self._limits
        if self._are_members(source, target):
            return Limit(math.ceil(limits.relay_member_s), limits.relay_member_bytes)
        return Limit(math.ceil(limits.relay_stranger_s), limits.relay_stranger_bytes)

    @contextmanager
    def _place(self, comer: Connection, target: bytes) -> Iterator[None]:
        """One circuit's place; raises _Refusal when there is none."""
        source = comer.key
        strange = not self._are_members(source, target)
        if strange and self._refuses_strangers:
            raise _Refusal(Status.PERMISSION_DENIED, "strangers")
        most = self._limits.relay_circuits
        if self._circuits >= most or (strange and self._strange_circuits >= max(1, most // 2)):
            raise _Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "circuits")
        if max(self._ends[source], self._ends[target]) >= self._limits.relay_circuits_per_peer:
            raise _Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "circuits of a peer")
        account = comer.origin.account
        from_there = [(account, b""), (account, target)]
        if not self._may_come(comer.origin, target):
            raise _Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "circuits of an address")
        self._circuits += 1
        self._strange_circuits += strange
        self._ends.update((source, target))
        self._comers.update(from_there)
        try:
            yield
        finally:
            self._circuits -= 1
            self._strange_circuits -= strange
            self._ends -= Counter((source, target))  # forgets peers with none
            self._comers -= Counter(from_there)

    def _may_come(self, origin: Origin, target: bytes) -> bool:
        """However many keys are at an address, it has a quarter of the places, and half of those of a target."""
        if origin.private and self._limits.private_factor > 1:
            return True
        here, there = self._comers[origin.account, b""], self._comers[origin.account, target]
        of_target = max(1, self._limits.relay_circuits_per_peer // 2)
        return here < max(1, self._limits.relay_circuits // _SHARE_OF_AN_ADDRESS) and there < of_target

    async def _open_stop(self, target: Connection, source: bytes, limit: Limit) -> MuxedStream:
        try:
            stream = target.muxer.open_stream_nowait()
        except MuxedConnUnavailable:
            raise _Refusal(Status.CONNECTION_FAILED, "target") from None
        try:
            with trio.fail_after(self._limits.negotiation_s / 2):
                await stream.write(proposal(STOP))
                await confirm(stream, STOP)
                await send(stream, StopMessage(StopType.CONNECT, peer=id_bytes_of(source), limit=limit))
                answer = StopMessage.decode(await receive(stream))
            if answer.type != StopType.STATUS or answer.status != Status.OK:
                raise RequestFailed(f"the peer answers {answer.status}")
        except (RequestFailed, MuxedStreamError, trio.TooSlowError) as error:
            stream.reset_nowait()
            log.debug("relay: %s takes no circuit: %s", target.key.hex()[:12], error)
            raise _Refusal(Status.CONNECTION_FAILED, "target") from None
        except BaseException:
            stream.reset_nowait()
            raise
        self._circuits_total += 1
        return stream

    async def _bridge(self, one: MuxedStream, other: MuxedStream, limit: Limit) -> None:
        """Copy in both directions until both have ended, or the limit is reached."""
        with trio.move_on_after(limit.duration_s or math.inf) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, one, other, limit, nursery.cancel_scope)
                nursery.start_soon(self._copy, other, one, limit, nursery.cancel_scope)
        if scope.cancelled_caught:
            self._refused["duration"] += 1

    async def _copy(self, source: MuxedStream, sink: MuxedStream, limit: Limit, circuit: trio.CancelScope) -> None:
        """One direction. Holds one chunk: a sink that does not read stops us reading, and the source's window ends."""
        copied = 0
        try:
            while True:
                data = await source.read(_CHUNK_BYTES)
                copied += len(data)
                if limit.data_bytes and copied > limit.data_bytes:
                    self._refused["data"] += 1
                    break
                await self._pace(len(data))
                await sink.write(data)
                self._relayed_bytes += len(data)
        except MuxedStreamEOF:
            await sink.close_write()
            return
        except MuxedStreamError as error:
            log.debug("relay: a circuit broke: %r", error)
        circuit.cancel()

    async def _pace(self, size: int) -> None:
        """Keep all circuits together below the rate."""
        now = trio.current_time()
        if self._rate is None:
            self._rate = TokenBucket(self._limits.relay_bytes_per_s, self._limits.relay_bytes_per_s, now)
        wait_s = self._rate.take(size, now)
        if wait_s > 0:
            await trio.sleep(wait_s)


def _subnet(host: str) -> str:
    """What one customer of a provider usually has: a /24, or a /56 of IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 56), strict=False))
