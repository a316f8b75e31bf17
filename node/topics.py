"""Gossip topics: who validates what, and in which lane of the inbox an accepted message waits.

Validation runs on receipt, against the state at that moment; the verdict decides whether the mesh forwards the message
and what its sender pays for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from kaisar_p2p.mesh import GossipMessage, Mesh
from kaisar_p2p.mesh.limits import PeerBuckets
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.envelope import Verified
from kaisar_p2p.wire.verdict import Verdict
from node.inbox import Inbox, Lane
from protocols.actions import Gossip
from protocols.adverts import validate_advert, validate_heartbeat
from protocols.deploy import validate_lease
from protocols.epoch_gossip import validate_epoch
from protocols.equivocation import EVIDENCE, accused, validate_evidence
from protocols.interpreter.state import State
from protocols.popw import validate_assignment, validate_certificate
from protocols.quorum import QuorumCertificate

Validate = Callable[[bytes, float, State], tuple[Verdict, str, Any]]

SEEN = 16_384
REFUSED = 4_096
SUBJECTS = 8_192
QUEUE = 256
PARSED = 2 * QUEUE
"""More than the mesh can hold of a topic: what it queues, and what is being judged."""


@dataclass(frozen=True)
class Topic:
    """`heavy` messages carry many signatures and are checked in a worker thread. When the mesh cannot keep up, topics
    of a higher `priority` number wait and give way: what settles money 0, what keeps others honest 1, the rest 2.

    Of one subject (`subject_of`), `burst` messages are accepted and forwarded, then `rate_per_s`: what its author can
    sign without end would otherwise fill every link of the network.
    """

    validate: Validate
    lane: Lane
    heavy: bool = False
    priority: int = 2
    rate_per_s: float = 10.0
    burst: int = 10_000


TOPICS: dict[str, Topic] = {
    "advert": Topic(validate_advert, Lane.ADVERT, rate_per_s=1.0, burst=30),
    "heartbeat": Topic(validate_heartbeat, Lane.ADVERT, rate_per_s=1.0, burst=30),
    "assignment": Topic(validate_assignment, Lane.ADVERT, priority=1, burst=300),
    "certificate": Topic(validate_certificate, Lane.CERTIFICATE, heavy=True, priority=0),
    "evidence": Topic(validate_evidence, Lane.EPOCH, heavy=True, priority=1, rate_per_s=0.1, burst=100),
    "epoch": Topic(validate_epoch, Lane.EPOCH, priority=0, rate_per_s=2.0, burst=60),
    "lease": Topic(validate_lease, Lane.LEASE, heavy=True, priority=0, burst=600),
}
VARIANTS, VARIANTS_PER_S = 12, 0.02
"""Certificates on one core: half a dozen aggregators may make one each, but any T of their signatures are another."""


def digest_of(name: str, data: bytes) -> bytes:
    """Identity of a message on a topic: the same bytes on another topic say nothing about it."""
    return sha256(name.encode(), b"/", data)


def subject_of(message: Any) -> bytes:
    """Whose message it is: the signer's, or of the core that a certificate is about, or of the key that is accused."""
    match message:
        case Verified():
            return message.signer
        case QuorumCertificate():
            return sha256(encode(message.core))
        case _ if isinstance(message, EVIDENCE):
            return accused(message)
        case _:
            return b""


class Seen:
    """Digests of messages, the newest ones: of those that were accepted, or of those that were refused."""

    def __init__(self, most: int = SEEN) -> None:
        self._most = most
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def add(self, digest: bytes) -> None:
        """Remember; the oldest is forgotten."""
        self._digests[digest] = None
        if len(self._digests) > self._most:
            self._digests.popitem(last=False)

    def forget(self, digest: bytes) -> None:
        """It did not reach us after all: the next copy is welcome."""
        self._digests.pop(digest, None)


