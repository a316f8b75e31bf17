"""Finding peers and staying connected: redial, and the search for more peers.

Against being surrounded: kept bootstraps, peers drawn at random over the sources that brought them and over subnets
that we have no connection to yet, half of the connections chosen by us, and a share of the address book for each
source (`address_book`). How a peer is found by its key: `rendezvous`.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from kaisar_p2p.errors import PeerUnreachable
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import AnyAddress, CircuitAddress
from kaisar_p2p.mesh.discovery.exchange import FRAME_BYTES, PROTOCOL, PeerExchange
from kaisar_p2p.mesh.discovery.records import RELAY
from kaisar_p2p.mesh.discovery.rendezvous import Rendezvous
from kaisar_p2p.mesh.discovery.settling import Settling
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.network import Network

__all__ = ["FRAME_BYTES", "PROTOCOL", "Backoff", "Discovery", "subnet_of"]

log = logging.getLogger(__name__)

_REDIAL_S, _REDIAL_MAX_S = 0.25, 30.0
_SEARCH_S = 1.0
_DRAWN = 64  # candidates that are compared
_COMPLAINT_S = 600.0
_ALONE_AFTER = 6  # failures: some ten seconds
_FOREIGN_S = 300.0
_REPORTED = 8
_FOREIGN_PEERS = 1024
_GOODBYE_S = 0.5


class Backoff:
    """Delays that double up to a limit, with jitter."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0

    @property
    def failures(self) -> int:
        """In a row, at most 16."""
        return self._failures

    def next_s(self) -> float:
        """The delay after another failure."""
        delay = min(_REDIAL_S * 2**self._failures, _REDIAL_MAX_S)
        self._failures = min(self._failures + 1, 16)
        return float(delay * self._rng.uniform(0.5, 1.0))

    def reset(self) -> None:
        """It worked."""
        self._failures = 0


@dataclass
class _Attempts:
    """Attempts at one peer."""

    backoff: Backoff
    next_at: float = 0.0
    complained_at: float | None = None
    failed: PeerUnreachable | None = None  # how the latest one ended


