"""Attacks of a connected peer below gossip: yamux, multistream-select, requests, identify, peer exchange."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from tests.attacks.raw_peer import ACK, DATA, FIN, MULTISTREAM, PING, RST, SYN, WINDOW, RawPeer, frame, line
from tests.attacks.target import SECONDS, Target, another_address, until

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


async def never_reads(nursery: trio.Nursery, target: Target, *, peers: int, seconds: float) -> dict[str, Any]:
    """Ask for large answers, give huge windows, and never read a byte of TCP."""
    connected = [await target.peer(nursery, read=False) for _ in range(peers)]
    ended = 0

    async def ask(peer: RawPeer) -> None:
        nonlocal ended
        payload = os.urandom(60_000)
        try:
            while True:
                stream = await peer.open("/echo", len(payload).to_bytes(4, "big") + payload, window=1 << 30)
                await peer.seal(frame(WINDOW, FIN, stream, 0))
        except _GONE:
            ended += 1

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as inner:
            for peer in connected:
                inner.start_soon(ask, peer)
    return {"ended": ended}


async def never_sends(nursery: trio.Nursery, target: Target, *, streams: int, wait_s: float) -> dict[str, Any]:
    """Open streams and say nothing on them, or only the protocol."""
    peer = await target.peer(nursery)
    for number in range(streams):
        if number % 2:
            await peer.seal(frame(WINDOW, SYN, 2 * number + 1001, 0))
        else:
            await peer.seal(frame(WINDOW, SYN, 2 * number + 1001, 0) + peer.chunk(2 * number + 1001, MULTISTREAM))
    await until(lambda: peer.resets >= streams or peer.ended.is_set(), wait_s)
    return {"resets": peer.resets, "ended": peer.ended.is_set()}


async def slow_requests(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Requests whose frames come one byte at a time, as many as can be open."""
    peer = await target.peer(nursery)
    streams = [await peer.open("/echo", (60_000).to_bytes(4, "big")) for _ in range(200)]
    with trio.move_on_after(seconds), suppress(*_GONE):
        while True:
            for stream in streams:
                await peer.send(stream, b"x")
            await trio.sleep(0.1)
    return {"resets": peer.resets, "ended": peer.ended.is_set()}


async def window_flood(nursery: trio.Nursery, target: Target, *, megabytes: int, peers: int) -> dict[str, Any]:
    """Far more than the windows allow, on streams that nobody reads."""
    sent, ended, chunk = 0, 0, os.urandom(64_000)

    async def flood(peer: RawPeer) -> None:
        nonlocal sent, ended
        try:
            streams = [await peer.open("/slow") for _ in range(200)]
            while sent < megabytes << 20:
                for stream in streams:
                    await peer.seal(peer.chunk(stream, chunk))
                    sent += len(chunk)
        except _GONE:
            ended += 1

    connected = [await target.peer(nursery) for _ in range(peers)]
    with trio.move_on_after(6):
        async with trio.open_nursery() as inner:
            for peer in connected:
                inner.start_soon(flood, peer)
    return {"sent_mb": sent >> 20, "ended": ended, "peers": peers}


async def fills_windows(nursery: trio.Nursery, target: Target, *, peers: int) -> dict[str, Any]:
    """As much as the windows of all streams allow, politely, where nobody reads: a slow handler, a half request."""
    connected, chunk, sent = [], os.urandom(64_000), 0
    with suppress(*_GONE, trio.TooSlowError):
        for _ in range(peers):
            connected.append(await target.peer(nursery))
    for peer in connected:
        with suppress(*_GONE), trio.move_on_after(2):
            for _ in range(200):
                stream = await peer.open("/slow")
                for _ in range(4):
                    await peer.send(stream, chunk)
                    sent += len(chunk)
    await trio.sleep(1)
    ended = sum(peer.ended.is_set() for peer in connected)
    return {"sent_mb": sent >> 20, "peers": len(connected), "ended": ended, "resets": sum(p.resets for p in connected)}


