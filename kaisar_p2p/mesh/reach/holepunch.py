"""From a relayed connection to a direct one: dialing back, else punching a hole.

https://github.com/libp2p/specs/blob/master/relay/DCUtR.md. Whoever received the relayed connection (B) leads: it dials
the public addresses of the other (A); failing that both tell how others see their listening ports, and dial each
other from those at the same moment, so that each NAT takes what comes in for an answer. A starts the handshakes.
The direct connection takes over; streams that have begun on the relayed one go on there, for a day at most. What
failed is tried again while the relayed connection lasts: after 15 s, 1, 5 and every 30 minutes, and when our addresses
or the peer's change.

What a peer can make us do: dial four public addresses, `punches_per_s`, eight times at once; all peers together,
twenty times that. Private addresses are never dialed, so that nobody leads us to services of our own network.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import trio

from kaisar_p2p.errors import PeerUnreachable, RequestFailed
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import Address, AnyAddress
from kaisar_p2p.mesh.limits import PeerBuckets
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.protobuf import MalformedMessage
from kaisar_p2p.mesh.reach.circuit_wire import (
    DCUTR,
    PunchMessage,
    PunchType,
    binary_of,
    direct_addresses_of,
    receive,
    send,
)
from kaisar_p2p.mesh.reach.identify_client import Identity, identify
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError  # isort: skip

log = logging.getLogger(__name__)

_TRIES = 3
_ADDRESSES = 4  # dialed at a time, told
_WITNESSES = 3  # peers asked how they see us
_ROUND_S = 10.0  # of waiting for the other's messages
_PUNCH_S = 4.0  # one simultaneous dial
_AT_ONCE = 8  # peers
_BURST = 8.0  # rounds of dialing that a peer can cause at once
_AGAIN_S = (15.0, 60.0, 300.0, 1800.0)  # after a failure; the last one again and again

_FAILURES = (RequestFailed, PeerUnreachable, MuxedStreamError, MuxedConnUnavailable, trio.TooSlowError)


@dataclass(frozen=True)
class _Waiting:
    """For another attempt; `told` are the peer's addresses that the last one knew."""

    woken: trio.Event
    told: frozenset[Address]


