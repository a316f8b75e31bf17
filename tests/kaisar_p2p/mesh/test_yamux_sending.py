"""What all connections together hold of what they send: counted exactly, bounded, the worst gives way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.noise import MAX_PLAINTEXT
from kaisar_p2p.mesh.yamux_outbox import CROWDED_BYTES, FAIR_BYTES, Outbox, SendingBytes

MIB = 1 << 20


@dataclass(eq=False)
class Sender:
    held_bytes: int
    stuck: float
    ended: bool = False

    def stuck_s(self, _now: float) -> float:
        return self.stuck

    def give_way(self) -> None:
        self.ended = True


@dataclass(eq=False)
class Stream:
    outgoing_bytes: int
    scheduled: bool = False

    @property
    def has_outgoing(self) -> bool:
        return self.outgoing_bytes > 0

    def take_outgoing(self, batch: list[bytes], most: int) -> int:
        size = min(most, self.outgoing_bytes)
        batch.append(bytes(size))
        self.outgoing_bytes -= size
        return size


def test_who_holds_most_and_does_not_move_ends_and_no_more_than_it_takes() -> None:
    sending = SendingBytes(4 * MIB)
    worst, second, moving, small = (
        Sender(2 * MIB, 9.0), Sender(MIB, 9.0), Sender(3 * MIB, 0.1), Sender(FAIR_BYTES, 9.0),
    )  # fmt: skip
    sending.senders |= {worst, second, moving, small}
    sending.held = 5 * MIB
    sending.relieve(100.0)
    assert [each.ended for each in (worst, second, moving, small)] == [True, False, False, False]


def test_when_all_hold_too_much_a_connection_may_queue_a_little() -> None:
    sending = SendingBytes(4 * MIB)
    hog, outbox = Outbox(sending), Outbox(sending)
    any_stream: Any = Stream(3 * MIB)
    outbox.add(any_stream, 2 * FAIR_BYTES)
    assert not outbox.crowded and 2 * FAIR_BYTES < CROWDED_BYTES
    sending.held = 5 * MIB
    assert outbox.crowded and not hog.crowded


@given(st.lists(st.integers(1, 300_000), max_size=20), st.integers(0, 12), st.booleans())
def test_what_is_held_is_counted_until_it_has_left(sizes: list[int], batches: int, cut_off: bool) -> None:
    async def run() -> None:
        sending = SendingBytes(MIB)
        outbox, streams = Outbox(sending), [Stream(size) for size in sizes]
        for one in streams:
            stream: Any = one
            outbox.add(stream, one.outgoing_bytes)
        assert sending.held == sum(sizes)
        for _ in range(batches):
            if not any(one.outgoing_bytes for one in streams):
                break
            batch = await outbox.next_batch()
            on_way = len(batch) if len(batch) <= MAX_PLAINTEXT else 2 * len(batch)
            assert sending.held == outbox.held_bytes == sum(one.outgoing_bytes for one in streams) + on_way
            if not cut_off:
                outbox.sent(len(batch), 0.001)
            else:
                break
        outbox.close()
        for one in streams:
            outbox.remove(one.outgoing_bytes)
        assert sending.held == 0

    trio.run(run)


async def test_answers_that_nobody_reads_do_not_add_up(lab) -> None:
    """Ten peers ask for much and read nothing; another gets its answers, and memory is counted back to nothing."""
    victim = await lab.mesh(sending_bytes=MIB // 2)
    answer = os.urandom(2 * MIB)

    async def serve(stream: Any) -> None:
        await stream.receive_frame()
        await stream.send_frame(answer)

    victim.serve("/big", serve, max_frame_bytes=1024)
    sending = victim._network.upgrader.sending
    assert sending.held == 0
    honest = await lab.mesh()
    honest.keep_connected(victim.key, victim.addrs)
    with trio.fail_after(20):
        await honest.wait_connected()
        for _ in range(3):
            assert await honest.request(victim.key, "/big", b"", deadline_s=15, max_reply_bytes=4 * MIB) == answer
    assert sending.held < FAIR_BYTES
