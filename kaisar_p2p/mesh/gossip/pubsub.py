"""Gossip: from a peer's bytes to a verdict to our subscribers and on to other peers.

Own data path instead of libp2p's Pubsub, which cannot say IGNORE, starts a task for every message, reads lengths
byte by byte, verifies the sender's record with every RPC, and dies of a bad key. One task per peer reads here;
`intake` judges what is new, the important first; `sending` writes what has gathered meanwhile.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Iterable

import trio
from nacl.signing import SigningKey

from kaisar_p2p.errors import LimitExceeded
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.gossip.intake import Arrival, GossipMessage, Intake, Judgement, Subscription, Validator
from kaisar_p2p.mesh.gossip.link import Link
from kaisar_p2p.mesh.gossip.queues import LEAST_IMPORTANT
from kaisar_p2p.mesh.gossip.router import MAX_OFFERED_IDS, MAX_TOPICS_PER_PEER, Control, Router
from kaisar_p2p.mesh.gossip.seen import AuthorSequences, SeenMessages
from kaisar_p2p.mesh.gossip.sending import PROTOCOL, Outbox
from kaisar_p2p.mesh.gossip.turns import Turns, worked_s
from kaisar_p2p.mesh.gossip.unfinished import Unfinished, UnfinishedRpcs
from kaisar_p2p.mesh.gossip.wire import MalformedGossip, Published
from kaisar_p2p.mesh.guard.reputation import FORWARDED_POINTS, IMPATIENT_POINTS, REJECTED_POINTS, Reputation
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream
from kaisar_p2p.wire.verdict import Verdict

from libp2p.pubsub.pb import rpc_pb2  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError  # isort: skip

__all__ = ["PROTOCOL", "Gossip", "GossipMessage", "Validator"]

log = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_STREAMS_PER_PEER = 2  # the second for a new connection while the old one dies
_SILENT_S = 5.0  # a stream that has been silent for so long gives way to a new one
_LARGEST_RPC = 1 << 20
_CHUNK = 32  # messages of one peer, between two looks at its rate
_DUPLICATE_COST = 0.25  # of a new message, for the rate
_CROWDED_S = 0.02  # that a peer is not read when too much waits to be judged
_BROKEN_POINTS = 1.0  # an offered message that did not come, at most one each heartbeat


class Gossip:
    """Publish and subscribe on one network; `run` is its life."""

    def __init__(
        self, network: Network, key: SigningKey, prefix: str, reputation: Reputation, rng: random.Random
    ) -> None:
        self._network = network
        self._key, self._own = key, bytes(key.verify_key)
        self._prefix = prefix
        self._limits = limits = network.limits
        self._reputation = reputation
        self._router = Router(rng, lambda peer: reputation.mesh_score(peer, trio.current_time()))
        self._seen = SeenMessages(limits.seen_messages, limits.seen_s)
        self._authors = AuthorSequences(limits.authors, limits.seen_s, limits.author_s)
        self._subscriptions: dict[str, Subscription] = {}  # by full topic
        self._outbox = Outbox(network, rng, self._announcement, self._router.remove_peer)
        self._turns = Turns()
        self._intake = Intake(limits, self._turns, self._conclude, self._on_lost)
        self._rpc_bytes = max(_LARGEST_RPC, 2 * limits.message_bytes)
        most = max(limits.unfinished_bytes, self._rpc_bytes)
        self._unfinished = UnfinishedRpcs(most, self._rpc_bytes, limits.send_stall_s)
        self._sequence = 0
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[str] = Counter()
        self._drops: Counter[tuple[str, str, int]] = Counter()
        network.handlers[PROTOCOL] = self._receive

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Heartbeats, and the tasks that judge and write."""
        async with trio.open_nursery() as nursery:
            self._intake.run_in(nursery)
            nursery.start_soon(self._outbox.run, nursery)
            await trio.lowlevel.checkpoint()
            task_status.started()
            while True:
                await trio.sleep(self._limits.heartbeat_s)
                self._heartbeat(trio.current_time())

    def _heartbeat(self, now: float) -> None:
        self._seen.expire(now)
        for peer in self._router.broken_promises(self._seen.__contains__, now):
            if not self._intake.crowded:  # otherwise it may have come, and given way here
                self._penalise(peer, _BROKEN_POINTS, "offers messages and does not send them")
        for peer in self._unfinished.stalled(now):
            log.warning("peer %s does not finish its gossip: disconnecting", peer.hex()[:12])
            self._abort(peer)
        for peer, control in self._router.heartbeat(now).items():
            self._send_control(peer, control)

    # -- our side -----------------------------------------------------------------------------------------------------

    def subscribe(
        self, name: str, validate: Validator, *, queue: int, heavy: bool, priority: int
    ) -> trio.MemoryReceiveChannel[GossipMessage]:
        """Take part in a topic; see `Mesh.subscribe`."""
        topic = self._topic(name)
        if topic in self._subscriptions:
            raise ValueError(f"topic {name} has a subscriber")
        if not 0 <= priority <= LEAST_IMPORTANT:
            raise ValueError(f"a priority is 0 to {LEAST_IMPORTANT}, not {priority}")
        send, receive = trio.open_memory_channel[GossipMessage](queue)
        worker = self._intake.heavy_queue() if heavy else None
        self._subscriptions[topic] = Subscription(name, validate, priority, send, receive, worker)
        self._router.join(topic)
        self._outbox.control_to_all(wire.subscriptions_frame([topic], True))
        return receive.clone()

    def publish(self, name: str, data: bytes) -> None:
        """Sign a message and queue it for the peers."""
        if len(data) > self._limits.message_bytes:
            raise LimitExceeded(f"a message of {len(data)} bytes exceeds {self._limits.message_bytes}")
        # libp2p's starts at seconds: a restarted node repeats ids that its peers know
        self._sequence = max(self._sequence + 1, time.time_ns())
        message = wire.sign(self._key, self._topic(name), data, self._sequence)
        self._seen.add(message.id, trio.current_time())
        self._forward(message, own=True, exclude=())
        self.verdicts[name, "published"] += 1

    def subscribers(self, name: str) -> list[bytes]:
        """Connected peers that announced a topic."""
        return self._router.subscribers(self._topic(name))

    def dropped_frames(self) -> int:
        """Messages that gave way in the queues of peers."""
        return self._outbox.dropped.total()

    def drops(self) -> dict[tuple[str, str, int], int]:
        """Messages that gave way, by place (inbound, outbound, subscriber), topic and priority."""
        outbound = {
            ("outbound", self._name(topic), priority): count
            for (topic, priority), count in self._outbox.dropped.items()
        }
        return {**self._drops, **outbound}

    def _topic(self, name: str) -> str:
        return f"{self._prefix}/{name}/1"

    def _name(self, topic: str) -> str:
        return topic.removeprefix(f"{self._prefix}/").removesuffix("/1")

    def _priority(self, topic: str) -> int:
        subscription = self._subscriptions.get(topic)
        return LEAST_IMPORTANT if subscription is None else subscription.priority

    def _announcement(self) -> bytes | None:
        return wire.subscriptions_frame(self._subscriptions, True) if self._subscriptions else None

    def on_connected(self, connection: Connection) -> None:
        """Start writing to a peer, if that has not started."""
        if self._outbox.on_connected(connection):
            self._router.add_peer(connection.key, outbound=not connection.inbound)

    def reroute(self, connection: Connection) -> None:
        """Another connection with the peer of this one is to be written to."""
        self._outbox.reroute(connection)

    # -- receiving ----------------------------------------------------------------------------------------------------

    async def _receive(self, connection: Connection, stream: MuxedStream) -> None:
        """Read a peer's gossip stream until it ends; garbage costs the peer its connection."""
        link = self._outbox.links.get(connection.key)
        if link is None or not self._make_room(link):
            stream.reset_nowait()
            return
        link.inbound.append(stream)
        self._outbox.announce_to(link)  # a peer that opens a stream anew may have lost what it knew of us
        try:
            await self._read_frames(connection.key, stream, link)
        except MalformedGossip as error:
            self._punish(connection.key, f"malformed gossip: {error}")
        except (MuxedStreamEOF, MuxedStreamError):
            pass
        finally:
            link.inbound.remove(stream)
            stream.reset_nowait()

    @staticmethod
    def _make_room(link: Link) -> bool:
        """One more stream may begin: a peer whose connections died opens one on the next."""
        if len(link.inbound) < _STREAMS_PER_PEER:
            return True
        oldest = min(link.inbound, key=lambda stream: stream.waiting_since)
        if trio.current_time() - oldest.waiting_since < _SILENT_S:
            return False
        oldest.reset_nowait()
        return True

    async def _read_frames(self, sender: bytes, stream: MuxedStream, link: Link) -> None:
        part = Unfinished(sender, stream)
        try:
            await self._read_rpcs(part, link)
        finally:
            self._unfinished.discard(part)

    async def _read_rpcs(self, part: Unfinished, link: Link) -> None:
        reader, sender, stream = wire.FrameReader(self._rpc_bytes), part.sender, part.stream
        while True:
            data = await stream.read(_READ_BYTES)
            now = trio.current_time()
            received_at = time.time() - (now - stream.waiting_since)  # our own backlog is not the sender's delay
            wait_s = link.bytes_bucket.take(len(data), now)
            await self._turns.rest()
            self._intake.begin_turn()
            rpcs = reader.feed(data, _CHUNK)
            while True:
                if reader.unfinished_bytes or part.size:
                    self._unfinished.update(part, reader.unfinished_bytes, now)
                for rpc in rpcs:
                    await self._on_rpc(sender, link, rpc, received_at)
                if len(rpcs) < _CHUNK:
                    break
                rpcs = reader.more(_CHUNK)
            if wait_s > 0 or self._intake.crowded:
                await trio.sleep(max(wait_s, _CROWDED_S))

    async def _on_rpc(self, sender: bytes, link: Link, rpc: bytes, received_at: float) -> None:
        began = worked_s()
        messages, fields = wire.split(rpc)
        cost = self._on_rest(sender, wire.rest_of(fields)) if fields else 0.0
        if not rpc:
            cost = _DUPLICATE_COST
        for start in range(0, max(1, len(messages)), _CHUNK):
            cost += self._on_messages(sender, link, messages[start : start + _CHUNK], received_at)
            wait_s = link.messages_bucket.take(cost, trio.current_time())
            cost = 0.0
            rests = self._turns.spend(worked_s() - began)
            if rests:
                await self._turns.rest()
            if wait_s > 0:
                await trio.sleep(wait_s)
            began = worked_s()

    def _on_messages(self, sender: bytes, link: Link, messages: list[bytes], received_at: float) -> float:
        """Admit what is new; what the messages cost, in messages, for the sender's rate."""
        duplicates, now = 0, trio.current_time()
        for raw in messages:
            message_id = wire.id_of(raw)
            if message_id in self._seen:
                self._outbox.on_copy(link, message_id, now)
                duplicates += 1
            elif (pending := self._intake.pending.get(raw)) is not None:
                duplicates += 1
                if sender not in pending.others:
                    pending.others.append(sender)
            else:
                self._admit(sender, raw, received_at)
        self.verdicts["", "duplicate"] += duplicates
        return len(messages) - duplicates + duplicates * _DUPLICATE_COST

    def _admit(self, sender: bytes, raw: bytes, received_at: float) -> None:
        message = wire.read(raw, self._limits.message_bytes)
        self._router.on_kept_promise(sender, message.id)
        subscription = self._subscriptions.get(message.topic)
        if subscription is None or message.author == self._own:
            self.verdicts["", "unwanted"] += 1
        elif self._authors.is_replay(message.author, message.sequence, trio.current_time()):
            self.verdicts["", "replay"] += 1
        else:
            self._intake.put(Arrival(message, sender, received_at, subscription))

    def _on_lost(self, arrival: Arrival) -> None:
        """A message gave way to others before it had a verdict: dropped, nobody's fault."""
        name = arrival.subscription.name
        self.verdicts[name, Verdict.IGNORE.value] += 1
        self._drops["inbound", name, arrival.subscription.priority] += 1

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _conclude(self, arrival: Arrival, judgement: Judgement) -> None:
        message, subscription, sender = arrival.message, arrival.subscription, arrival.sender
        if judgement is None:
            self._punish(sender, "malformed gossip: the author's signature is wrong")
            return
        if message.id in self._seen:
            self.verdicts["", "duplicate"] += 1
            return
        now = trio.current_time()
        self._seen.add(message.id, now)
        verdict, reason = judgement
        self.verdicts[subscription.name, verdict.value] += 1
        if verdict is Verdict.ACCEPT:
            self._authors.accepted(message.author, message.sequence, now)
            self._network.credit(sender)
            self._forward(message, own=False, exclude=(sender, message.author, *arrival.others))
            name, data, author = subscription.name, message.data, message.author
            self._deliver(subscription, GossipMessage(name, data, sender, author, arrival.received_at))
        elif verdict is Verdict.REJECT:
            log.info("rejected on %s from %s: %s", subscription.name, sender.hex()[:12], reason)
            points = REJECTED_POINTS if sender == message.author else FORWARDED_POINTS
            self._penalise(sender, points, f"too many rejected messages, last on {subscription.name}: {reason}")

    def _deliver(self, subscription: Subscription, message: GossipMessage) -> None:
        """Queue for our subscriber; when it is slow, the oldest message gives way."""
        try:
            subscription.send.send_nowait(message)
        except trio.WouldBlock:
            self.dropped[subscription.name] += 1
            self._drops["subscriber", subscription.name, subscription.priority] += 1
            try:
                subscription.receive.receive_nowait()
                subscription.send.send_nowait(message)
            except trio.WouldBlock:  # a queue of length 0 without a reader
                return

    def _penalise(self, key: bytes, points: float, reason: str) -> None:
        if self._reputation.penalise(key, points, trio.current_time()):
            self._disconnect(key, reason)

    def _punish(self, key: bytes, reason: str) -> None:
        self._reputation.ban(key, trio.current_time())
        self._disconnect(key, reason)

    def _disconnect(self, key: bytes, reason: str) -> None:
        left_s = self._reputation.ban_left_s(key, trio.current_time())
        log.warning("disconnecting and refusing peer %s for %.0f s: %s", key.hex()[:12], left_s, reason)
        self._abort(key)

    def _abort(self, key: bytes) -> None:
        for connection in self._network.connections_with(key):
            connection.muxer.abort()

    # -- forwarding and control ---------------------------------------------------------------------------------------

    def _forward(self, message: Published, *, own: bool, exclude: Iterable[bytes]) -> None:
        entry = message.entry
        self._router.cache.put(message.id, message.topic, entry)
        targets = self._router.targets(message.topic, own=own, exclude=exclude)
        self._outbox.send(message.id, message.topic, entry, targets, self._priority(message.topic), own=own)

    def _on_rest(self, sender: bytes, rpc: rpc_pb2.RPC) -> float:
        """Subscriptions and control; what they cost, in messages, for the sender's rate."""
        if len(rpc.subscriptions) > 4 * MAX_TOPICS_PER_PEER:
            raise MalformedGossip("too many subscriptions")
        for change in rpc.subscriptions:
            self._router.on_subscription(sender, change.topicid, change.subscribe)
        if rpc.HasField("control"):
            self._on_control(sender, rpc.control)
        return 1.0 + rpc.ByteSize() / 1024

    def _on_control(self, sender: bytes, control: rpc_pb2.ControlMessage) -> None:
        now = trio.current_time()
        if control.graft:
            topics = [g.topicID for g in control.graft[:MAX_TOPICS_PER_PEER]]
            answer, impatient = self._router.on_graft(sender, topics, now)
            self._send_control(sender, answer)
            if impatient:
                self._penalise(sender, IMPATIENT_POINTS, "insists on joining topic meshes")
        for prune in control.prune[:MAX_TOPICS_PER_PEER]:
            self._router.on_prune(sender, prune.topicID, float(prune.backoff or 60), now)
        if control.ihave:
            first = control.ihave[:MAX_TOPICS_PER_PEER]
            offers = [(offer.topicID, offer.messageIDs[:MAX_OFFERED_IDS]) for offer in first]
            self._send_control(sender, self._router.on_ihave(sender, offers, self._seen.__contains__, now))
        for request in control.iwant[:MAX_TOPICS_PER_PEER]:
            ids = request.messageIDs[:MAX_OFFERED_IDS]
            for message_id, topic, entry in self._router.on_iwant(sender, ids):
                self._outbox.send(message_id, topic, entry, (sender,), self._priority(topic), own=True)

    def _send_control(self, peer: bytes, control: Control) -> None:
        if not (control.graft or control.prune or control.ihave or control.iwant):
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
        self._outbox.control(peer, wire.frame(rpc.SerializeToString()))
