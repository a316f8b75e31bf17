"""RPCs that have not arrived whole: a bound for all, a share for each peer, a deadline for who stands still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.gossip.pubsub import PROTOCOL
from kaisar_p2p.mesh.gossip.unfinished import Unfinished, UnfinishedRpcs
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal

KIB = 1024


@dataclass
class Stream:
    unread_bytes: int = 0
    was_reset: bool = False

    def reset_nowait(self) -> None:
        self.was_reset = True


def part(sender: bytes) -> Unfinished:
    stream: Any = Stream()
    return Unfinished(sender, stream)


def lost(one: Unfinished) -> bool:
    stream: Any = one.stream
    return bool(stream.was_reset)


def test_who_stands_still_gives_way_to_who_goes_on() -> None:
    rpcs = UnfinishedRpcs(1000 * KIB, 300 * KIB, 30.0)
    stuck = [part(bytes([n])) for n in range(4)]
    for one in stuck:
        rpcs.update(one, 240 * KIB, 0.0)
    honest = part(b"honest")
    for second in range(1, 16):
        rpcs.update(honest, 20 * KIB * second, float(second))
    assert not lost(honest)
    assert [lost(one) for one in stuck].count(True) == 2
    rpcs.update(honest, 0, 16.0)
    assert rpcs.bytes == 2 * 240 * KIB


def test_a_byte_now_and_then_is_no_progress() -> None:
    rpcs = UnfinishedRpcs(1000 * KIB, 300 * KIB, 30.0)
    slow, trickle = part(b"slow"), part(b"trickle")
    for second in range(40):
        rpcs.update(slow, 20 * KIB + 2 * KIB * second, float(second))
        rpcs.update(trickle, 20 * KIB + second, float(second))
    assert rpcs.stalled(40.0) == [b"trickle"]
    stream: Any = trickle.stream
    stream.unread_bytes = 1
    assert rpcs.stalled(40.0) == []


def test_a_peer_has_its_share_whatever_its_streams() -> None:
    rpcs = UnfinishedRpcs(1000 * KIB, 300 * KIB, 30.0)
    first, second = part(b"peer"), part(b"peer")
    rpcs.update(first, 200 * KIB, 0.0)
    rpcs.update(second, 90 * KIB, 1.0)
    assert not lost(first)
    rpcs.update(second, 200 * KIB, 2.0)
    assert lost(first) and not lost(second)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300 * KIB)), max_size=60))
def test_the_bound_holds_and_nothing_is_counted_twice(updates: list[tuple[int, int]]) -> None:
    rpcs = UnfinishedRpcs(700 * KIB, 300 * KIB, 30.0)
    parts = [part(bytes([n // 2])) for n in range(10)]
    for now, (number, size) in enumerate(updates):
        if not lost(parts[number]):
            rpcs.update(parts[number], size, float(now))
        assert 0 <= rpcs.bytes <= 700 * KIB
    for one in parts:
        rpcs.discard(one)
    assert rpcs.bytes == 0


async def test_who_does_not_finish_is_disconnected(lab) -> None:
    victim = await lab.mesh(send_stall_s=0.3, heartbeat_s=0.1)
    connection = await lab.attacker(victim)
    stream = connection.muxer.open_stream_nowait()
    await stream.write(proposal(PROTOCOL))
    await confirm(stream, PROTOCOL)
    await stream.write(b"\x80\x80\x0a\x12" + bytes(100_000))
    with trio.fail_after(10):
        await connection.event_closed.wait()
