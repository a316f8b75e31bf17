"""The mesh of one node: gossip, request streams and the peers behind them, named by their machine keys."""

from __future__ import annotations

import logging
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio
from nacl.signing import SigningKey

from kaisar_p2p.errors import LimitExceeded, MeshError, PeerUnreachable, RequestFailed, ungrouped
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery import discovery
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import AnyAddress, is_loopback, local_addresses, parse, with_peer
from kaisar_p2p.mesh.discovery.announce import OwnAddresses
from kaisar_p2p.mesh.discovery.discovery import Discovery
from kaisar_p2p.mesh.discovery.exchange import PeerExchange
from kaisar_p2p.mesh.discovery.mdns import LocalNetwork
from kaisar_p2p.mesh.discovery.records import RELAY, RENDEZVOUS, OwnRecord, network_id
from kaisar_p2p.mesh.failure_log import FailureLog
from kaisar_p2p.mesh.gossip.pubsub import Gossip, GossipMessage, Validator
from kaisar_p2p.mesh.guard.conduct import Conduct
from kaisar_p2p.mesh.guard.conflicts import FRAME_BYTES as CONFLICT_BYTES
from kaisar_p2p.mesh.guard.conflicts import PROTOCOL as CONFLICT_PROTOCOL
from kaisar_p2p.mesh.guard.conflicts import KeyConflicts
from kaisar_p2p.mesh.host import Host
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.limits import MeshConfig, PeerBuckets, SharedBytes
from kaisar_p2p.mesh.memory import MeshMemory, Remembered
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach import dialback
from kaisar_p2p.mesh.reach.reach_check import reach_check_of
from kaisar_p2p.mesh.reach.reachability import Reachability
from kaisar_p2p.mesh.reach.relay import RelayStatistics
from kaisar_p2p.mesh.reach.relaying import Relaying
from kaisar_p2p.mesh.reach.upnp import PortMapping, wants_mapping
from kaisar_p2p.mesh.report import MeshReport
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream
from kaisar_p2p.wire.crypto import KeyPair

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError  # isort: skip

log = logging.getLogger(__name__)
failures = FailureLog(log)

_GOODBYE_S = 0.5
_EXCHANGES_PER_S = 2.0


@dataclass(frozen=True)
class PeerInfo:
    """A connected peer. `connected_since` is trio's clock in seconds, `rtt_s` None until the first ping came back."""

    key: bytes
    addresses: tuple[str, ...]
    inbound: bool
    connected_since: float
    score: float
    rtt_s: float | None
    relayed: bool = False


@dataclass(frozen=True)
class MeshStatistics:
    """Counters since the start.

    `messages` counts per (topic, verdict): accept, ignore, reject, published; and, under the topic "", duplicate
    replay and unwanted. `dropped` counts messages that a slow subscriber lost per topic, `dropped_frames` those that
    gave way in the queues of peers, `drops` both and those that gave way before they had a verdict, by (place, topic,
    priority); places are inbound, outbound and subscriber. `refused` counts connections and streams that a limit
    refused, by reason, and `pruned` connections that were closed for better ones, by reason.
    """

    connections: int
    peers: int
    messages: dict[tuple[str, str], int]
    dropped: dict[str, int]
    dropped_frames: int
    drops: dict[tuple[str, str, int], int]
    refused: dict[str, int]
    pruned: dict[str, int]
    failed_handlers: dict[str, int]
    sent_bytes: int
    received_bytes: int


@dataclass
class _Service:
    handler: Callable[[MeshStream], Awaitable[None]]
    max_frame_bytes: int
    per_peer: int
    rate: PeerBuckets
    active: Counter[bytes] = field(default_factory=Counter)

    def admits(self, peer: bytes, now: float) -> bool:
        """One more stream of this peer is within the limits."""
        return self.active[peer] < self.per_peer and self.rate.try_take(peer, now)


