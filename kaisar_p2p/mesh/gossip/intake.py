"""Received messages on their way to a verdict: the important first, all senders alike, nothing without a bound.

Usually a message is judged where it was read. Only when that takes longer than `STEP_S` do messages wait, in a queue
for each priority, and one task judges them, a little at a time. What costs much to judge goes to a worker thread of
its topic, past the same kind of queue. Whatever gives way is dropped as IGNORE: our backlog is nobody's fault.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kaisar_p2p.mesh.failure_log import FailureLog
from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.gossip.queues import FairQueue, PriorityQueues
from kaisar_p2p.mesh.gossip.turns import STEP_S, Turns, worked_s
from kaisar_p2p.mesh.gossip.wire import Published
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.wire.verdict import Verdict

log = logging.getLogger(__name__)
failures = FailureLog(log)

_CHANCES = 4  # rounds of the scheduler in which a full subscriber may take something
_THREAD_BATCH = 8  # messages of one visit to the worker thread: it costs as much as two signature checks
_OVERHEAD_BYTES = 1024  # that a waiting message costs beside its own bytes

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
class Subscription:
    """What we do with a topic's messages. `priority` is 0 for the most important."""

    name: str
    validate: Validator
    priority: int
    send: trio.MemorySendChannel[GossipMessage]
    receive: trio.MemoryReceiveChannel[GossipMessage]
    heavy: FairQueue[Arrival] | None

    @property
    def full(self) -> bool:
        """The next message makes our subscriber lose one."""
        used = self.send.statistics()
        return used.current_buffer_used >= used.max_buffer_size


@dataclass(slots=True)
class Arrival:
    """A message that has no verdict yet; `others` are peers that sent it too."""

    message: Published
    sender: bytes
    received_at: float
    subscription: Subscription
    others: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that it holds while it waits."""
        return len(self.message.raw) + len(self.message.data) + _OVERHEAD_BYTES


Judgement = tuple[Verdict, str] | None
"""None when the signature is wrong."""


def judgement_of(arrival: Arrival) -> Judgement:
    """Check the signature, and ask the topic's validator. Never raises."""
    message, validate = arrival.message, arrival.subscription.validate
    if not wire.signature_is_valid(message):
        return None
    try:
        verdict, reason = validate(message.data, arrival.sender, message.author, arrival.received_at)
        return verdict, reason
    except Exception:  # noqa: BLE001  (the edge: a bug of ours must not be held against the sender)
        failures.exception(f"the validator of topic {arrival.subscription.name} failed")
        return Verdict.IGNORE, "validator failed"


def _judgements_of(arrivals: list[Arrival]) -> list[Judgement]:
    return [judgement_of(arrival) for arrival in arrivals]


class Intake:
    """Calls `conclude` with the judgement of each message, and `lost` with what gave way. Neither may raise."""

    def __init__(
        self,
        limits: MeshLimits,
        turns: Turns,
        conclude: Callable[[Arrival, Judgement], None],
        lost: Callable[[Arrival], None],
    ) -> None:
        self.pending: dict[bytes, Arrival] = {}  # by the whole message: an altered one must not stand in its way
        self._limits, self._turns = limits, turns
        self._conclude, self._lost = conclude, lost
        self._queues = PriorityQueues[Arrival](limits.inbound_messages, limits.inbound_bytes)
        self._working = False
        self._busy: set[str] = set()  # heavy topics with a task
        self._inline_until = self._next_turn = 0.0
        self._nursery: trio.Nursery | None = None

    def run_in(self, nursery: trio.Nursery) -> None:
        """Tasks live in this nursery; they exist only while there is something to do."""
        self._nursery = nursery

    def heavy_queue(self) -> FairQueue[Arrival]:
        """The queue of a topic whose messages cost much to judge."""
        return FairQueue(self._limits.inbound_messages // 4, self._limits.inbound_bytes // 4)

    @property
    def crowded(self) -> bool:
        """So much waits that senders should be read more slowly."""
        return self._working and self._queues.crowded

    def begin_turn(self) -> None:
        """Something was read: some of it may be judged at once, but not all the time, whoever sends it."""
        now = time.perf_counter()
        if now >= self._next_turn:
            self._inline_until, self._next_turn = now + STEP_S, now + 2 * STEP_S

    def put(self, arrival: Arrival) -> None:
        """Judge a message, now or later."""
        if not self._working and time.perf_counter() < self._inline_until and not arrival.subscription.full:
            self._judge(arrival)
            return
        self.pending[arrival.message.raw] = arrival
        self._give_way(self._queues.put(arrival, arrival.subscription.priority))
        if not self._working:
            assert self._nursery is not None
            self._working = True
            self._nursery.start_soon(self._work)

    def _give_way(self, lost: list[Arrival]) -> None:
        for arrival in lost:
            self.pending.pop(arrival.message.raw, None)
            self._lost(arrival)

    async def _work(self) -> None:
        """Turns of judging. A subscriber whose queue is full gets a chance to make room before it loses a message."""
        slow: set[str] = set()  # had the chance and did not take it
        full: Subscription | None = None
        try:
            while self._queues:
                await trio.lowlevel.checkpoint()
                await self._turns.rest()
                if full is not None and not await self._makes_room(full):
                    slow.add(full.name)
                full, until, began = None, time.perf_counter() + STEP_S, worked_s()
                while self._queues and full is None and time.perf_counter() < until:
                    subscription = self._judge_next()
                    if not subscription.full:
                        slow.discard(subscription.name)
                    elif subscription.name not in slow:
                        full = subscription
                self._turns.spend(worked_s() - began)
        finally:
            self._working = False

    @staticmethod
    async def _makes_room(subscription: Subscription) -> bool:
        for _ in range(_CHANCES):
            if not subscription.full:
                return True
            await trio.lowlevel.checkpoint()
        return not subscription.full

    def _judge_next(self) -> Subscription:
        arrival = self._queues.take()
        subscription = arrival.subscription
        late = time.time() - arrival.received_at > self._limits.inbound_wait_s
        if late and subscription.priority > 0:  # news that are this late only delay those behind them
            self._give_way([arrival])
        else:
            self._judge(arrival)
        return subscription

    def _judge(self, arrival: Arrival) -> None:
        heavy, name = arrival.subscription.heavy, arrival.subscription.name
        if heavy is None:
            self.pending.pop(arrival.message.raw, None)
            self._conclude(arrival, judgement_of(arrival))
            return
        self.pending[arrival.message.raw] = arrival
        self._give_way(heavy.put(arrival))
        if name not in self._busy:
            assert self._nursery is not None
            self._busy.add(name)
            self._nursery.start_soon(self._work_heavy, name, heavy)

    async def _work_heavy(self, name: str, heavy: FairQueue[Arrival]) -> None:
        """A worker of its own for each topic: none waits for what another costs."""
        limiter = trio.CapacityLimiter(1)
        try:
            while heavy:
                batch = [heavy.take() for _ in range(min(len(heavy), _THREAD_BATCH))]
                judgements = await trio.to_thread.run_sync(
                    _judgements_of, batch, limiter=limiter, abandon_on_cancel=True
                )
                for arrival, judgement in zip(batch, judgements, strict=True):
                    self.pending.pop(arrival.message.raw, None)
                    self._conclude(arrival, judgement)
        finally:
            self._busy.discard(name)
