"""Bounded queues for messages: the important before the rest, and all senders alike. No IO."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar

PRIORITIES = 3
LEAST_IMPORTANT = PRIORITIES - 1  # 0 is the most important


class Queued(Protocol):
    """What can wait: who sent it, and its size in bytes."""

    @property
    def sender(self) -> bytes:
        """Machine key of the peer that it came from."""

    @property
    def size(self) -> int:
        """Bytes that it holds."""


T = TypeVar("T", bound=Queued)


class FairQueue(Generic[T]):
    """One turn for each sender; when it is full, the sender with the most waiting loses its oldest."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._waiting: OrderedDict[bytes, deque[T]] = OrderedDict()  # by sender, in the order of their turns
        self._count = self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def put(self, item: T) -> list[T]:
        """Queue an item; returns what gave way, which can be the item itself."""
        waiting = self._waiting.get(item.sender)
        if waiting is None:
            waiting = self._waiting[item.sender] = deque()
        waiting.append(item)
        self._count += 1
        self.bytes += item.size
        lost: list[T] = []
        while self._count > self._most or self.bytes > self._most_bytes:
            lost.append(self.drop())
        return lost

    def take(self) -> T:
        """The next item; IndexError when there is none."""
        if not self._waiting:
            raise IndexError("nothing is waiting")
        sender, waiting = self._waiting.popitem(last=False)
        item = waiting.popleft()
        if waiting:
            self._waiting[sender] = waiting
        self._count -= 1
        self.bytes -= item.size
        return item

    def drop(self) -> T:
        """Remove the oldest item of the sender with the most."""
        sender = max(self._waiting, key=lambda key: len(self._waiting[key]))
        waiting = self._waiting[sender]
        item = waiting.popleft()
        if not waiting:
            del self._waiting[sender]
        self._count -= 1
        self.bytes -= item.size
        return item


class PriorityQueues(Generic[T]):
    """A fair queue for each priority with one bound for all: the least important give way first."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._queues = [FairQueue[T](most, most_bytes) for _ in range(PRIORITIES)]
        self._count = self._bytes = 0

    def __len__(self) -> int:
        return self._count

    @property
    def crowded(self) -> bool:
        """More than half full."""
        return 2 * self._count > self._most or 2 * self._bytes > self._most_bytes

    def put(self, item: T, priority: int) -> list[T]:
        """Queue an item; returns what gave way, which can be the item itself."""
        lost = self._queues[priority].put(item)
        self._add(1 - len(lost), item.size - sum(gone.size for gone in lost))
        while self._count > self._most or self._bytes > self._most_bytes:
            gone = next(queue for queue in reversed(self._queues) if queue).drop()
            self._add(-1, -gone.size)
            lost.append(gone)
        return lost

    def _add(self, count: int, size: int) -> None:
        self._count += count
        self._bytes += size

    def take(self) -> T:
        """The next item; IndexError when there is none."""
        for queue in self._queues:
            if queue:
                item = queue.take()
                self._add(-1, -item.size)
                return item
        raise IndexError("nothing is waiting")
