"""Connections with js-libp2p and go-libp2p: dialing, who is there, questions and answers, restarts."""

from __future__ import annotations

import pytest

from benchmarks.peers.interface import FRAME, PeerFailed, digest_of
from kaisar_p2p.errors import RequestFailed
from tests.interop.conftest import TOPIC, both_half_close, eventually, heard, subscribed

pytestmark = pytest.mark.interop

SEED = bytes(range(32))
AGENTS = {"js": "js-libp2p/", "go": "p2pd/"}


@pytest.mark.parametrize("we_dial", [True, False], ids=["we dial", "they dial"])
async def test_either_side_dials_and_identifies_the_other(lab, kind: str, we_dial: bool) -> None:
    ours, foreign = await lab.ours(), await lab.foreign(kind)
    dialer, listener = (ours, foreign) if we_dial else (foreign, ours)
    await dialer.dial(listener.addrs[0])

    async def each_sees_the_other() -> bool:
        return await ours.peers() == [foreign.key] and await foreign.peers() == [ours.key]

    await eventually(each_sees_the_other)
    of_us = await foreign.identify(ours.key)
    assert of_us["key"] == ours.key
    assert of_us["addresses"] == [ours.addrs[0].partition("/p2p/")[0]]
    assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/meshsub/1.1.0"} <= set(of_us["protocols"])
    assert of_us["agent"] == "kaisar"
    assert of_us["observed"].startswith("/ip4/127.0.0.1/tcp/")
    of_them = await ours.identify(foreign.key)
    assert of_them["key"] == foreign.key
    assert foreign.addrs[0].partition("/p2p/")[0] in of_them["addresses"]
    assert of_them["agent"].startswith(AGENTS[kind])
    assert {"/ipfs/ping/1.0.0", "/meshsub/1.1.0"} <= set(of_them["protocols"])


async def test_the_name_in_an_address_is_checked(lab, kind: str) -> None:
    """Whoever answers with another key than the one that was dialed is not talked to."""
    ours, foreign, absent = await lab.ours(), await lab.foreign(kind), await lab.ours()
    place = foreign.addrs[0].partition("/p2p/")[0]
    somebody_else = absent.addrs[0].partition("/p2p/")[2]
    with pytest.raises(PeerFailed):
        await ours.dial(f"{place}/p2p/{somebody_else}")
    with pytest.raises(PeerFailed):
        await foreign.dial(f"{ours.addrs[0].partition('/p2p/')[0]}/p2p/{somebody_else}")
    assert await ours.peers() == []


async def test_both_answer_pings(pair) -> None:
    ours, foreign = pair
    assert await ours.ping(foreign.key) > 0
    assert await foreign.ping(ours.key) > 0


@pytest.mark.parametrize("size", [0, 1, 1024, 1_000_000])
async def test_frames_are_answered_both_ways(pair, size: int) -> None:
    ours, foreign = pair
    half_close = both_half_close(*pair)
    count = 100 if size < 10_000 else 3
    assert len(await ours.request(foreign.key, count=count, size=size, half_close=half_close)) == count
    assert len(await foreign.request(ours.key, count=count, size=size, half_close=half_close)) == count


async def test_frames_of_a_mesh_stream_are_answered(pair) -> None:
    """As a node of ours would ask. Not `Mesh.request`: when protocol, question and end of sending come in one packet,
    js-libp2p 3.3 drops the stream ("Cannot push data onto a stream that is closed")."""
    ours, foreign = pair
    peer = bytes.fromhex(foreign.key)
    async with await ours.mesh.open_stream(peer, FRAME, timeout_s=10, max_frame_bytes=100) as stream:
        await stream.send_frame(b"question")
        if both_half_close(*pair):
            await stream.send_eof()
        assert await stream.receive_frame() == b"question"


async def test_a_protocol_that_nobody_speaks_is_refused_both_ways(pair) -> None:
    ours, foreign = pair
    with pytest.raises(RequestFailed, match=r"does not speak|reset"):
        await ours.mesh.request(bytes.fromhex(foreign.key), "/nobody/1", b"", deadline_s=10, max_reply_bytes=10)
    assert await foreign.ping(ours.key) > 0  # the connection is as good as before


@pytest.mark.parametrize("we_restart", [True, False], ids=["we restart", "they restart"])
async def test_a_peer_comes_back_with_the_same_key(lab, kind: str, we_restart: bool) -> None:
    ours = await lab.ours(**({"seed": SEED} if we_restart else {}))
    foreign = await lab.foreign(kind, **({} if we_restart else {"seed": SEED}))
    await ours.dial(foreign.addrs[0])
    await subscribed(ours, foreign)
    if we_restart:
        await lab.stop(ours)
        again = ours = await lab.ours(seed=SEED)
    else:
        await lab.stop(foreign)
        again = foreign = await lab.foreign(kind, seed=SEED)
    await again.dial((foreign if we_restart else ours).addrs[0])
    await again.subscribe(TOPIC, report=True)
    await heard(ours, foreign)
    await heard(foreign, ours)
    assert await ours.ping(foreign.key) > 0


async def test_py_libp2p_as_it_is_published(lab) -> None:
    """The peer that the benchmark compares with, whose process has none of our replacements."""
    ours, stock = await lab.ours(), await lab.foreign("stock")
    await ours.dial(stock.addrs[0])
    assert (await ours.identify(stock.key))["agent"].startswith("py-libp2p/")
    for one, other in ((ours, stock), (stock, ours)):
        assert await one.digest(other.key, 1_000_000, 65536) == digest_of(1_000_000)
        assert await one.ping(other.key) > 0
    await subscribed(ours, stock)