class Switchboard:
    """Subscribes to every topic and turns accepted messages into events."""

    def __init__(self, inbox: Inbox, state: Callable[[], State], own_key: bytes, now: Callable[[], float]) -> None:
        self._inbox = inbox
        self._state = state
        self._own_key = own_key
        self._now = now
        self._seen = Seen()
        self._refused = Seen(REFUSED)
        self._parsed: dict[str, OrderedDict[bytes, Any]] = {name: OrderedDict() for name in TOPICS}
        self._shares = {
            name: PeerBuckets(topic.rate_per_s, topic.burst, peers=SUBJECTS) for name, topic in TOPICS.items()
        }
        self._variants = {name: PeerBuckets(VARIANTS_PER_S, VARIANTS, peers=SUBJECTS) for name in TOPICS}

    async def run(self, mesh: Mesh, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; started once all topics are subscribed."""
        async with trio.open_nursery() as nursery:
            for name, topic in TOPICS.items():
                channel = mesh.subscribe(
                    name, self._validator(name, topic), queue=QUEUE, heavy=topic.heavy, priority=topic.priority
                )
                nursery.start_soon(self._deliver, name, topic, channel)
            task_status.started()

    def echo(self, name: str, data: bytes) -> None:
        """Our own gossip, for our own machines: validated like anybody's, so that a mistake of ours shows."""
        topic, digest = TOPICS[name], digest_of(name, data)
        if digest in self._seen:
            return
        verdict, _, message = topic.validate(data, self._now(), self._state())
        if verdict is Verdict.ACCEPT and self._inbox.put(topic.lane, Gossip(name, message, self._own_key, self._now())):
            self._seen.add(digest)

    def _validator(self, name: str, topic: Topic) -> Callable[[bytes, bytes, bytes, float], tuple[Verdict, str]]:
        def validate(data: bytes, sender: bytes, author: bytes, received_at: float) -> tuple[Verdict, str]:
            digest = digest_of(name, data)
            # [IGNORE] the same bytes were accepted before: a replay, or another peer's copy
            if digest in self._seen:
                return Verdict.IGNORE, "duplicate"
            # [REJECT] what costs much to refuse is refused once
            if topic.heavy and digest in self._refused:
                return Verdict.REJECT, "refused before"
            verdict, reason, message = topic.validate(data, received_at, self._state())
            if verdict is Verdict.REJECT and topic.heavy:
                self._refused.add(digest)
            # [IGNORE] its author, or its subject, has had its share
            if verdict is Verdict.ACCEPT and not self._has_share(name, message):
                return Verdict.IGNORE, "more than its share"
            if verdict is Verdict.ACCEPT:
                self._seen.add(digest)
                self._keep(name, digest, message)
            return verdict, reason

        return validate

    def _has_share(self, name: str, message: Any) -> bool:
        kind, subject = self._variants if isinstance(message, QuorumCertificate) else self._shares, subject_of(message)
        return not subject or kind[name].try_take(subject, self._now())

    def _keep(self, name: str, digest: bytes, message: Any) -> None:
        """Until it is delivered, or the mesh's queue has dropped it: the oldest gives way there and here."""
        parsed = self._parsed[name]
        parsed[digest] = message
        while len(parsed) > PARSED:
            self._seen.forget(parsed.popitem(last=False)[0])

    async def _deliver(self, name: str, topic: Topic, channel: trio.MemoryReceiveChannel[GossipMessage]) -> None:
        async for received in channel:
            self._hand_on(name, topic, received)
            with suppress(trio.WouldBlock):
                while True:  # `async for` takes one in each round of the scheduler: too few in a flood
                    self._hand_on(name, topic, channel.receive_nowait())

    def _hand_on(self, name: str, topic: Topic, received: GossipMessage) -> None:
        digest = digest_of(name, received.data)
        message = self._parsed[name].pop(digest, None)
        if message is None:
            return
        if not self._inbox.put(topic.lane, Gossip(name, message, received.sender, received.received_at)):
            self._seen.forget(digest)