async def open_flood(nursery: trio.Nursery, target: Target, *, count: int) -> dict[str, Any]:
    """Thousands of SYNs in one go, and again."""
    peer, sent = await target.peer(nursery), 0
    with suppress(*_GONE):
        for start in range(0, count, 500):
            await peer.seal(b"".join(frame(WINDOW, SYN, 2 * n + 101, 0) for n in range(start, start + 500)))
            sent += 500
    await peer.is_gone(1.5)
    return {"sent": sent, "resets": peer.resets, "ended": peer.ended.is_set()}


async def open_and_reset(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """SYN, a protocol, RST, for ever ("rapid reset")."""
    peer, stream = await target.peer(nursery), 101
    hello = MULTISTREAM + line("/echo") + b"\x00\x00\x00\x05hel"
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            batch = bytearray()
            for _ in range(100):
                batch += frame(WINDOW, SYN, stream, 0) + frame(DATA, 0, stream, len(hello), hello)
                batch += frame(WINDOW, RST, stream, 0)
                stream += 2
            await peer.seal(bytes(batch))
    return {"streams": (stream - 101) // 2, "resets": peer.resets, "ended": peer.ended.is_set()}


async def ping_flood(nursery: trio.Nursery, target: Target, *, seconds: float, read: bool) -> dict[str, Any]:
    """Pings of yamux as fast as they go; without reading, the answers pile up somewhere."""
    peer, sent = await target.peer(nursery, read=read), 0
    batch = b"".join(frame(PING, SYN, 0, n) for n in range(5000))
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            await peer.seal(batch)
            sent += 5000
    return {"sent": sent, "ended": peer.ended.is_set()}


async def odd_frames(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Frames that no yamux sends, each on a connection of its own."""
    odd = {
        "version": b"\x01" + bytes(11),
        "kind": b"\x00\x09" + bytes(10),
        "stream 0": frame(DATA, SYN, 0, 5, b"hello"),
        "our id": frame(WINDOW, SYN, 2, 0),
        "opened twice": frame(WINDOW, SYN, 1, 0) * 2,
        "beyond the window": frame(WINDOW, SYN, 1, 0) + frame(DATA, 0, 1, 1 << 25),
        "random": random.Random(7).randbytes(500),
    }
    ended = {}
    for name, data in odd.items():
        peer = await target.peer(nursery)
        await peer.seal(data)
        ended[name] = await peer.is_gone(3)
    return {"ended": ended}


async def bad_negotiation(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Headers of multistream-select that are not text, not lines, without end."""
    said = [
        b"\x05\xff\xfe\xfd\xfc\n",
        b"\xff\x7f" + bytes(20_000),
        b"\xff" * 30,
        b"\x00" * 100,
        b"\x04abcd",
        MULTISTREAM + b"\x05\xff\xfe\xfd\xfc\n",
        MULTISTREAM + line("/unknown") * 200,
        random.Random(3).randbytes(3000),
    ]
    peer = await target.peer(nursery)
    with suppress(*_GONE):
        for number in range(200):
            opening = frame(WINDOW, SYN, 2 * number + 1, 0)
            await peer.seal(opening + peer.chunk(2 * number + 1, said[number % len(said)]))
            await trio.sleep(0.005)
    await until(lambda: peer.resets >= 200 or peer.ended.is_set(), 6)
    return {"resets": peer.resets, "ended": peer.ended.is_set()}


async def failing_handlers(nursery: trio.Nursery, target: Target, *, count: int) -> dict[str, Any]:
    """Requests whose handler has a bug."""
    peer = await target.peer(nursery)
    for _ in range(count):
        await peer.open("/fails", b"\x00\x00\x00\x01x")
        await trio.sleep(0.01)
    await until(lambda: peer.resets >= count or peer.ended.is_set(), 3)
    return {"resets": peer.resets, "echoed": await peer.request("/echo", b"hi") == b"hi"}


async def request_flood(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Valid requests, thousands a second."""
    peer, sent = await target.peer(nursery), 0
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            for _ in range(20):
                stream = await peer.open("/echo", b"\x00\x00\x00\x05hello")
                await peer.seal(frame(WINDOW, FIN, stream, 0))
                sent += 1
            await trio.lowlevel.checkpoint()
    return {"sent": sent, "resets": peer.resets, "ended": peer.ended.is_set()}


async def lying_identify(nursery: trio.Nursery, target: Target, *, addresses: int, prefix: str) -> dict[str, Any]:
    """Answer identify, and push, with thousands of addresses; tell the same in the peer exchange."""
    from kaisar_p2p.mesh import compat as _compat  # noqa: F401

    from libp2p.identity.identify.pb.identify_pb2 import Identify  # isort: skip
    from multiaddr import Multiaddr  # isort: skip

    told = Identify(protocol_version="x" * 1000, agent_version="y" * 1000)
    hosts = (f"{prefix}{n // 250 % 250}.{n % 250 + 1}" for n in range(addresses))
    told.listen_addrs.extend(bytes(Multiaddr(f"/ip4/{host}/tcp/4001").to_bytes()) for host in hosts)
    body = told.SerializeToString()
    size, prefix_bytes = len(body), bytearray()
    while size > 127:
        prefix_bytes.append(size & 127 | 128)
        size >>= 7
    prefix_bytes.append(size)
    framed = bytes(prefix_bytes) + body
    peer = await target.peer(nursery)
    for protocol in ("/ipfs/id/push/1.0.0", "/ipfs/id/1.0.0", "/kaisar/peers/1", "/kaisar/peers/2"):
        stream = await peer.open(protocol)
        with suppress(*_GONE):
            await peer.send(stream, framed[:200_000])
    end = trio.current_time() + SECONDS
    answered: set[int] = set()
    while trio.current_time() < end and not peer.ended.is_set():
        for stream, protocol in list(peer.opened.items()):
            if protocol.startswith("/ipfs/id/") and stream not in answered:
                answered.add(stream)
                await peer.send(stream, framed)
        await trio.sleep(0.05)
    return {"bytes": len(framed), "asked": len(answered), "ended": peer.ended.is_set(), "resets": peer.resets}


async def exchange_flood(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Questions of the peer exchange, as many as it takes; random frames of the right size among them."""
    peer, sent, rng = await target.peer(nursery), 0, random.Random(5)
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            body = rng.randbytes(rng.randrange(2000))
            stream = await peer.open(f"/kaisar/peers/{1 + sent % 2}", len(body).to_bytes(4, "big") + body)
            await peer.seal(frame(WINDOW, FIN, stream, 0))
            sent += 1
            if sent % 20 == 0:
                await trio.sleep(0.01)
    return {"sent": sent, "resets": peer.resets, "ended": peer.ended.is_set()}


async def acks_for_nothing(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Window updates, ACKs, FINs and RSTs for streams that do not exist."""
    peer, sent = await target.peer(nursery), 0
    flags = (ACK, FIN, RST, 0)
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            batch = [frame(WINDOW, flags[n % 4], 2 * n + 1, 0xFFFFFFFF) for n in range(2000)]
            await peer.seal(b"".join(batch))
            sent += 2000
    return {"sent": sent, "ended": peer.ended.is_set()}


Attack = Callable[..., Awaitable[dict[str, Any]]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        never_reads,
        never_sends,
        slow_requests,
        window_flood,
        fills_windows,
        open_flood,
        open_and_reset,
        ping_flood,
        odd_frames,
        bad_negotiation,
        failing_handlers,
        request_flood,
        lying_identify,
        exchange_flood,
        acks_for_nothing,
    )
}
__all__ = ["ATTACKS", "another_address"]