class Mesh:
    """One node in the mesh; made by `open_mesh`."""

    def __init__(self, config: MeshConfig, seed: bytes, memory: MeshMemory | None = None) -> None:
        signing_key = SigningKey(seed)
        rng = random.Random(secrets.randbits(128))
        self.key = bytes(signing_key.verify_key)
        self.config = config
        self._network = Network(key_pair_of(seed), config.limits, config.pre_shared_key)
        self._kept: set[bytes] = set()
        self._reputation = Conduct(self._network, self._kept.__contains__).reputation
        self._book = _address_book(config)
        self._remembered = Remembered(self._reputation, memory, book=self._book)
        self._announcer = OwnAddresses(config, lambda: self._network.bound)
        self._gossip = Gossip(self._network, signing_key, f"/kaisar/{config.network}", self._reputation, rng)
        self.on_addresses_changed: Callable[[], None] = lambda: None
        network_key = network_id(config.network)
        self._own_record = OwnRecord(
            KeyPair.from_seed(seed),
            network_key,
            lambda: map(str, self._own_addresses()),
            config.limits.record_s,
        )
        exchange = PeerExchange(
            network_key, self._own_record, self._book, self._ask_peers, self._network.connected_keys, rng, self.key
        )
        self._discovery = Discovery(self._network, self._book, exchange, rng)
        self._announcer.on_changed = self._addresses_changed
        self._announcer.on_woken = self._on_woken
        self._lan: LocalNetwork | None = None
        self._host = Host(self._network, lambda: self.addrs)
        self._conflicts = KeyConflicts(self._network, self._tell, exchange.instance)
        self._network.on_key_conflict = self._conflicts.found
        exchange.on_twin = self._conflicts.on_twin
        self._network.handlers[CONFLICT_PROTOCOL] = self._serve_conflict
        self._served_bytes = SharedBytes(config.limits.served_bytes)
        self._reach = reach_check_of(self._network, config, self._ask_reach, rng)
        self._reach.on_change = self._on_reachability
        self._mapping = PortMapping(lambda: self._network.bound, rng)
        self._reach.mapped = lambda: self._mapping.external
        self._mapping.on_change = self._reach.check_soon
        self._relaying = Relaying(
            self._network,
            signing_key,
            relay=config.relay,
            preferred=lambda: (*self._kept, *self._offering(RELAY)),
            connect=self._discovery.connect,
            own_addresses=lambda: self.addrs,
            known_addresses=self._book.of,
            confirmed=lambda: self._reach.confirmed,
            allow_private=config.allow_private,
            rng=rng,
        )
        self._relaying.client.on_changed = lambda: self._announcer.set_circuits(self._relaying.addresses)
        self._relaying.on_offer = partial(self._offer, RELAY)
        self._failed_handlers: Counter[str] = Counter()
        self._sent = self._received = 0  # bytes of connections that are over
        self._changed = trio.Event()
        self._exchanges = PeerBuckets(_EXCHANGES_PER_S, 5 * _EXCHANGES_PER_S)
        self._network.handlers[discovery.PROTOCOL] = self._serve_exchange
        self._discovery.on_told = self._relaying.on_told
        self._network.on_connected = self._on_connected
        self._network.on_retired = self._gossip.reroute
        self._network.on_disconnected = self._on_disconnected
        self._network.is_foreign = self._discovery.is_foreign

    # -- life ---------------------------------------------------------------------------------------------------------

    async def _start(self, nursery: trio.Nursery) -> None:
        await self._remembered.load()
        self._network.run_in(nursery)
        await self._network.listen_on(self.config.listen)
        await nursery.start(self._gossip.run)
        await nursery.start(self._discovery.run)
        await nursery.start(self._reach.run)
        if wants_mapping(self.config, self._network.bound):
            nursery.start_soon(self._mapping.run)
        await nursery.start(self._relaying.run)
        nursery.start_soon(self._remembered.run)
        nursery.start_soon(self._conflicts.run)
        nursery.start_soon(self._announcer.run)
        self._look_around(nursery)

    def _look_around(self, nursery: trio.Nursery) -> None:
        """Start mDNS if it is wanted: by default when we listen on more than loopback."""
        outward = not all(is_loopback(address) for address in self._network.bound)
        if outward if self.config.mdns is None else self.config.mdns:
            found = partial(self._book.add, lan=True, source="mdns")
            network, most = network_id(self.config.network), self.config.limits.lan_peers
            self._lan = LocalNetwork(self.key, network, self._announcer.local, found, most=most)
            nursery.start_soon(self._lan.run)

    def _on_connected(self, connection: Connection) -> None:
        self._gossip.on_connected(connection)
        self._discovery.on_connected(connection)
        self._reach.on_connected(connection)
        self._relaying.on_connected(connection)
        self._wake()

    def _on_disconnected(self, connection: Connection) -> None:
        self._sent += connection.muxer.sent_bytes
        self._received += connection.muxer.received_bytes
        self._reach.on_disconnected(connection)
        self._relaying.on_disconnected(connection)
        self._wake()

    def _on_reachability(self, report: Reachability) -> None:
        """The report on how others reach us has changed."""
        self._announcer.set_confirmed(self._reach.confirmed)
        self._relaying.on_reachability(report.status)
        self._offer(RENDEZVOUS, report.status == "public")

    def _on_woken(self) -> None:
        """Interfaces came or went, or the machine was suspended."""
        self._discovery.wake()
        self._mapping.wake()
        self._relaying.on_woken()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- who and where ------------------------------------------------------------------------------------------------

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs of this node, with the real ports and its peer id."""
        return tuple(with_peer(address, self.key) for address in self._own_addresses())

    def _own_addresses(self) -> tuple[AnyAddress, ...]:
        return self._announcer.current()

    def _offer(self, service: int, offered: bool) -> None:
        """Say in our signed record whether we offer a service (`records.RELAY`, `records.RENDEZVOUS`)."""
        before = self._own_record.services
        self._own_record.services = before | service if offered else before & ~service
        if self._own_record.services != before:
            self._discovery.on_addresses_changed()

    def _offering(self, service: int) -> list[bytes]:
        """Peers whose signed record says that they offer a service."""
        return self._book.offering(service, trio.current_time())

    def _addresses_changed(self) -> None:
        self._discovery.on_addresses_changed()
        if self._lan is not None:
            self._lan.readdress()
        try:
            self.on_addresses_changed()
        except Exception:  # the edge: a bug in the callback must not end whoever found the address
            log.exception("on_addresses_changed failed")

    def add_addresses(self, peer: bytes, addrs: Iterable[str]) -> None:
        """Note where a peer may be reached; whatever is not a usable address is left out."""
        if peer != self.key:
            self._book.add(peer, addrs, source="announced", told=False)  # by many: it has its share of the book

    def keep_connected(self, peer: bytes, addrs: Iterable[str], *, asked_for: bool = False) -> None:
        """Stay connected with a bootstrap peer: redial for ever, with exponential backoff and jitter.

        `asked_for`: a person named it, so failures are logged as warnings, the first and then every ten minutes.
        """
        if peer != self.key:
            self._book.add(peer, addrs, trusted=asked_for, private=True)
            self._kept.add(peer)
            self._discovery.keep(peer, asked_for=asked_for)

    def reachability(self) -> Reachability:
        """Whether others can dial this node, and how that was found out."""
        return self._reach.report

    def port_mapping(self) -> str:
        """Whether a router forwards a port to this node, in a sentence."""
        return self._mapping.explained

    def report(self) -> MeshReport:
        """How this node stands in its network, for `kaisar doctor`."""
        return MeshReport(
            reachability=self.reachability(),
            listening=tuple(map(str, local_addresses(self._network.bound))),
            port_mapping=self._mapping.explained,
            relays=tuple(map(str, self._relaying.addresses)),
            carrying=self.relay_statistics(),
            on_lan=self._lan is not None,
            banned=self._reputation.banned(trio.current_time()),
            key_conflict=self.key_conflict(),
            key_conflict_proven=self._conflicts.own_key_is_proven,
            unreached=self._discovery.unreached(),
        )

    def relay_statistics(self) -> RelayStatistics:
        """What this node carries for others."""
        return self._relaying.server.statistics

    def relay_members(self, is_member: Callable[[bytes], bool]) -> None:
        """Say between whom bulk may be relayed here; without it, between all that hold a reservation."""
        self._relaying.server.is_member = is_member

    def peers(self) -> list[PeerInfo]:
        """The connected peers."""
        now = trio.current_time()
        found = ((key, self._network.connection_to(key)) for key in self._network.connected_keys())
        return [
            PeerInfo(
                key=key,
                addresses=tuple(map(str, self._book.of(key))),
                inbound=connection.inbound,
                connected_since=connection.since,
                score=self._reputation.score(key, now),
                rtt_s=connection.muxer.rtt_s,
                relayed=connection.relayed,
            )
            for key, connection in found
            if connection is not None
        ]

    def is_connected(self, peer: bytes) -> bool:
        """There is a connection with this peer."""
        return self._network.connection_to(peer) is not None

    async def wait_connected(self, n: int = 1) -> None:
        """Wait until at least `n` peers are connected."""
        await self.wait_until(lambda: len(self._network.connected_keys()) >= n)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on the connections; it is looked at whenever one comes or goes."""
        while not condition():
            await self._changed.wait()
        await trio.lowlevel.checkpoint()

    def key_conflict(self) -> str | None:
        """Who else uses this node's machine key, as far as peers have told: one sentence for people."""
        return self._conflicts.own_key

    def statistics(self) -> MeshStatistics:
        """Counters since the start."""
        open_now = [c for key in self._network.connected_keys() for c in self._network.connections_with(key)]
        return MeshStatistics(
            connections=len(open_now),
            peers=len(self._network.connected_keys()),
            messages=dict(self._gossip.verdicts),
            dropped=dict(self._gossip.dropped),
            dropped_frames=self._gossip.dropped_frames(),
            drops=self._gossip.drops(),
            refused=dict(self._network.refused),
            pruned=dict(self._network.pruner.pruned),
            failed_handlers=dict(self._failed_handlers),
            sent_bytes=self._sent + sum(c.muxer.sent_bytes for c in open_now),
            received_bytes=self._received + sum(c.muxer.received_bytes for c in open_now),
        )

    # -- gossip -------------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: bytes) -> None:
        """Sign `data` and send it to the subscribers of a topic (short name, such as "advert"); not echoed to
        ourselves.

        Raises LimitExceeded when it is larger than `message_bytes`. A slow peer loses the oldest messages, never
        stalls us.
        """
        self._gossip.publish(topic, data)
        await trio.lowlevel.checkpoint()

    def subscribe(
        self, topic: str, validate: Validator, *, queue: int = 256, heavy: bool = False, priority: int = 1
    ) -> trio.MemoryReceiveChannel[GossipMessage]:
        """Receive a topic. `validate(data, sender, author, received_at)` judges every message on receipt.

        ACCEPT: queued for us and forwarded. IGNORE: dropped, nobody's fault. REJECT: dropped and held against the
        sender, who is disconnected and refused for a while when it repeats. A validator that raises is our bug:
        logged, IGNORE. With `heavy` it runs in a worker thread. When the queue is full, the oldest message gives
        way. Of what is received or sent faster than it can be, topics of a higher `priority` number, 0 to 2, wait and
        give way first. One subscriber per topic (ValueError).
        """
        return self._gossip.subscribe(topic, validate, queue=queue, heavy=heavy, priority=priority)

    def subscribers(self, topic: str) -> list[bytes]:
        """Connected peers that take part in a topic."""
        return self._gossip.subscribers(topic)

    # -- streams ------------------------------------------------------------------------------------------------------

    def serve(
        self,
        protocol: str,
        handler: Callable[[MeshStream], Awaitable[None]],
        *,
        max_frame_bytes: int,
        per_peer: int = 8,
        rate_per_s: float = 20.0,
    ) -> None:
        """Answer streams of a protocol.

        A peer may have `per_peer` of them open and open `rate_per_s` a second (twice that at once); more are reset.
        The stream is closed when the handler returns, and reset, with a log entry, when it raises.
        """
        self._check_frame_limit(max_frame_bytes)
        rate = PeerBuckets(rate_per_s, max(2 * rate_per_s, 1))
        service = _Service(handler, max_frame_bytes, per_peer, rate)
        self._network.handlers[protocol] = partial(self._serve, protocol, service)

    async def _serve(self, protocol: str, service: _Service, connection: Connection, stream: MuxedStream) -> None:
        peer = connection.key
        if not service.admits(peer, trio.current_time()):
            self._network.refused[protocol] += 1
            stream.reset_nowait()
            return
        service.active[peer] += 1
        try:
            limit, held = service.max_frame_bytes, self._served_bytes
            # All keys of one address are one holder: else many keys could hold everything.
            shared = connection.relayed or connection.origin.private
            holder = peer if shared else connection.origin.account.encode()
            with connection.in_use(at_once=False) as begin:
                async with MeshStream(stream, peer, protocol, limit, held=held, holder=holder) as mesh_stream:
                    mesh_stream.on_used = begin
                    await service.handler(mesh_stream)
        except (MeshError, trio.TooSlowError) as error:  # a deadline of the handler's: the peer was too slow
            log.debug("%s with %s ended: %r", protocol, peer.hex()[:12], error)
        except Exception:  # noqa: BLE001  (the edge of the stream's task: a bug in a handler costs this stream only)
            self._failed_handlers[protocol] += 1
            failures.exception(f"the handler of {protocol} failed")
        finally:
            service.active[peer] -= 1
            if not service.active[peer]:
                del service.active[peer]

    async def open_stream(self, peer: bytes, protocol: str, *, timeout_s: float, max_frame_bytes: int) -> MeshStream:
        """A stream to a peer, which is dialed if need be.

        Raises PeerUnreachable, or RequestFailed when the peer does not speak the protocol or takes longer than
        `timeout_s`.
        """
        try:
            with trio.fail_after(timeout_s):
                self._check_frame_limit(max_frame_bytes)
                connection = await self._connect(peer)
                return await self._open(connection, protocol, max_frame_bytes)
        except trio.TooSlowError:
            raise RequestFailed(f"peer {peer.hex()[:12]} did not open {protocol} within {timeout_s} s") from None

    def _check_frame_limit(self, max_frame_bytes: int) -> None:
        most = self.config.limits.request_bytes
        if max_frame_bytes > most:
            raise LimitExceeded(f"frames of {max_frame_bytes} bytes exceed {most}", hint="raise limits.request_bytes")

    async def _open(self, connection: Connection, protocol: str, max_frame_bytes: int) -> MeshStream:
        stream = self._propose(connection)
        try:
            await stream.write(proposal(protocol))
            await confirm(stream, protocol)
        except MuxedStreamError:
            raise RequestFailed("the peer reset the stream") from None
        except BaseException:
            stream.reset_nowait()
            raise
        return MeshStream(stream, connection.key, protocol, max_frame_bytes)

    async def request(
        self, peer: bytes, protocol: str, payload: bytes, *, deadline_s: float, max_reply_bytes: int
    ) -> bytes:
        """Send one frame, receive one frame, all within `deadline_s`. Raises PeerUnreachable or RequestFailed."""
        try:
            with trio.fail_after(deadline_s):
                self._check_frame_limit(max(len(payload), max_reply_bytes))
                return await self._request_on(await self._connect(peer), protocol, payload, max_reply_bytes)
        except trio.TooSlowError:
            raise RequestFailed(f"peer {peer.hex()[:12]} did not answer {protocol} within {deadline_s} s") from None

    async def _request_on(self, connection: Connection, protocol: str, payload: bytes, max_reply_bytes: int) -> bytes:
        stream = self._propose(connection)
        frames = MeshStream(stream, connection.key, protocol, max_reply_bytes)
        frames.expect_confirmation()  # protocol and question leave together: one round trip
        async with frames:
            await frames.send_some(proposal(protocol) + len(payload).to_bytes(4, "big") + payload)
            await frames.send_eof()
            answer = await frames.receive_frame()
        self._network.credit(connection.key)
        return answer

    def _propose(self, connection: Connection) -> MuxedStream:
        try:
            return connection.muxer.open_stream_nowait()
        except MuxedConnUnavailable:
            raise RequestFailed(f"the connection with {connection.key.hex()[:12]} has ended") from None

    async def _connect(self, peer: bytes) -> Connection:
        if peer == self.key:
            raise PeerUnreachable("a node does not dial itself")
        connection = self._network.connection_to(peer)
        if connection is None:
            return await self._discovery.connect(peer)
        if connection.relayed and connection.muxer.is_doubtful:
            return await self._discovery.detour(connection)
        return connection

    async def _tell(self, connection: Connection, protocol: str, payload: bytes) -> None:
        async with MeshStream(self._propose(connection), connection.key, protocol, 0) as frames:
            frames.expect_confirmation()
            await frames.send_some(proposal(protocol) + len(payload).to_bytes(4, "big") + payload)
            await frames.send_eof()
            await frames.receive_some()  # the end, or that the peer does not speak this

    async def _serve_conflict(self, connection: Connection, stream: MuxedStream) -> None:
        async with MeshStream(stream, connection.key, CONFLICT_PROTOCOL, CONFLICT_BYTES) as frames:
            with trio.fail_after(self.config.limits.negotiation_s):
                await self._conflicts.serve(connection, frames)

    # -- peer exchange ------------------------------------------------------------------------------------------------

    async def _ask_peers(self, connection: Connection, payload: bytes) -> bytes:
        return await self._request_on(connection, discovery.PROTOCOL, payload, discovery.FRAME_BYTES)

    async def _ask_reach(self, connection: Connection, payload: bytes) -> bytes:
        return await self._request_on(connection, dialback.PROTOCOL, payload, dialback.FRAME_BYTES)

    async def _serve_exchange(self, connection: Connection, stream: MuxedStream) -> None:
        if not self._exchanges.try_take(connection.key, trio.current_time()):
            self._network.refused[discovery.PROTOCOL] += 1
            stream.reset_nowait()
            return
        async with MeshStream(stream, connection.key, discovery.PROTOCOL, discovery.FRAME_BYTES) as frames:
            with trio.fail_after(self.config.limits.negotiation_s):
                await self._discovery.exchange.serve(connection, frames)


