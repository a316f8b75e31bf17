"""Who gets which gossip: the mesh of GossipSub v1.1, without IO
(https://github.com/libp2p/specs/tree/master/pubsub/gossipsub).

Peers are machine keys. Every method that takes `now` judges by it; randomness is the generator given. What has to
be sent is returned as `Control` per peer. Kept from the specification: degrees, backoff after PRUNE, IHAVE and
IWANT with limits, flood publishing of our own messages, an outbound quota against eclipse by inbound connections.
Left out: peer exchange in PRUNE (the mesh has its own), fanout (a node subscribes to what it publishes, or floods),
the library's score (the mesh judges by verdicts).
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

DEGREE = 6
DEGREE_LOW = 4
DEGREE_HIGH = 12
DEGREE_OUTBOUND = 2
LAZY_DEGREE = 6
FLOOD_PEERS = 20  # that get our own messages directly
HISTORY = 5  # heartbeats that a message can be asked for
GOSSIPED = 3  # heartbeats that a message is offered
PRUNE_BACKOFF_S = 60.0
MAX_BACKOFF_S = 10 * PRUNE_BACKOFF_S
_GRAFTS_PER_S = 2  # of a topic, from peers for which there is no place: what many peers may cost
MAX_TOPICS_PER_PEER = 64
MAX_OFFERED_IDS = 500  # in one IHAVE, and asked of one peer per heartbeat
MAX_OFFERS = 10  # IHAVE messages of one peer per heartbeat
MAX_REQUESTS = 1000  # ids that one peer may ask for per heartbeat
MAX_RESENDS = 3  # of one message to one peer
MAX_ID_BYTES = 64  # of an id that we ask for
PROMISE_S = 3.0  # after which an offered message that we asked for should be here
MAX_TOPIC_LENGTH = 128
_OVERHEAD_BYTES = 512  # that a cached message costs beside its own bytes
_BACKOFFS = 16_384  # remembered; the oldest give way


@dataclass
class Control:
    """What to send to one peer."""

    graft: list[str] = field(default_factory=list)
    prune: list[tuple[str, float]] = field(default_factory=list)  # topic, backoff in seconds
    ihave: dict[str, list[bytes]] = field(default_factory=dict)
    iwant: list[bytes] = field(default_factory=list)


@dataclass
class _Peer:
    outbound: bool
    topics: set[str] = field(default_factory=set)
    offers: int = 0  # IHAVE messages in this heartbeat
    asked: int = 0  # ids asked for in this heartbeat
    requests: int = 0  # ids that it asked for in this heartbeat
    promise: tuple[bytes, float] | None = None  # an id that we asked it for, and until when it should be here


class MessageCache:
    """The messages of the last heartbeats, to answer IWANT with."""

    def __init__(self, max_bytes: int = 6 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, tuple[str, bytes]] = OrderedDict()  # id → topic, message
        self._windows: deque[list[bytes]] = deque([[]], maxlen=HISTORY)
        self._resends: dict[bytes, dict[bytes, int]] = {}  # id → peer → times

    def put(self, message_id: bytes, topic: str, entry: bytes) -> None:
        """Keep a message as it is sent; the oldest give way above the limit of bytes."""
        self._entries[message_id] = (topic, entry)
        self._windows[-1].append(message_id)
        self._bytes += len(entry) + _OVERHEAD_BYTES
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def resend(self, message_id: bytes, peer: bytes) -> tuple[str, bytes] | None:
        """Topic and message for a peer that asks; None when it is gone or was asked for too often."""
        known = self._entries.get(message_id)
        if known is None:
            return None
        times = self._resends.setdefault(message_id, {})
        times[peer] = times.get(peer, 0) + 1
        return known if times[peer] <= MAX_RESENDS else None

    def recent(self, topic: str) -> list[bytes]:
        """Ids to offer."""
        windows = list(self._windows)[-GOSSIPED:]
        return [i for window in windows for i in window if i in self._entries and self._entries[i][0] == topic]

    def shift(self) -> None:
        """A heartbeat has passed."""
        if len(self._windows) == HISTORY:
            for message_id in self._windows[0]:
                self._drop(message_id)
        self._windows.append([])

    def _drop(self, message_id: bytes) -> None:
        entry = self._entries.pop(message_id, None)
        self._resends.pop(message_id, None)
        if entry is not None:
            self._bytes -= len(entry[1]) + _OVERHEAD_BYTES


class Router:
    """Topic meshes of one node."""

    def __init__(self, rng: random.Random, score: Callable[[bytes], float]) -> None:
        self._rng = rng
        self._score = score
        self._peers: dict[bytes, _Peer] = {}
        self._backoff: dict[tuple[str, bytes], float] = {}
        self.mesh: dict[str, set[bytes]] = {}
        self.cache = MessageCache()

    # -- membership ---------------------------------------------------------------------------------------------------

    def add_peer(self, peer: bytes, *, outbound: bool) -> None:
        """A peer can be sent gossip."""
        self._peers.setdefault(peer, _Peer(outbound)).outbound = outbound

    def remove_peer(self, peer: bytes) -> None:
        """A peer is gone."""
        self._peers.pop(peer, None)
        for members in self.mesh.values():
            members.discard(peer)

    def join(self, topic: str) -> None:
        """Take part in a topic; the next heartbeat fills its mesh."""
        self.mesh.setdefault(topic, set())

    def on_subscription(self, peer: bytes, topic: str, subscribe: bool) -> None:
        """A peer announced or withdrew a subscription; of topics that are not ours, MAX_TOPICS_PER_PEER are kept."""
        state = self._peers.get(peer)
        if state is None:
            return
        if not subscribe:
            state.topics.discard(topic)
            self.mesh.get(topic, set()).discard(peer)
        elif topic in self.mesh or (len(state.topics) < MAX_TOPICS_PER_PEER and len(topic) <= MAX_TOPIC_LENGTH):
            state.topics.add(topic)

    def subscribers(self, topic: str) -> list[bytes]:
        """Peers that announced the topic."""
        return [peer for peer, state in self._peers.items() if topic in state.topics]

    # -- messages -----------------------------------------------------------------------------------------------------

    def targets(self, topic: str, *, own: bool, exclude: Iterable[bytes]) -> list[bytes]:
        """Peers to send a message to: the mesh, and for our own messages everybody up to FLOOD_PEERS."""
        targets = set(self.mesh.get(topic, ()))
        if own or len(targets) < DEGREE_LOW:
            targets |= self._choose(topic, FLOOD_PEERS if own else DEGREE, targets)
        targets.difference_update(exclude)
        return list(targets)

    def _choose(
        self,
        topic: str,
        total: int,
        have: set[bytes],
        *,
        now: float | None = None,
        among: Iterable[bytes] | None = None,
    ) -> set[bytes]:
        candidates = [
            peer
            for peer in (self.subscribers(topic) if among is None else among)
            if peer not in have
            and self._score(peer) >= 0
            and (now is None or self._backoff.get((topic, peer), 0.0) <= now)
        ]
        count = min(len(candidates), max(0, total - len(have)))
        return set(self._rng.sample(candidates, count))

    # -- control ------------------------------------------------------------------------------------------------------

    def on_graft(self, peer: bytes, topics: Iterable[str], now: float) -> tuple[Control, bool]:
        """A peer wants into our meshes: the refusals, and whether it asked although it was told to wait."""
        answer, impatient = Control(), False
        state = self._peers.get(peer)
        for topic in topics:
            members = self.mesh.get(topic)
            if members is None or state is None or peer in members:
                continue  # unknown topics are not answered: that would make us an amplifier
            early = self._backoff.get((topic, peer), 0.0) > now
            full = len(members) >= DEGREE_HIGH and not state.outbound
            if early or full or self._score(peer) < 0:
                impatient |= early
                self._refuse(answer, peer, topic, now, self._backoff_s if full else PRUNE_BACKOFF_S)
            else:
                members.add(peer)
                state.topics.add(topic)
        return answer, impatient

    def _refuse(self, answer: Control, peer: bytes, topic: str, now: float, backoff_s: float = PRUNE_BACKOFF_S) -> None:
        self._wait(topic, peer, now + backoff_s)
        answer.prune.append((topic, backoff_s))

    @property
    def _backoff_s(self) -> float:
        """After which a peer may ask again for a place that there was not: the more peers, the less often each."""
        return min(max(PRUNE_BACKOFF_S, len(self._peers) // _GRAFTS_PER_S), MAX_BACKOFF_S)

    def on_prune(self, peer: bytes, topic: str, backoff_s: float, now: float) -> None:
        """A peer removed us from its mesh: do the same, and wait before asking again."""
        members = self.mesh.get(topic)
        if members is not None:
            members.discard(peer)
            self._wait(topic, peer, now + min(max(backoff_s, 1.0), MAX_BACKOFF_S))

    def _wait(self, topic: str, peer: bytes, until: float) -> None:
        """No GRAFT before this time, ours or theirs."""
        self._backoff.pop((topic, peer), None)
        self._backoff[(topic, peer)] = until
        if len(self._backoff) > _BACKOFFS:
            del self._backoff[next(iter(self._backoff))]

    def on_ihave(
        self, peer: bytes, offers: Iterable[tuple[str, Iterable[bytes]]], seen: Callable[[bytes], bool], now: float
    ) -> Control:
        """A peer offers messages: ask for those that we have not seen, within limits.

        One of them, chosen at random, it has then promised: see `broken_promises`.
        """
        state, answer = self._peers.get(peer), Control()
        if state is None or self._score(peer) < 0:
            return answer
        for topic, ids in offers:
            state.offers += 1
            if state.offers > MAX_OFFERS or topic not in self.mesh:
                continue
            wanted = [i for i in ids if len(i) <= MAX_ID_BYTES and not seen(i)]
            wanted = wanted[: max(0, MAX_OFFERED_IDS - state.asked)]
            state.asked += len(wanted)
            answer.iwant += wanted
        if answer.iwant and state.promise is None:
            state.promise = (self._rng.choice(answer.iwant), now + PROMISE_S)
        return answer

    def on_iwant(self, peer: bytes, ids: Iterable[bytes]) -> list[tuple[bytes, str, bytes]]:
        """A peer asks for messages: id, topic and message of each that it may have."""
        state, found = self._peers.get(peer), []
        for message_id in ids:
            if state is None or state.requests >= MAX_REQUESTS:
                break
            state.requests += 1
            if (known := self.cache.resend(message_id, peer)) is not None:
                found.append((message_id, *known))
        return found

    def on_kept_promise(self, peer: bytes, message_id: bytes) -> None:
        """A peer sent this message."""
        state = self._peers.get(peer)
        if state is not None and state.promise is not None and state.promise[0] == message_id:
            state.promise = None

    def broken_promises(self, seen: Callable[[bytes], bool], now: float) -> list[bytes]:
        """Peers that offered a message, were asked for it, and did not send it, nor did anybody else."""
        broken: list[bytes] = []
        for peer, state in self._peers.items():
            if state.promise is not None and (seen(state.promise[0]) or now >= state.promise[1]):
                if not seen(state.promise[0]):
                    broken.append(peer)
                state.promise = None
        return broken

    # -- heartbeat ----------------------------------------------------------------------------------------------------

    def heartbeat(self, now: float) -> dict[bytes, Control]:
        """Repair the meshes, offer recent messages outside them; to be called every second."""
        out: dict[bytes, Control] = {}
        for state in self._peers.values():
            state.offers = state.asked = state.requests = 0
        self._backoff = {key: until for key, until in self._backoff.items() if until > now}
        for topic, members in self.mesh.items():
            self._repair(topic, members, out, now)
            self._offer(topic, members, out)
        self.cache.shift()
        return out

    def _repair(self, topic: str, members: set[bytes], out: dict[bytes, Control], now: float) -> None:
        for peer in [p for p in members if self._score(p) < 0]:
            members.discard(peer)
            self._refuse(out.setdefault(peer, Control()), peer, topic, now)
        if len(members) < DEGREE_LOW:
            self._graft(topic, members, self._choose(topic, DEGREE, members, now=now), out)
        elif len(members) > DEGREE_HIGH:
            self._shrink(topic, members, out, now)
        self._keep_outbound(topic, members, out, now)

    def _graft(self, topic: str, members: set[bytes], peers: Iterable[bytes], out: dict[bytes, Control]) -> None:
        for peer in peers:
            members.add(peer)
            out.setdefault(peer, Control()).graft.append(topic)

    def _shrink(self, topic: str, members: set[bytes], out: dict[bytes, Control], now: float) -> None:
        ranked = list(members)
        self._rng.shuffle(ranked)
        ranked.sort(key=self._score, reverse=True)
        outbound = [peer for peer in ranked if self._peers[peer].outbound][:DEGREE_OUTBOUND]
        kept = outbound + [peer for peer in ranked if peer not in outbound][: DEGREE - len(outbound)]
        for peer in members.difference(kept):
            members.discard(peer)
            self._refuse(out.setdefault(peer, Control()), peer, topic, now, self._backoff_s)

    def _keep_outbound(self, topic: str, members: set[bytes], out: dict[bytes, Control], now: float) -> None:
        """Also in a mesh that is full: those who dial us cannot fill it and choose what we hear."""
        missing = DEGREE_OUTBOUND - sum(self._peers[peer].outbound for peer in members)
        if missing <= 0 or len(members) < DEGREE_LOW:
            return
        outbound = [peer for peer, state in self._peers.items() if state.outbound and topic in state.topics]
        self._graft(topic, members, self._choose(topic, len(members) + missing, members, now=now, among=outbound), out)

    def _offer(self, topic: str, members: set[bytes], out: dict[bytes, Control]) -> None:
        ids = self.cache.recent(topic)[-MAX_OFFERED_IDS:]
        if ids:
            for peer in self._choose(topic, len(members) + LAZY_DEGREE, members):
                out.setdefault(peer, Control()).ihave[topic] = ids