def subnet_of(host: str) -> str:
    """The network that an address probably shares with its owner's others: IPv4 /16, IPv6 /32; a name is its own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    bits = 16 if isinstance(address, ipaddress.IPv4Address) else 32
    return str(ipaddress.ip_network((address, bits), strict=False))


class Discovery:
    """Keeps a node connected. `run` is its life."""

    def __init__(self, network: Network, book: AddressBook, exchange: PeerExchange, rng: random.Random) -> None:
        self.exchange = exchange
        self._network, self._book = network, book
        self._rng = rng
        self._limits: MeshLimits = network.limits
        self._own = bytes(network.get_peer_id().to_bytes()[6:])
        self._settling = Settling(network, self._own)
        self._kept: dict[bytes, bool] = {}  # whether a person asked for it
        self._new_kept, self._to_keep = trio.open_memory_channel[bytes](math.inf)  # each key once
        self._attempts: dict[bytes, _Attempts] = {}
        self._foreign: dict[bytes, float] = {}  # peers of other networks, and until when they are left alone
        self._woken = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._rendezvous = Rendezvous(network, book, exchange, self, rng)
        self.on_told: Callable[[Connection], None] = lambda _connection: None  # a peer told where it is
        self._detours: set[bytes] = set()  # keys
        network.on_doubtful = self._on_doubtful
        exchange.on_met = self._on_met
        exchange.on_foreign = self._on_foreign

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Redial the kept peers, look for more, exchange addresses."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._search_loop)
            nursery.start_soon(self._exchange_loop)
            nursery.start_soon(self._rendezvous.run)
            task_status.started()
            async for key in self._to_keep:
                nursery.start_soon(self._keep, key)

    def wake(self) -> None:
        """The network may be another one now: whatever waits to be tried again is tried at once."""
        for attempts in self._attempts.values():
            attempts.backoff.reset()
            attempts.next_at = 0.0
        self._woken.set()
        self._woken = trio.Event()

    def is_kept(self, key: bytes) -> bool:
        """A person or the ledger named it."""
        return key in self._kept

    async def pause(self, delay_s: float) -> None:
        """Sleep, but not past `wake`."""
        with trio.move_on_after(delay_s):
            await self._woken.wait()

    # -- peers that must stay connected -------------------------------------------------------------------------------

    def keep(self, key: bytes, *, asked_for: bool = False) -> None:
        """Dial this peer whenever it is not connected, for ever. `asked_for`: a person did, who is told of failures."""
        if key == self._own:
            return
        is_new = key not in self._kept
        self._kept[key] = asked_for or self._kept.get(key, False)
        self._book.pin(key)
        if is_new:
            self._new_kept.send_nowait(key)

    async def _keep(self, key: bytes) -> None:
        attempts = self._attempts_at(key)
        while True:
            connection = self._network.connection_to(key)
            if connection is None:
                try:
                    connection = await self.connect(key)
                except PeerUnreachable as error:
                    delay_s = _FOREIGN_S if self.is_foreign(key) else attempts.backoff.next_s()
                    attempts.failed = error
                    self._complain(key, attempts, error)
                    await self.pause(delay_s)
                    continue
            attempts.complained_at = attempts.failed = None
            await connection.event_closed.wait()
            if trio.current_time() - connection.since > _REDIAL_MAX_S:
                attempts.backoff.reset()
            await self.pause(attempts.backoff.next_s())

    def unreached(self) -> tuple[str, ...]:
        """Why peers that a person named are not connected: a sentence each, a few at most."""
        named = (key for key, asked_for in self._kept.items() if asked_for)
        failed = (attempts.failed for key in named if (attempts := self._attempts.get(key)) is not None)
        return tuple(error.message for error in itertools.islice(filter(None, failed), _REPORTED))

    def _complain(self, key: bytes, attempts: _Attempts, error: PeerUnreachable) -> None:
        """The first failure and then every ten minutes, where somebody can do something about it."""
        now, told_at = trio.current_time(), attempts.complained_at
        is_alone = attempts.backoff.failures >= _ALONE_AFTER and not self._network.connected_keys()
        matters = self._kept.get(key) or self.is_foreign(key) or is_alone
        if matters and (told_at is None or now - told_at >= _COMPLAINT_S):
            attempts.complained_at = now
            log.warning("%s; it is tried again and again", error)
        else:
            log.debug("%s", error.message)

    # -- connecting ---------------------------------------------------------------------------------------------------

    async def connect(self, key: bytes) -> Connection:
        """The connection with a peer, dialing it at its known addresses if need be; raises PeerUnreachable."""
        if self._network.connection_to(key) is None and not self._book.of(key):
            await self._rendezvous.look_for(key)
        return await self.dial(key)

    async def dial(self, key: bytes) -> Connection:
        """As `connect`, without looking for addresses."""
        if self.is_foreign(key) and self._network.connection_to(key) is None:
            raise PeerUnreachable(
                f"peer {key.hex()[:12]} is of another network", hint="do both nodes use the same genesis file?"
            )
        addresses = self._book.of(key)
        try:
            connection = await self._network.dial(key, addresses)
        except PeerUnreachable:
            if self._network.connected_keys() and not self._network.is_banned(key):  # else it may be us who are cut off
                self._book.blame(key, addresses, trio.current_time())
            raise
        if connection.address is not None:
            self._book.confirm(key, connection.address)
        return connection

    def _on_doubtful(self, connection: Connection) -> None:
        """Whoever dialed looks for another relay, once at a time, before anybody asks."""
        key = connection.key
        if not connection.inbound and not connection.retired and key not in self._detours:
            self._detours.add(key)
            self._soon(self._detour_ahead, connection)

    async def _detour_ahead(self, connection: Connection) -> None:
        try:
            await self.detour(connection)
        finally:
            self._detours.discard(connection.key)

    async def detour(self, doubtful: Connection) -> Connection:
        """Another connection with a peer whose relay seems to be gone; the same one when there is no other way."""
        key = doubtful.key
        others = [address for address in self._book.of(key) if address != doubtful.address]
        try:
            return await self._network.dial(key, others, instead_of=doubtful)
        except PeerUnreachable as error:
            log.debug("%s", error.message)
            return doubtful

    def _sample_connections(self, most: int) -> list[Connection]:
        keys = self._network.connected_keys()
        return self._connections(self._rng.sample(keys, min(most, len(keys))))

    def _connections(self, keys: Iterable[bytes]) -> list[Connection]:
        found = (self._network.connection_to(key) for key in keys)
        return [connection for connection in found if connection is not None]

    # -- looking for more peers ---------------------------------------------------------------------------------------

    async def _search_loop(self) -> None:
        """Dial known peers while there are fewer connections than wanted; ask for more when none is left to try."""
        asking, next_question = Backoff(self._rng), 0.0
        while True:
            lonely = 2 * len(self._network.connected_keys()) < self._limits.target_peers
            await trio.sleep(self._rng.uniform(0.5, 1.5) * (_SEARCH_S / 4 if lonely else _SEARCH_S))
            if self._has_enough():
                continue
            key = self._next_candidate()
            if key is not None:
                asking.reset()
                await self._try(key)
            elif trio.current_time() >= next_question:
                next_question = trio.current_time() + asking.next_s()
                for connection in self._sample_connections(1):
                    await self._ask(connection)

    def _has_enough(self) -> bool:
        """As many as wanted, half of them chosen by us: whoever comes to us does not keep us from choosing."""
        wanted = self._limits.target_peers
        connected, chosen = len(self._network.connected_keys()), len(self._network.outbound_connections())
        return connected >= wanted and 2 * chosen >= wanted

    def _next_candidate(self) -> bytes | None:
        """A source at random, then a peer at random from the subnets that we have the fewest connections to."""
        drawn = ([key for key in keys if self._is_candidate(key)] for keys in self._book.draw(_DRAWN, self._rng))
        candidates = next((keys for keys in drawn if keys), [])
        if not candidates:
            return None
        taken = self._outbound_subnets()
        # The fullest of its subnets counts: nobody looks new by naming an address elsewhere beside the true one.
        weights = {key: max(taken[subnet] for subnet in self._subnets(key)) for key in candidates}
        least = min(weights.values())
        return self._rng.choice([key for key, weight in weights.items() if weight == least])

    def _is_candidate(self, key: bytes) -> bool:
        attempts = self._attempts.get(key)
        return (
            key != self._own
            and key not in self._kept
            and self._network.connection_to(key) is None
            and (attempts is None or attempts.next_at <= trio.current_time())
            and not self._network.is_banned(key)
            and not self.is_foreign(key)
            and bool(self._book.of(key))
        )

    def _outbound_subnets(self) -> Counter[str]:
        return Counter(subnet_of(connection.remote_host) for connection in self._network.outbound_connections())

    def _subnets(self, key: bytes) -> set[str]:
        return {subnet_of(_host(address)) for address in self._book.of(key)}

    async def _try(self, key: bytes) -> None:
        attempts = self._attempts_at(key)
        try:
            await self.connect(key)
            attempts.backoff.reset()
        except PeerUnreachable as error:
            patience = 4 if self._network.connected_keys() else 1  # alone: it may be our network that was down
            attempts.next_at = trio.current_time() + patience * attempts.backoff.next_s()
            log.debug("%s", error.message)

    def _attempts_at(self, key: bytes) -> _Attempts:
        if len(self._attempts) > 2 * self._limits.known_peers:
            self._attempts = {each: kept for each, kept in self._attempts.items() if each in self._kept}
        return self._attempts.setdefault(key, _Attempts(Backoff(self._rng)))

    # -- telling and asking -------------------------------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> None:
        """Whoever dialed starts the exchange."""
        if not connection.inbound:
            self._soon(self._ask, connection)

    async def _ask(self, connection: Connection) -> None:
        """Tell and learn; while we know of no relay, one is what we most like to hear of."""
        services = 0 if self._book.offering(RELAY, trio.current_time()) else RELAY
        await self.exchange.ask(connection, (), services)

    def on_addresses_changed(self) -> None:
        """Tell everybody that we are connected with."""
        for connection in self._connections(self._network.connected_keys()):
            self._soon(self.exchange.ask, connection)

    async def _exchange_loop(self) -> None:
        while True:
            await trio.sleep(self._limits.exchange_s * self._rng.uniform(0.5, 1.5))
            self._book.expire(trio.current_time())
            for connection in self._sample_connections(1):
                await self._ask(connection)

    # -- who it turned out to be --------------------------------------------------------------------------------------

    def is_foreign(self, key: bytes) -> bool:
        """A peer that has said, some minutes ago at most, that it belongs to another network."""
        return trio.current_time() < self._foreign.get(key, 0.0)

    def _on_foreign(self, connection: Connection) -> None:
        if len(self._foreign) >= _FOREIGN_PEERS:
            self._foreign.clear()
        self._foreign[connection.key] = trio.current_time() + _FOREIGN_S
        log.debug("peer %s is of another network", connection.key.hex()[:12])
        self._soon(self._part, connection)

    async def _part(self, connection: Connection) -> None:
        with trio.move_on_after(_GOODBYE_S):
            await connection.muxer.wait_without_streams()
        await connection.close()

    def _on_met(self, connection: Connection) -> None:
        self.on_told(connection)
        for surplus in self._settling.surplus_with(connection):
            self._soon(self._network.retire, surplus)

    def _soon(self, function: object, *arguments: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(function, *arguments)  # type: ignore[arg-type]


def _host(address: AnyAddress) -> str:
    return address.through.host if isinstance(address, CircuitAddress) else address.host
