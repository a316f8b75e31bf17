"""Megabytes in both directions, half-closed streams and resets."""

from __future__ import annotations

import pytest
import trio

from benchmarks.peers.interface import digest_of
from tests.interop.conftest import both_half_close

pytestmark = pytest.mark.interop

SIZE = 8_000_000
CHUNKS = [65536, 1000]


@pytest.mark.parametrize("chunk", CHUNKS)
async def test_what_is_sent_arrives(pair, chunk: int) -> None:
    ours, foreign = pair
    half_close = both_half_close(*pair)
    assert await ours.digest(foreign.key, SIZE, chunk, half_close=half_close) == digest_of(SIZE)
    assert await foreign.digest(ours.key, SIZE, chunk, half_close=half_close) == digest_of(SIZE)


async def test_what_is_fetched_arrives(pair) -> None:
    """The one who asks has finished sending long before; the end of the stream is the server's."""
    half_close = both_half_close(*pair)
    for asking, asked in (pair, reversed(pair)):
        fetched = await asking.fetch(asked.key, SIZE, 65536, digest=True, half_close=half_close)
        assert (fetched["count"], fetched["digest"]) == (SIZE, digest_of(SIZE))


async def test_both_directions_of_a_stream_at_once(pair) -> None:
    ours, foreign = pair
    half_close = both_half_close(*pair)
    assert await ours.echo(foreign.key, SIZE, 65536, half_close=half_close) == digest_of(SIZE)
    assert await foreign.echo(ours.key, SIZE, 65536, half_close=half_close) == digest_of(SIZE)


async def test_many_streams_at_once(pair) -> None:
    """Streams of both directions share the connection's windows without stalling each other."""
    ours, foreign = pair
    half_close, digests = both_half_close(*pair), []

    async def send(sender, receiver) -> None:
        digests.append(await sender.digest(receiver.key, SIZE // 8, 65536, half_close=half_close))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(send, ours, foreign)
            nursery.start_soon(send, foreign, ours)
    assert digests == [digest_of(SIZE // 8)] * 16


async def test_a_reset_is_noticed_and_costs_only_the_stream(pair) -> None:
    for one, other in (pair, reversed(pair)):
        await one.provoke_reset(other.key)
        await one.send_and_reset(other.key, 200_000)
    for one, other in (pair, reversed(pair)):
        await one.ping(other.key)
        half_close = both_half_close(*pair)
        assert await one.digest(other.key, SIZE // 8, 65536, half_close=half_close) == digest_of(SIZE // 8)
    ours, _foreign = pair
    assert not ours.mesh.statistics().failed_handlers
