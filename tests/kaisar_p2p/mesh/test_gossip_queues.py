"""Queues: bounds hold whatever comes, the important goes first, every sender has its turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.gossip.link import Link, QueuedBytes
from kaisar_p2p.mesh.gossip.queues import LEAST_IMPORTANT, PRIORITIES, FairQueue, PriorityQueues
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.yamux_stream import FRAME_BYTES


@dataclass(frozen=True)
class Item:
    sender: bytes
    number: int
    size: int = 1


def test_each_sender_has_its_turn_however_much_one_sends() -> None:
    queue = FairQueue[Item](1000, 1000)
    for number in range(100):
        queue.put(Item(b"flooder", number))
    queue.put(Item(b"honest", 0))
    assert [queue.take().sender for _ in range(3)] == [b"flooder", b"honest", b"flooder"]


def test_the_sender_with_the_most_loses_its_oldest() -> None:
    queue = FairQueue[Item](3, 1000)
    assert not queue.put(Item(b"honest", 0))
    lost = [item for number in range(5) for item in queue.put(Item(b"flooder", number))]
    assert lost == [Item(b"flooder", number) for number in range(3)]


def test_an_item_over_the_limit_of_bytes_gives_way_itself() -> None:
    queue = FairQueue[Item](10, 100)
    huge = Item(b"a", 0, 200)
    assert queue.put(huge) == [huge]
    assert not queue and queue.bytes == 0
    with pytest.raises(IndexError):
        queue.take()


def test_the_least_important_give_way_first_and_wait_longest() -> None:
    queues = PriorityQueues[Item](4, 1000)
    for number in range(4):
        queues.put(Item(b"flooder", number), LEAST_IMPORTANT)
    assert queues.crowded
    assert queues.put(Item(b"honest", 9), 0) == [Item(b"flooder", 0)]
    assert queues.put(Item(b"honest", 8), 1) == [Item(b"flooder", 1)]
    assert [queues.take() for _ in range(2)] == [Item(b"honest", 9), Item(b"honest", 8)]


def test_what_is_least_important_does_not_displace_the_rest() -> None:
    queues = PriorityQueues[Item](4, 1000)
    for number in range(4):
        queues.put(Item(b"a", number), 0)
    late = Item(b"b", 0)
    assert queues.put(late, LEAST_IMPORTANT) == [late]


STEPS = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, PRIORITIES - 1), st.integers(1, 30), st.booleans()),
    max_size=60,
)


@given(STEPS)
def test_nothing_is_lost_unnoticed_and_bounds_hold(steps: list[tuple[bytes, int, int, bool]]) -> None:
    queues = PriorityQueues[Item](8, 100)
    inside: dict[Item, int] = {}
    for number, (sender, priority, size, take) in enumerate(steps):
        item = Item(sender, number, size)
        inside[item] = priority
        for lost in queues.put(item, priority):
            del inside[lost]
        assert len(queues) == len(inside) <= 8
        assert sum(item.size for item in inside) <= 100
        if take and inside:
            taken = inside.pop(queues.take())
            assert all(taken <= other for other in inside.values())
    while inside:
        priority = inside.pop(queues.take())
        assert all(priority <= other for other in inside.values())


# -- links: what waits for one peer -----------------------------------------------------------------------------------


class FakeStream:
    """Takes what it is told to take."""

    def __init__(self) -> None:
        self.open = True
        self.written: list[bytes] = []

    def write_nowait(self, data: bytes) -> bool:
        if self.open:
            self.written.append(data)
        return self.open


def link(**limits: int) -> tuple[Link, Counter[tuple[str, int]]]:
    dropped: Counter[tuple[str, int]] = Counter()
    return Link(MeshLimits(**limits), 0.0, dropped, QueuedBytes(1 << 30)), dropped  # type: ignore[arg-type]


def test_a_link_sends_control_first_then_by_importance_in_one_piece() -> None:
    made, _ = link()
    made.push(b"1", "t", b"\x12\x01c", 2)
    made.push(b"2", "t", b"\x12\x01b", 1)
    made.push(b"3", "t", b"\x12\x01a", 0)
    made.push_control(b"control")
    made.stream = stream = FakeStream()  # type: ignore[assignment]
    made.flush()
    assert stream.written == [b"control" + b"\x09" + b"\x12\x01a\x12\x01b\x12\x01c"]  # type: ignore[attr-defined]
    assert len(made) == 0


def test_a_link_that_is_full_drops_the_oldest_of_the_least_important() -> None:
    made, dropped = link(outbound_frames=4)
    for number in range(6):
        made.push(b"low%d" % number, "advert", b"x", 2)
    made.push(b"high", "certificate", b"y", 0)
    assert dropped == {("advert", 2): 3}
    made.stream = stream = FakeStream()  # type: ignore[assignment]
    made.flush()
    assert stream.written == [b"\x04yxxx"]  # type: ignore[attr-defined]


def test_what_the_peer_sends_us_is_withdrawn() -> None:
    made, _ = link()
    made.push(b"1", "t", b"a", 1)
    made.push(b"1", "t", b"a", 1)
    made.push(b"2", "t", b"b", 1)
    made.withdraw(b"1")
    made.withdraw(b"unknown")
    assert len(made) == 1
    assert made.has_news({b"1"}) and not made.has_news({b"2"})


def test_a_stream_that_is_slow_keeps_one_batch_waiting_and_the_rest_in_order() -> None:
    made, dropped = link(outbound_frames=10)
    made.stream = stream = FakeStream()  # type: ignore[assignment]
    stream.open = False  # type: ignore[attr-defined]
    made.push(b"1", "t", b"a", 1)
    made.flush()
    assert made.unsent == b"\x01a"
    made.push(b"2", "t", b"b", 1)
    made.flush()
    assert made.unsent == b"\x01a" and len(made) == 1 and not dropped


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 70_000)), max_size=30))
def test_batches_are_bounded_and_complete(messages: list[tuple[int, int]]) -> None:
    made, dropped = link(outbound_frames=1000)
    for number, (priority, size) in enumerate(messages):
        made.push(b"%d" % number, "t", bytes([number]) * size, priority)
    made.stream = stream = FakeStream()  # type: ignore[assignment]
    made.flush()
    assert not dropped and len(made) == 0
    largest = max((size for _, size in messages), default=0)
    assert all(len(batch) <= max(FRAME_BYTES, largest + 3) for batch in stream.written)  # type: ignore[attr-defined]
    sent = sum(map(len, stream.written))  # type: ignore[attr-defined]
    assert 0 <= sent - sum(size for _, size in messages) <= 3 * len(messages)


def links(count: int, most: int, **limits: int) -> tuple[list[Link], QueuedBytes, Counter[tuple[str, int]]]:
    dropped: Counter[tuple[str, int]] = Counter()
    everywhere = QueuedBytes(most)
    bounds = MeshLimits(**limits)  # type: ignore[arg-type]
    return [Link(bounds, 0.0, dropped, everywhere) for _ in range(count)], everywhere, dropped


def test_what_waits_for_several_peers_counts_once() -> None:
    made, everywhere, _ = links(10, 1 << 20)
    for link in made:
        link.push(b"1", "t", bytes(1000), 1)
    assert everywhere.held == 1000
    for link in made[1:]:
        link.withdraw(b"1")
    assert everywhere.held == 1000
    made[0].drop_down_to(0)
    assert everywhere.held == 0


def test_over_the_bound_of_all_the_link_with_the_most_loses() -> None:
    (slow, honest), everywhere, dropped = links(2, 1 << 20)
    honest.push(b"h", "certificate", bytes(1000), 0)
    for number in range(30):
        slow.push(b"%d" % number, "advert", bytes(50_000), 2)
    assert everywhere.held <= 1 << 20
    assert honest.queued_bytes == 1000 and slow.queued_bytes >= 900_000
    assert set(dropped) == {("advert", 2)}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 3)), max_size=80))
def test_all_queues_together_hold_what_is_counted(steps: list[tuple[int, int, int]]) -> None:
    made, everywhere, _ = links(4, 60_000, outbound_frames=6)
    for number, message, action in steps:
        if action == 0:
            made[number].withdraw(b"%d" % message)
        elif action == 1:
            made[number].stream = FakeStream()  # type: ignore[assignment]
            made[number].flush()
            made[number].stream = None
        else:
            made[number].push(b"%d" % message, "t", bytes(1000 * (1 + message)), message % 3)
        waiting = {key: len(entry) for link in made for queue in link._messages for key, (_, entry) in queue.items()}
        assert everywhere.held == sum(waiting.values()) <= 60_000
    for link in made:
        link.shrink(0)
    assert everywhere.held == 0 and not everywhere._waits and not everywhere._links


def test_control_has_a_bound_in_bytes() -> None:
    made, _ = link()
    for _ in range(100):
        made.push_control(bytes(10_000))
    assert len(made) == 6
    made.stream = FakeStream()  # type: ignore[assignment]
    made.flush()
    made.push_control(bytes(150_000))
    assert len(made) == 1