def _address_book(config: MeshConfig) -> AddressBook:
    allow = config.allow_private
    try:
        listening = [parse(text)[0] for text in config.listen]
    except ValueError:  # listening will say it better
        listening = []
    reached_at = local_addresses(listening)
    return AddressBook(
        # A node with a public address only harms its own network by dialing private ones that strangers tell.
        allow_private=allow if allow is not None else bool(reached_at) and all(each.is_private for each in reached_at),
        allow_loopback=allow if allow is not None else any(is_loopback(each) for each in reached_at),
        peers=config.limits.known_peers,
        addresses_per_peer=config.limits.addresses_per_peer,
    )


@asynccontextmanager
async def open_mesh(config: MeshConfig, seed: bytes, memory: MeshMemory | None = None) -> AsyncIterator[Mesh]:
    """Run a node's mesh for as long as the context lasts; `seed` is the 32-byte seed of the machine key.

    `memory` carries what is known about misbehaving peers over restarts. Raises PortUnavailable or ConfigError when it
    cannot listen. Leaving the context closes every connection at once.
    """
    mesh = Mesh(config, seed, memory)
    with ungrouped():
        async with trio.open_nursery() as nursery:
            await mesh._start(nursery)
            try:
                yield mesh
            finally:
                with trio.CancelScope(shield=True):
                    with trio.move_on_after(_GOODBYE_S):
                        await mesh._network.say_goodbye()
                    await mesh._remembered.save()
                nursery.cancel_scope.cancel()
