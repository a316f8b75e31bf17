"""Gossip: from a peer's bytes to a verdict to our subscribers and on to other peers.

Own data path instead of libp2p's Pubsub, which cannot say IGNORE, starts a task for every message, reads lengths
byte by byte, verifies the sender's record with every RPC, and dies of a bad key. One task per peer reads: whatever
is slow about a peer's messages (validation, a rate above the limit) slows that peer down and nobody else. One task
per peer writes what has gathered meanwhile.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio
from nacl.signing import SigningKey

from kaisar_p2p.errors import LimitExceeded, RequestFailed
from kaisar_p2p.mesh import gossip_wire as wire
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.gossip_link import WRITE_BYTES, Link, SeenMessages
from kaisar_p2p.mesh.gossip_router import MAX_OFFERED_IDS, MAX_TOPICS_PER_PEER, Control, Router
from kaisar_p2p.mesh.gossip_wire import MalformedGossip, Published
from kaisar_p2p.mesh.negotiation import confirm, proposal
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reputation import FORWARDED_POINTS, IMPATIENT_POINTS, REJECTED_POINTS, Reputation
from kaisar_p2p.mesh.yamux_stream import MuxedStream
from kaisar_p2p.wire.verdict import Verdict

from libp2p.pubsub.pb import rpc_pb2  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError  # isort: skip

log = logging.getLogger(__name__)

PROTOCOL = "/meshsub/1.1.0"
_STREAMS_PER_PEER = 4
_REOPEN_S, _REOPEN_MAX_S = 0.25, 30.0

Validator = Callable[[bytes, bytes, bytes, float], tuple[Verdict, str]]


@dataclass(frozen=True, slots=True)
class GossipMessage:
    """An accepted message: `sender` forwarded it, `author` signed it, `received_at` is Unix time in seconds."""

    topic: str
    data: bytes
    sender: bytes
    author: bytes
    received_at: float


@dataclass(frozen=True)
class _Subscription:
    name: str
    validate: Validator
    worker: trio.CapacityLimiter | None
    send: trio.MemorySendChannel[GossipMessage]
    receive: trio.MemoryReceiveChannel[GossipMessage]


class Gossip:
    """Publish and subscribe on one network; `run` is its life."""

    def __init__(
        self, network: Network, key: SigningKey, prefix: str, reputation: Reputation, rng: random.Random
    ) -> None:
        self._network = network
        self._key, self._own = key, bytes(key.verify_key)
        self._prefix = prefix
        self._limits = network.limits
        self._reputation = reputation
        self._router = Router(rng, lambda peer: reputation.mesh_score(peer, trio.current_time()))
        self._seen = SeenMessages(self._limits.seen_messages, self._limits.seen_s)
        self._subscriptions: dict[str, _Subscription] = {}  # by full topic
        self._links: dict[bytes, Link] = {}
        self._sequence = time.time_ns()  # libp2p starts at seconds: a restarted node repeats ids that its peers know
        self._nursery: trio.Nursery | None = None
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[str] = Counter()
        network.handlers[PROTOCOL] = self._receive

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Heartbeats, and the writing tasks of all peers."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(self._limits.heartbeat_s)
                now = trio.current_time()
                self._seen.expire(now)
                for peer, control in self._router.heartbeat(now).items():
                    self._send_control(peer, control)

    # -- our side -----------------------------------------------------------------------------------------------------

    def subscribe(
        self, name: str, validate: Validator, *, queue: int, heavy: bool
    ) -> trio.MemoryReceiveChannel[GossipMessage]:
        """Take part in a topic; see `Mesh.subscribe`."""
        topic = self._topic(name)
        if topic in self._subscriptions:
            raise ValueError(f"topic {name} has a subscriber")
        send, receive = trio.open_memory_channel[GossipMessage](queue)
        worker = trio.CapacityLimiter(1) if heavy else None  # of its own: no topic waits for what another costs
        self._subscriptions[topic] = _Subscription(name, validate, worker, send, receive)
        self._router.join(topic)
        announcement = wire.subscriptions_frame([topic], True)
        for link in self._links.values():
            link.push_control(announcement)
        return receive.clone()

    def publish(self, name: str, data: bytes) -> None:
        """Sign a message and queue it for the peers."""
        if len(data) > self._limits.message_bytes:
            raise LimitExceeded(f"a message of {len(data)} bytes exceeds {self._limits.message_bytes}")
        self._sequence += 1
        message = wire.sign(self._key, self._topic(name), data, self._sequence)
        self._seen.add(message.id, trio.current_time())
        self._forward(message, own=True, exclude=())
        self.verdicts[name, "published"] += 1

    def subscribers(self, name: str) -> list[bytes]:
        """Connected peers that announced a topic."""
        return self._router.subscribers(self._topic(name))

    def dropped_frames(self) -> int:
        """Frames that gave way in the queues of the present peers."""
        return sum(link.dropped for link in self._links.values())

    def _topic(self, name: str) -> str:
        return f"{self._prefix}/{name}/1"

    # -- peers --------------------------------------------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> None:
        """Start writing to a peer, if that has not started."""
        key = connection.key
        if key in self._links:
            self.reroute(connection)  # the newest connection is the one that is surely alive
            return
        assert self._nursery is not None
        link = self._links[key] = Link(self._limits, trio.current_time())
        self._router.add_peer(key, outbound=not connection.inbound)
        self._nursery.start_soon(self._send_to, key, link)

    def reroute(self, connection: Connection) -> None:
        """Another connection with the peer of this one is to be written to."""
        link = self._links.get(connection.key)
        if link is not None and link.sending is not None:
            link.sending.cancel()

    async def _send_to(self, key: bytes, link: Link) -> None:
        """Write to a peer for as long as there is a connection, over its newest one."""
        failures = 0
        try:
            while (connection := self._network.connection_to(key)) is not None:
                try:
                    await self._send_over(connection, link)
                    failures = 0
                except (RequestFailed, MuxedStreamError, MuxedConnUnavailable, trio.TooSlowError) as error:
                    log.debug("no gossip stream to %s: %r", key.hex()[:12], error)
                    failures += 1
                if self._network.connection_to(key) is connection:
                    with trio.move_on_after(min(_REOPEN_S * 2**failures, _REOPEN_MAX_S)):
                        await connection.event_closed.wait()
        finally:
            del self._links[key]
            self._router.remove_peer(key)

    async def _send_over(self, connection: Connection, link: Link) -> None:
        """Open the gossip stream and write to it, until it ends or a newer connection is there."""
        stream = connection.muxer.open_stream_nowait()
        try:
            with trio.fail_after(self._limits.negotiation_s):
                await stream.write(proposal(PROTOCOL))
                await confirm(stream, PROTOCOL)
            if self._network.connection_to(connection.key) is not connection:
                return  # a better one came meanwhile
            self._announce(link)
            async with trio.open_nursery() as nursery:
                link.sending, link.stream = nursery.cancel_scope, stream
                nursery.start_soon(self._cancel_at_end, stream, nursery.cancel_scope)
                await self._write_batches(connection, stream, link)
                nursery.cancel_scope.cancel()
        finally:
            link.sending = link.stream = None
            stream.reset_nowait()

    async def _write_batches(self, connection: Connection, stream: MuxedStream, link: Link) -> None:
        while True:
            batch = await link.next_batch()
            if stream.write_nowait(batch):
                continue
            try:
                with trio.fail_after(self._limits.send_stall_s):
                    await stream.write(batch)
            except trio.TooSlowError:
                log.warning("peer %s does not read its gossip: disconnecting", connection.key.hex()[:12])
                connection.muxer.abort()
                return
            except MuxedStreamError:
                return

    @staticmethod
    async def _cancel_at_end(stream: MuxedStream, scope: trio.CancelScope) -> None:
        """Nothing comes back on this stream but its end; without noticing that we would write into the void."""
        try:
            while True:
                await stream.read()
        except (MuxedStreamEOF, MuxedStreamError):
            scope.cancel()

    def _announce(self, link: Link) -> None:
        if self._subscriptions:
            link.push_control(wire.subscriptions_frame(self._subscriptions, True))

    # -- receiving ----------------------------------------------------------------------------------------------------

    async def _receive(self, connection: Connection, stream: MuxedStream) -> None:
        """Read a peer's gossip stream until it ends; garbage costs the peer its connection."""
        link = self._links.get(connection.key)
        if link is None or link.inbound_streams >= _STREAMS_PER_PEER:
            stream.reset_nowait()
            return
        link.inbound_streams += 1
        self._announce(link)  # a peer that opens a stream anew may have lost what it knew of us
        try:
            await self._read_frames(connection, stream, link)
        except MalformedGossip as error:
            self._punish(connection.key, f"malformed gossip: {error}")
        except (MuxedStreamEOF, MuxedStreamError):
            pass
        finally:
            link.inbound_streams -= 1
            stream.reset_nowait()

    async def _read_frames(self, connection: Connection, stream: MuxedStream, link: Link) -> None:
        reader = wire.FrameReader(max(1 << 20, 2 * self._limits.message_bytes))
        while True:
            data = await stream.read(WRITE_BYTES)
            now = trio.current_time()
            received_at = time.time() - (now - stream.waiting_since)  # our own backlog is not the sender's delay
            wait_s = link.bytes_bucket.take(len(data), now)
            for rpc, _size in reader.feed(data):
                wait_s = max(wait_s, link.messages_bucket.take(len(rpc.publish), trio.current_time()))
                await self._on_rpc(connection.key, rpc, received_at)
            if wait_s > 0:
                await trio.sleep(wait_s)

    async def _on_rpc(self, sender: bytes, rpc: rpc_pb2.RPC, received_at: float) -> None:
        if len(rpc.subscriptions) > 4 * MAX_TOPICS_PER_PEER:
            raise MalformedGossip("too many subscriptions")
        for change in rpc.subscriptions:
            self._router.on_subscription(sender, change.topicid, change.subscribe)
        for message in rpc.publish:
            await self._on_message(sender, message, received_at)
        if rpc.HasField("control"):
            self._on_control(sender, rpc.control)

    async def _on_message(self, sender: bytes, message: rpc_pb2.Message, received_at: float) -> None:
        message_id = wire.id_of_message(message)
        if message_id in self._seen:
            self.verdicts["", "duplicate"] += 1
            return
        published = wire.read(message, self._limits.message_bytes)
        subscription = self._subscriptions.get(published.topic)
        if subscription is None or published.author == self._own:
            self.verdicts["", "unwanted"] += 1
            return
        if not wire.signature_is_valid(message, published.author):
            raise MalformedGossip("the author's signature is wrong")
        self._seen.add(message_id, trio.current_time())
        verdict, reason = await self._judge(subscription, published, sender, received_at)
        self.verdicts[subscription.name, verdict.value] += 1
        if verdict is Verdict.ACCEPT:
            self._network.credit(sender)
            self._forward(published, own=False, exclude=(sender, published.author))
            self._deliver(
                subscription, GossipMessage(subscription.name, published.data, sender, published.author, received_at)
            )
        elif verdict is Verdict.REJECT:
            self._on_reject(subscription.name, sender, published.author, reason)

    async def _judge(
        self, subscription: _Subscription, published: Published, sender: bytes, received_at: float
    ) -> tuple[Verdict, str]:
        arguments = (published.data, sender, published.author, received_at)
        try:
            if subscription.worker is not None:
                verdict, reason = await trio.to_thread.run_sync(
                    subscription.validate, *arguments, limiter=subscription.worker, abandon_on_cancel=True
                )
            else:
                verdict, reason = subscription.validate(*arguments)
            return verdict, reason
        except Exception:  # the edge: a bug of ours must not be held against the sender
            log.exception("the validator of topic %s failed", subscription.name)
            return Verdict.IGNORE, "validator failed"

    def _deliver(self, subscription: _Subscription, message: GossipMessage) -> None:
        """Queue for our subscriber; when it is slow, the oldest message gives way."""
        try:
            subscription.send.send_nowait(message)
        except trio.WouldBlock:
            self.dropped[subscription.name] += 1
            try:
                subscription.receive.receive_nowait()
                subscription.send.send_nowait(message)
            except trio.WouldBlock:  # a queue of length 0 without a reader
                return

    def _on_reject(self, name: str, sender: bytes, author: bytes, reason: str) -> None:
        log.info("rejected on %s from %s: %s", name, sender.hex()[:12], reason)
        points = REJECTED_POINTS if sender == author else FORWARDED_POINTS
        if self._reputation.penalise(sender, points, trio.current_time()):
            self._disconnect(sender, f"too many rejected messages, last on {name}: {reason}")

    def _punish(self, key: bytes, reason: str) -> None:
        self._reputation.ban(key, trio.current_time())
        self._disconnect(key, reason)

    def _disconnect(self, key: bytes, reason: str) -> None:
        left_s = self._reputation.ban_left_s(key, trio.current_time())
        log.warning("disconnecting and refusing peer %s for %.0f s: %s", key.hex()[:12], left_s, reason)
        for connection in self._network.connections_with(key):
            connection.muxer.abort()

    # -- forwarding and control ---------------------------------------------------------------------------------------

    def _forward(self, message: Published, *, own: bool, exclude: Iterable[bytes]) -> None:
        frame = wire.publish_frame(message.raw)
        self._router.cache.put(message.id, message.topic, frame)
        for peer in self._router.targets(message.topic, own=own, exclude=exclude):
            link = self._links.get(peer)
            if link is not None:
                link.push(frame)

    def _on_control(self, sender: bytes, control: rpc_pb2.ControlMessage) -> None:
        now = trio.current_time()
        link = self._links.get(sender)
        if link is None:
            return
        if control.graft:
            answer, impatient = self._router.on_graft(
                sender, [g.topicID for g in control.graft[:MAX_TOPICS_PER_PEER]], now
            )
            self._send_control(sender, answer)
            if impatient and self._reputation.penalise(sender, IMPATIENT_POINTS, now):
                self._disconnect(sender, "insists on joining topic meshes")
        for prune in control.prune[:MAX_TOPICS_PER_PEER]:
            self._router.on_prune(sender, prune.topicID, float(prune.backoff or 60), now)
        if control.ihave:
            offers = [(offer.topicID, offer.messageIDs[:MAX_OFFERED_IDS]) for offer in control.ihave]
            self._send_control(sender, self._router.on_ihave(sender, offers, self._seen.__contains__))
        for request in control.iwant:
            for message_id in request.messageIDs[:MAX_OFFERED_IDS]:
                frame = self._router.cache.resend(message_id, sender)
                if frame is not None:
                    link.push(frame)

    def _send_control(self, peer: bytes, control: Control) -> None:
        link = self._links.get(peer)
        if link is None or not (control.graft or control.prune or control.ihave or control.iwant):
            return
        rpc = rpc_pb2.RPC()
        for topic in control.graft:
            rpc.control.graft.add(topicID=topic)
        for topic, backoff_s in control.prune:
            rpc.control.prune.add(topicID=topic, backoff=int(backoff_s))
        for topic, ids in control.ihave.items():
            rpc.control.ihave.add(topicID=topic, messageIDs=ids)
        if control.iwant:
            rpc.control.iwant.add(messageIDs=control.iwant)
        link.push_control(wire.frame(rpc.SerializeToString()))
