"""What all connections together hold of what they send: counted exactly, bounded, the worst gives way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh import Mesh, MeshStream
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.transport import yamux_outbox
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.mesh.transport.noise import MAX_PLAINTEXT
from kaisar_p2p.mesh.transport.yamux_frames import HEADER, WINDOW
from kaisar_p2p.mesh.transport.yamux_outbox import CROWDED_BYTES, FAIR_BYTES, Outbox, SendingBytes
from tests.kaisar_p2p.mesh.conftest import eventually

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


async def deaf(lab: Any, victim: Mesh) -> Connection:
    """A peer that asks for more than it may, and never reads a byte of TCP."""
    connection: Connection = await lab.attacker(victim)
    muxer = connection.muxer

    async def nothing(_most: int) -> memoryview:
        await trio.sleep_forever()
        raise AssertionError

    for _ in range(8):
        stream = muxer.open_stream_nowait()
        muxer.enqueue(HEADER.pack(0, WINDOW, 0, stream.stream_id, 1 << 30))
        await stream.write(proposal("/big") + bytes(4))
    muxer._session.receive = nothing  # type: ignore[method-assign]
    return connection


async def test_who_reads_nothing_gives_way_and_others_get_their_answers(lab, monkeypatch) -> None:
    monkeypatch.setattr(yamux_outbox, "_STUCK_S", 0.3)
    victim, honest = await lab.pair(sending_bytes=MIB, target_peers=0)
    answer = os.urandom(2 * MIB)

    async def serve(stream: MeshStream) -> None:
        await stream.receive_frame()
        await stream.send_frame(answer)

    victim.serve("/big", serve, max_frame_bytes=1024, rate_per_s=1000.0)
    sending = victim._network.upgrader.sending
    attackers = [await deaf(lab, victim) for _ in range(4)]
    await eventually(lambda: sending.too_many)
    with trio.fail_after(30):
        while victim.statistics().connections > 1:
            assert await honest.request(victim.key, "/big", b"", deadline_s=15, max_reply_bytes=4 * MIB) == answer
            assert sending.held < 2 * MIB
    assert victim.is_connected(honest.key) and attackers
    await eventually(lambda: sending.held == 0)
