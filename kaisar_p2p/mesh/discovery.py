"""Finding peers and staying connected: redial, peer exchange, looking for a peer by its key.

``/kaisar/peers/1`` is one frame each way, on every new connection and now and then on a random one: who I am in
this process, where I listen, whom I look for; and back the same with up to 32 connected peers. Addresses are hints:
whoever answers there has to prove the key.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Protocol

import trio

from kaisar_p2p.errors import DecodeError, MeshError, PeerUnreachable
from kaisar_p2p.mesh.addresses import Address, AddressBook
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.wire.codec import AtMost, Count, Exactly, decode, encode, message

log = logging.getLogger(__name__)

PROTOCOL = "/kaisar/peers/1"
FRAME_BYTES = 64 * 1024
_SHARED_PEERS = 32
_REDIAL_S, _REDIAL_MAX_S = 0.25, 30.0
_SEARCH_S = 1.0
_EXCHANGE_DEADLINE_S = 5.0
_ASKED_FOR_A_KEY = 3

_Key = Annotated[bytes, Exactly(32)]
_Addresses = Annotated[tuple[Annotated[str, AtMost(160)], ...], Count(8)]


@message(2)
@dataclass(frozen=True)
class PeerAddresses:
    """Where a peer may be reached."""

    key: _Key
    addresses: _Addresses


@message(3)
@dataclass(frozen=True)
class Exchange:
    """Both directions of the peer exchange; `wanted` holds the key that the asker looks for, or nothing."""

    instance: Annotated[bytes, Exactly(8)]  # random per process: two processes with one key differ
    listening: _Addresses
    wanted: Annotated[tuple[_Key, ...], Count(1)]
    peers: Annotated[tuple[PeerAddresses, ...], Count(_SHARED_PEERS + 1)]


class Requester(Protocol):
    """`Mesh.request` on one given connection."""

    def __call__(self, connection: Connection, payload: bytes) -> Awaitable[bytes]: ...


class Backoff:
    """Delays that double up to a limit, with jitter."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0

    def next_s(self) -> float:
        """The delay after another failure."""
        delay = min(_REDIAL_S * 2**self._failures, _REDIAL_MAX_S)
        self._failures = min(self._failures + 1, 16)
        return float(delay * self._rng.uniform(0.5, 1.0))

    def reset(self) -> None:
        """It worked."""
        self._failures = 0