class HolePunch:
    """Upgrades relayed connections. `run` is its life.

    `known` are the addresses of a peer, `confirmed` our own at which others have reached us.
    """

    def __init__(
        self,
        network: Network,
        *,
        known: Callable[[bytes], Iterable[AnyAddress]],
        confirmed: Callable[[], Iterable[Address]],
        rng: random.Random,
    ) -> None:
        self._network = network
        self._known, self._confirmed, self._rng = known, confirmed, rng
        self._waiting: dict[Connection, _Waiting] = {}
        self._own = bytes(network.get_peer_id().to_bytes()[6:])
        self._upgrading: set[bytes] = set()  # where we lead
        self._following: set[bytes] = set()
        self._identities: WeakKeyDictionary[Connection, Identity] = WeakKeyDictionary()
        rate = network.limits.punches_per_s
        self._of_peer = PeerBuckets(rate, max(_BURST, 4 * rate))  # an upgrade takes four: dialing back, three tries
        self._of_all = PeerBuckets(20 * rate, max(4 * _BURST, 40 * rate), peers=1)
        self._nursery: trio.Nursery | None = None
        network.handlers[DCUTR] = self._follow

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The tasks of all upgrades."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def on_connected(self, connection: Connection) -> None:
        """A direct connection takes over from relayed ones; an inbound relayed one is to be upgraded."""
        if self._nursery is None:  # we listen already, but do not run yet
            return
        if not connection.relayed:
            for other in self._network.connections_with(connection.key):
                if other.relayed and not other.retired:
                    self._nursery.start_soon(self._network.retire, other)
        elif connection.inbound:
            self._nursery.start_soon(self._lead, connection)

    def on_disconnected(self, connection: Connection) -> None:
        """Nothing is left to upgrade."""
        self._wake(connection)

    def on_addresses_changed(self) -> None:
        """Others may reach us now, or we them."""
        for connection in list(self._waiting):
            self._wake(connection)

    def on_told(self, connection: Connection) -> None:
        """A peer has said where it is: try again if that is somewhere else."""
        waiting = self._waiting.get(connection)
        if waiting is not None and not self._told(connection.key) <= waiting.told:
            self._wake(connection)

    def _wake(self, connection: Connection) -> None:
        waiting = self._waiting.pop(connection, None)
        if waiting is not None:
            waiting.woken.set()

    def _told(self, key: bytes) -> frozenset[Address]:
        return frozenset(self._acceptable(a for a in self._known(key) if isinstance(a, Address)))

    def _may_upgrade(self, key: bytes) -> bool:
        return len(self._upgrading) < _AT_ONCE and key not in self._upgrading and self._may_dial(key)

    def _may_dial(self, key: bytes) -> bool:
        """Within what this peer, and all together, can make us do."""
        now = trio.current_time()
        return self._of_peer.try_take(key, now) and self._of_all.try_take(b"", now)

    def _has_direct(self, key: bytes) -> bool:
        return any(not connection.relayed for connection in self._network.connections_with(key))

    # -- leading ------------------------------------------------------------------------------------------------------

    async def _lead(self, connection: Connection) -> None:
        """Try for as long as the connection is all there is between us."""
        failures = 0
        while not self._is_over(connection):
            told = self._told(connection.key)
            if self._may_upgrade(connection.key):
                await self._upgrade(connection)
            if self._is_over(connection):
                return
            delay_s = _AGAIN_S[min(failures, len(_AGAIN_S) - 1)] * self._rng.uniform(0.8, 1.2)
            failures = 0 if await self._woken(connection, told, delay_s) else failures + 1

    def _is_over(self, connection: Connection) -> bool:
        return connection.event_closed.is_set() or connection.retired or self._has_direct(connection.key)

    async def _woken(self, connection: Connection, told: frozenset[Address], delay_s: float) -> bool:
        """Wait; whether something has changed before the time was over."""
        self._waiting[connection] = waiting = _Waiting(trio.Event(), told)
        with trio.move_on_after(delay_s):
            await waiting.woken.wait()
        self._waiting.pop(connection, None)
        return waiting.woken.is_set()

    async def _upgrade(self, connection: Connection) -> None:
        key = connection.key
        self._upgrading.add(key)
        try:
            if not await self._dial_back(connection):
                await self._punch_as_leader(connection)
        except _FAILURES as error:
            log.debug("%s stays behind a relay: %s", key.hex()[:12], error)
        finally:
            self._upgrading.discard(key)

    async def _dial_back(self, connection: Connection) -> bool:
        """Dial the other's public addresses; whether there is a direct connection now."""
        if self._has_direct(connection.key):
            return True
        addresses = self._acceptable((await identify(connection)).listening)
        return bool(addresses) and await self._dial_at_once(connection.key, addresses, initiator=True)

    async def _punch_as_leader(self, connection: Connection) -> None:
        for _ in range(_TRIES):
            if not self._may_dial(connection.key):
                raise PeerUnreachable("enough was dialed for this peer")
            addresses, rtt_s = await self._arrange(connection)
            await trio.sleep(rtt_s / 2)  # the signal is on its way
            if await self._dial_at_once(connection.key, addresses, initiator=False):
                log.info("a direct connection with %s through both NATs", connection.key.hex()[:12])
                return
        raise PeerUnreachable("no hole could be punched")

    async def _arrange(self, connection: Connection) -> tuple[list[Address], float]:
        """Agree on a moment: where to dial, and the round trip in seconds.

        A stream for each try: other implementations follow one signal only on each.
        """
        own = await self._own_addresses()
        if not own:
            raise PeerUnreachable("nobody tells how our listening port is seen from outside")
        stream = connection.muxer.open_stream_nowait()
        try:
            with trio.fail_after(_ROUND_S):
                await stream.write(proposal(DCUTR))
                await confirm(stream, DCUTR)
                asked = trio.current_time()
                await send(stream, PunchMessage(PunchType.CONNECT, own))
                answer = await _expect(stream, PunchType.CONNECT)
                rtt_s = trio.current_time() - asked
                addresses = self._acceptable(direct_addresses_of(answer.addresses))
                if not addresses:
                    raise PeerUnreachable("the peer does not know how it is seen from outside")
                await send(stream, PunchMessage(PunchType.SYNC))
                await stream.close()
        except BaseException:
            stream.reset_nowait()
            raise
        return addresses, rtt_s

    # -- following ----------------------------------------------------------------------------------------------------

    async def _follow(self, connection: Connection, stream: MuxedStream) -> None:
        """The peer behind the relay leads. When both have dialed each other and want to, the larger key does."""
        key = connection.key
        is_ours = key in self._upgrading and self._own > key
        if not connection.relayed or connection.inbound or is_ours or key in self._following:
            stream.reset_nowait()
            return
        self._following.add(key)
        try:
            for _ in range(_TRIES):
                if not await self._follow_once(connection, stream):
                    break
            await stream.close()
        except _FAILURES as error:
            log.debug("%s stays behind a relay: %s", connection.key.hex()[:12], error)
            stream.reset_nowait()
        finally:
            self._following.discard(key)

    async def _follow_once(self, connection: Connection, stream: MuxedStream) -> bool:
        """One try; whether the leader may start another on this stream."""
        with trio.fail_after(_ROUND_S):
            addresses = self._acceptable(direct_addresses_of((await _expect(stream, PunchType.CONNECT)).addresses))
            if not self._may_dial(connection.key):
                raise RequestFailed("the peer punches too often")
            await send(stream, PunchMessage(PunchType.CONNECT, await self._own_addresses()))
            await _expect(stream, PunchType.SYNC)
        if self._has_direct(connection.key):
            return False
        return not await self._dial_at_once(connection.key, addresses, initiator=True)

    # -- both ---------------------------------------------------------------------------------------------------------

    async def _dial_at_once(self, key: bytes, addresses: Iterable[Address], *, initiator: bool) -> bool:
        """Dial all addresses from the listening port; whether there is a direct connection now."""
        with trio.move_on_after(_PUNCH_S):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(self._dial_one, key, address, initiator, nursery.cancel_scope)
        return self._has_direct(key)

    async def _dial_one(self, key: bytes, address: Address, initiator: bool, others: trio.CancelScope) -> None:
        try:
            tcp = await self._network.open_raw(address)
            connection = await self._network.upgrade_dialed(tcp, key, initiator=initiator)
        except Exception as error:  # noqa: BLE001  (the edge: a handshake with whoever answers there)
            log.debug("no direct connection with %s at %s: %r", key.hex()[:12], address, error)
            return
        connection.address = address
        others.cancel()

    def _acceptable(self, addresses: Iterable[Address]) -> list[Address]:
        """Public IP addresses; on a node that listens on loopback only also those."""
        bound = self._network.bound
        at_home = bool(bound) and all(address.is_loopback for address in bound)
        usable = [
            address
            for address in addresses
            if address.kind.startswith("ip")
            and address.is_dialable
            and (not address.is_private or (at_home and address.is_loopback))
        ]
        return list(dict.fromkeys(usable))[:_ADDRESSES]

    async def _own_addresses(self) -> tuple[bytes, ...]:
        """How peers see our listening port: those that we dialed from it, or that it is public for."""
        seen: list[Address] = []
        async with trio.open_nursery() as nursery:
            for connection in self._witnesses():
                nursery.start_soon(self._ask_witness, connection, seen)
        return tuple(map(binary_of, self._acceptable((*seen, *self._confirmed()))))

    def _witnesses(self) -> list[Connection]:
        ports = {address.port for address in self._network.bound}
        found = [self._network.connection_to(key) for key in self._network.connected_keys()]
        return [c for c in found if c is not None and not c.relayed and c.local_port in ports][:_WITNESSES]

    async def _ask_witness(self, connection: Connection, seen: list[Address]) -> None:
        try:
            observed = (await self._identity(connection)).observed
        except _FAILURES as error:
            log.debug("%s does not tell how it sees us: %s", connection.key.hex()[:12], error)
            return
        if observed is not None:
            seen.append(observed)

    async def _identity(self, connection: Connection) -> Identity:
        """Of a witness; asked once a connection."""
        known = self._identities.get(connection)
        if known is None:
            known = self._identities[connection] = await identify(connection)
        return known


async def _expect(stream: MuxedStream, kind: PunchType) -> PunchMessage:
    message = PunchMessage.decode(await receive(stream))
    if message.type != kind:
        raise MalformedMessage(f"hole punching: a message of type {message.type} instead of {kind.name}")
    return message
