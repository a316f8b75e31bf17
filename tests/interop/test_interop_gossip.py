"""Signed gossip with js-libp2p and go-libp2p at meshsub 1.1: a thousand messages both ways, and through them."""

from __future__ import annotations

import pytest
import trio

from benchmarks.peers.interface import HEAD_BYTES, Message, Peer
from tests.interop.conftest import TOPIC, eventually, subscribed

pytestmark = pytest.mark.interop

COUNT = 1000
UNDERWAY = 30  # messages that have not arrived: the daemon's queue for its subscriber has 32 places, on any machine


async def collect(peer: Peer, count: int) -> list[Message]:
    """The next messages with a number."""
    found: list[Message] = []
    with trio.fail_after(30):
        while len(found) < count:
            message = await peer.messages.receive()
            if len(message.data) >= HEAD_BYTES:
                found.append(message)
    return found


def numbers(messages: list[Message]) -> list[int]:
    return sorted(int.from_bytes(message.data[8:HEAD_BYTES], "big") for message in messages)


async def test_a_thousand_messages_both_ways(pair) -> None:
    await subscribed(*pair)
    received: dict[str, list[Message]] = {peer.key: [] for peer in pair}

    async def publish(sender: Peer, receiver: Peer) -> None:
        for number in range(COUNT):
            while number - len(received[receiver.key]) >= UNDERWAY:
                received[receiver.key] += await collect(receiver, 1)
            await sender.publish(TOPIC, bytes(8) + number.to_bytes(4, "big") + bytes(288))
        received[receiver.key] += await collect(receiver, COUNT - len(received[receiver.key]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, *pair)
        nursery.start_soon(publish, *reversed(pair))
    for receiver, sender in (pair, reversed(pair)):
        assert numbers(received[receiver.key]) == list(range(COUNT))  # none lost, none twice
        assert {message.author for message in received[receiver.key]} == {sender.key}
    ours, _foreign = pair
    assert not [verdict for verdict in ours.mesh.statistics().messages if verdict[1] == "reject"]


async def test_large_messages(pair) -> None:
    """Several frames of Noise and of yamux each."""
    ours, foreign = pair
    await subscribed(ours, foreign)
    for sender, receiver in (pair, reversed(pair)):
        await sender.publish_many(TOPIC, count=10, size=200_000, rate_per_s=20)
        messages = await collect(receiver, 10)
        assert numbers(messages) == list(range(10))
        assert {len(message.data) for message in messages} == {200_000}


async def test_messages_pass_through_a_foreign_peer(lab, kind: str) -> None:
    """Two of ours know each other only over one of theirs, which forwards what they have signed."""
    left, middle, right = await lab.ours(), await lab.foreign(kind), await lab.ours()
    for outer in (left, right):
        await outer.dial(middle.addrs[0])
    await subscribed(left, middle, right)
    for sender, receiver in ((left, right), (right, left)):
        await sender.publish_many(TOPIC, count=100, size=300, rate_per_s=100)
        messages = await collect(receiver, 100)
        assert numbers(messages) == list(range(100))
        assert {message.author for message in messages} == {sender.key}
    assert left.key not in await right.peers()


async def test_who_leaves_a_topic_is_known(pair) -> None:
    ours, foreign = pair
    await subscribed(ours, foreign)
    assert await ours.subscribers(TOPIC) == [foreign.key]
    assert await foreign.subscribers(TOPIC) == [ours.key]
    await foreign.hang_up(ours.key)

    async def nobody() -> bool:
        return foreign.key not in await ours.subscribers(TOPIC)

    await eventually(nobody)