class Discovery:
    """Keeps a node connected. `run` is its life."""

    def __init__(
        self,
        network: Network,
        book: AddressBook,
        request: Requester,
        addresses: Callable[[], tuple[Address, ...]],
        rng: random.Random,
    ) -> None:
        self.instance = secrets.token_bytes(8)
        self._network, self._book = network, book
        self._request = request
        self._addresses = addresses
        self._rng = rng
        self._limits: MeshLimits = network.limits
        self._own = bytes(network.get_peer_id().to_bytes()[6:])
        self._kept: set[bytes] = set()
        self._new_kept, self._to_keep = trio.open_memory_channel[bytes](1024)
        self._next_try: dict[bytes, float] = {}
        self._tries: dict[bytes, Backoff] = {}
        self._nursery: trio.Nursery | None = None
        self._warned: set[bytes] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Redial the kept peers, look for more, exchange addresses."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._search_loop)
            nursery.start_soon(self._exchange_loop)
            task_status.started()
            async for key in self._to_keep:
                nursery.start_soon(self._keep, key)

    # -- peers that must stay connected -------------------------------------------------------------------------------

    def keep(self, key: bytes) -> None:
        """Dial this peer whenever it is not connected, for ever."""
        if key == self._own or key in self._kept:
            return
        self._kept.add(key)
        self._book.pin(key)
        self._new_kept.send_nowait(key)

    async def _keep(self, key: bytes) -> None:
        backoff = Backoff(self._rng)
        while True:
            connection = self._network.connection_to(key)
            if connection is None:
                try:
                    connection = await self.connect(key)
                except PeerUnreachable as error:
                    delay_s = backoff.next_s()
                    log.debug("%s; next try in %.1f s", error.message, delay_s)
                    await trio.sleep(delay_s)
                    continue
            await connection.event_closed.wait()
            if trio.current_time() - connection.since > _REDIAL_MAX_S:
                backoff.reset()
            await trio.sleep(backoff.next_s())

    # -- connecting ---------------------------------------------------------------------------------------------------

    async def connect(self, key: bytes) -> Connection:
        """The connection with a peer, dialing it at its known addresses if need be; raises PeerUnreachable."""
        addresses = self._book.of(key)
        if not addresses and self._network.connection_to(key) is None:
            await self._look_for(key)
            addresses = self._book.of(key)
        connection = await self._network.dial(key, addresses)
        if connection.address is not None:
            self._book.confirm(key, connection.address)
        return connection

    async def _look_for(self, key: bytes) -> None:
        """Ask a few peers for the addresses of another."""
        asked = self._sample_connections(_ASKED_FOR_A_KEY)
        async with trio.open_nursery() as nursery:
            for connection in asked:
                nursery.start_soon(self._exchange, connection, key)

    def _sample_connections(self, most: int) -> list[Connection]:
        keys = self._network.connected_keys()
        found = [self._network.connection_to(key) for key in self._rng.sample(keys, min(most, len(keys)))]
        return [connection for connection in found if connection is not None]

    async def _search_loop(self) -> None:
        """Dial known peers while there are fewer connections than wanted; ask for more when none is left to try."""
        asking, next_question = Backoff(self._rng), 0.0
        while True:
            connected, wanted = len(self._network.connected_keys()), self._limits.target_peers
            await trio.sleep(self._rng.uniform(0.5, 1.5) * (_SEARCH_S if 2 * connected >= wanted else _SEARCH_S / 4))
            if connected >= wanted:
                continue
            key = self._next_candidate()
            if key is not None:
                asking.reset()
                await self._try(key)
            elif trio.current_time() >= next_question:
                next_question = trio.current_time() + asking.next_s()
                for connection in self._sample_connections(1):
                    await self._exchange(connection, None)

    def _next_candidate(self) -> bytes | None:
        now = trio.current_time()
        candidates = [
            key
            for key in self._book.peers()
            if key != self._own
            and key not in self._kept
            and self._network.connection_to(key) is None
            and self._next_try.get(key, 0.0) <= now
            and not self._network.is_banned(key)
        ]
        return self._rng.choice(candidates) if candidates else None

    async def _try(self, key: bytes) -> None:
        if len(self._tries) > self._limits.known_peers:
            self._tries.clear()
            self._next_try.clear()
        backoff = self._tries.setdefault(key, Backoff(self._rng))
        try:
            await self.connect(key)
            backoff.reset()
        except PeerUnreachable as error:
            self._next_try[key] = trio.current_time() + 4 * backoff.next_s()
            log.debug("%s", error.message)

    # -- peer exchange ------------------------------------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> None:
        """Whoever dialed starts the exchange."""
        if not connection.inbound and self._nursery is not None:
            self._nursery.start_soon(self._exchange, connection, None)

    async def _exchange_loop(self) -> None:
        while True:
            await trio.sleep(self._limits.exchange_s * self._rng.uniform(0.5, 1.5))
            for connection in self._sample_connections(1):
                await self._exchange(connection, None)

    async def _exchange(self, connection: Connection, wanted: bytes | None) -> None:
        question = self._message((), () if wanted is None else (wanted,))
        try:
            with trio.fail_after(_EXCHANGE_DEADLINE_S):
                answer = decode(Exchange, await self._request(connection, question))
        except (MeshError, DecodeError, trio.TooSlowError) as error:
            log.debug("no peer exchange with %s: %s", connection.key.hex()[:12], error)
            return
        self._learn(connection, answer)

    async def serve(self, connection: Connection, stream: MeshStream) -> None:
        """Answer a peer's question."""
        question = decode(Exchange, await stream.receive_frame())
        self._learn(connection, question)
        wanted = question.wanted[0] if question.wanted else None
        await stream.send_frame(self._message(self._share(connection.key, wanted), ()))

    def _message(self, peers: Iterable[PeerAddresses], wanted: tuple[bytes, ...]) -> bytes:
        listening = tuple(str(address) for address in self._addresses()[:8])
        return encode(Exchange(self.instance, listening, wanted, tuple(peers)))

    def _share(self, asker: bytes, wanted: bytes | None) -> list[PeerAddresses]:
        keys = [key for key in self._network.connected_keys() if key not in (asker, wanted)]
        self._rng.shuffle(keys)
        chosen = ([wanted] if wanted is not None else []) + keys[:_SHARED_PEERS]
        known = [(key, self._book.of(key)) for key in chosen]
        return [PeerAddresses(key, tuple(map(str, addresses[:8]))) for key, addresses in known if addresses]

    def _learn(self, connection: Connection, told: Exchange) -> None:
        self._book.add(connection.key, told.listening)
        self._note_observed(connection, told)
        for peer in told.peers:
            if peer.key not in (self._own, connection.key):
                self._book.add(peer.key, peer.addresses)
        connection.instance = told.instance
        self._settle(connection)

    def _note_observed(self, connection: Connection, told: Exchange) -> None:
        """A peer behind a translated address may answer on its port at the address that we see."""
        host = connection.remote_host
        if connection.inbound and host:
            kind = "ip6" if ":" in host else "ip4"
            ports = {text.rsplit("/", 1)[-1] for text in told.listening}
            if len(ports) == 1:
                self._book.add(connection.key, [f"/{kind}/{host}/tcp/{ports.pop()}"])

    # -- several connections with one key -----------------------------------------------------------------------------

    def _settle(self, newest: Connection) -> None:
        """Keep one connection per process of a peer, the same on both sides; tell when two processes use one key."""
        others = [
            connection
            for connection in self._network.connections_with(newest.key)
            if connection is not newest and connection.instance is not None and not connection.retired
        ]
        for other in others:
            if other.instance == newest.instance:
                surplus = self._surplus(other, newest)
                if self._nursery is not None:
                    self._nursery.start_soon(self._network.retire, surplus)
            elif newest.key not in self._warned:
                self._warned.add(newest.key)
                log.warning(
                    "two running nodes use the machine key %s, at %s and %s: stop one, or give it a key of its own",
                    newest.key.hex(),
                    other.remote_host,
                    newest.remote_host,
                )

    def _surplus(self, other: Connection, newest: Connection) -> Connection:
        """Of two connections, the one to close: the one that the larger key dialed; of equals the older."""
        if other.inbound == newest.inbound:
            return other
        keep_inbound = newest.key < self._own
        return other if other.inbound != keep_inbound else newest
