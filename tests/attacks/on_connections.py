"""Attacks before, in and right after the handshake."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio
from nacl.signing import SigningKey

from kaisar_p2p.mesh.transport.noise_handshake import Handshake
from tests.attacks.raw_peer import MULTISTREAM, RawPeer, identity_of, line
from tests.attacks.target import SECONDS, Target, another_address, until

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


async def _drips(tcp: trio.SocketStream, data: bytes, each_s: float) -> bool:
    """Send byte after byte; whether the other side put an end to it."""
    with suppress(*_GONE):
        for index in range(len(data)):
            await tcp.send_all(data[index : index + 1])
            with trio.move_on_after(each_s):
                while await tcp.receive_some(4096):
                    pass
                return True
        return False
    return True


async def slowloris(
    nursery: trio.Nursery, target: Target, *, at: str, connections: int, seconds: float
) -> dict[str, Any]:
    """Many connections that say their first words one byte at a time."""
    source, ended, refused = another_address(), 0, 0
    first = Handshake(identity_of(SigningKey.generate())).first()
    said = {
        "tcp": (b"", MULTISTREAM),
        "multistream": (MULTISTREAM, line("/noise")),
        "noise": (MULTISTREAM + line("/noise"), len(first).to_bytes(2, "big") + first),
    }[at]

    async def one() -> None:
        nonlocal ended, refused
        try:
            tcp = await target.tcp(source)
            await tcp.send_all(said[0])
        except _GONE:
            refused += 1
            return
        ended += await _drips(tcp, said[1], 0.5)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as inner:
            for _ in range(connections):
                inner.start_soon(one)
    return {"ended": ended, "refused": refused, "connections": connections}


async def silent_connections(nursery: trio.Nursery, target: Target, *, connections: int) -> dict[str, Any]:
    """TCP connections that say nothing, as many as can be had; when they are ended."""
    held: list[trio.SocketStream] = []
    with suppress(*_GONE):
        for _ in range(connections):
            held.append(await target.tcp(another_address() if len(held) % 8 == 0 else ""))
    ended = 0

    async def wait(tcp: trio.SocketStream) -> None:
        nonlocal ended
        with suppress(*_GONE):
            while await tcp.receive_some(4096):
                pass
        ended += 1

    began = trio.current_time()
    with trio.move_on_after(12):
        async with trio.open_nursery() as inner:
            for tcp in held:
                inner.start_soon(wait, tcp)
    return {"held": len(held), "ended": ended, "seconds": trio.current_time() - began}


async def connection_flood(nursery: trio.Nursery, target: Target, *, count: int, seconds: float) -> dict[str, Any]:
    """Connect and leave, from many addresses, as fast as it goes: up to `count` times."""
    made = failed = 0

    async def work() -> None:
        nonlocal made, failed
        source = another_address()
        while made + failed < count:
            try:
                tcp = await target.tcp(source if made % 50 else another_address())
                made += 1
                if made % 3 == 0:
                    await tcp.send_all(MULTISTREAM)
                await trio.aclose_forcefully(tcp)
            except _GONE:
                failed += 1

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as inner:
            for _ in range(16):
                inner.start_soon(work)
    return {"made": made, "failed": failed}


async def handshake_flood(nursery: trio.Nursery, target: Target, *, identities: int, held: bool) -> dict[str, Any]:
    """Complete handshakes with ever new keys; keep the connections, or leave at once. At the end one more tries."""
    done, refused, peers, source = 0, 0, [], another_address()
    for number in range(identities):
        if number % 8 == 0:
            source = another_address()
        try:
            peer = await target.peer(nursery, source=source)
        except (*_GONE, trio.TooSlowError):
            refused += 1
            continue
        done += 1
        if held:
            peers.append(peer)
        else:
            await trio.aclose_forcefully(peer.tcp)
    await trio.sleep(0.3)
    alive = sum(not peer.ended.is_set() for peer in peers)
    for peer in peers:
        await trio.aclose_forcefully(peer.tcp)
    await trio.sleep(0.5)
    last = await target.peer(nursery)
    echoed = await last.request("/echo", b"still there?") == b"still there?"
    return {"done": done, "refused": refused, "alive": alive, "echoed": echoed}


async def huge_lengths(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Announce gigabytes at every layer, and send next to nothing."""
    raw = {
        "multistream": b"\xff\xff\xff\xff\x7f" + bytes(100),
        "noise": MULTISTREAM + line("/noise") + b"\xff\xff" + bytes(100),
    }
    ended: dict[str, bool] = {}
    for name, data in raw.items():
        tcp = await target.tcp()
        await tcp.send_all(data)
        ended[name] = await _ends(tcp, 7.0)
    peer = await target.peer(nursery)
    await peer.seal(b"\x00\x00\x00\x00" + (1).to_bytes(4, "big") + (0xFFFFFFFF).to_bytes(4, "big"))
    ended["yamux"] = await peer.is_gone(3.0)
    for name, protocol, data in (
        ("request", "/echo", b"\xff\xff\xff\xff" + bytes(10)),
        ("exchange", "/kaisar/peers/2", b"\x7f\xff\xff\xff"),
        ("stream header", "", b"\xff\xff\xff\x7f"),
    ):
        peer = await target.peer(nursery)
        if protocol:
            await peer.open(protocol, data)
        else:
            await peer.seal(b"".join((_syn(1), peer.chunk(1, data))))
        await until(lambda peer=peer: bool(peer.resets) or peer.ended.is_set(), 3.0)
        ended[name] = bool(peer.resets or peer.ended.is_set())
    peer = await target.peer(nursery)
    stream = await peer.gossip("certificate")
    await peer.send(stream, b"\xff\xff\xff\xff\x07" + bytes(100))
    ended["gossip"] = await peer.is_gone(3.0)
    return {"ended": ended}


def _syn(stream: int) -> bytes:
    return b"\x00\x01\x00\x01" + stream.to_bytes(4, "big") + bytes(4)


async def _ends(tcp: trio.SocketStream, within_s: float) -> bool:
    with trio.move_on_after(within_s), suppress(*_GONE):
        while await tcp.receive_some(4096):
            pass
        return True
    return False


async def garbage(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Random bytes before, in and after the handshake."""
    rng, tried = random.Random(1), 0
    with trio.move_on_after(seconds):
        while True:
            tried += 1
            try:
                if tried % 4:
                    tcp = await target.tcp()
                    said = (b"", MULTISTREAM, MULTISTREAM + line("/noise"))[tried % 3]
                    await tcp.send_all(said + rng.randbytes(rng.randrange(3000)))
                    await trio.aclose_forcefully(tcp)
                else:
                    peer = await target.peer(nursery)
                    await peer.seal(rng.randbytes(2000))
                    await trio.aclose_forcefully(peer.tcp)
            except _GONE:
                continue
    return {"tried": tried}


async def two_places(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """One key, connected from ten places at once."""
    seed, peers, refused = os.urandom(32), [], 0
    for _ in range(10):
        try:
            peers.append(await target.peer(nursery, seed=seed))
        except (*_GONE, trio.TooSlowError):
            refused += 1
    await trio.sleep(1.0)
    echoed = 0
    for peer in peers:
        with suppress(*_GONE), trio.move_on_after(2):
            echoed += await peer.request("/echo", b"me too") == b"me too"
    alive = sum(not peer.ended.is_set() for peer in peers)
    for peer in peers:
        peer.reset_tcp()
    await trio.sleep(0.5)
    last = await target.peer(nursery, seed=seed)
    return {"echoed": echoed, "alive": alive, "refused": refused, "back": await last.request("/echo", b"x") == b"x"}


async def resets(nursery: trio.Nursery, target: Target, *, count: int) -> dict[str, Any]:
    """Peers that crash: TCP ends with RST, in the middle of everything."""
    for number in range(count):
        peer = await target.peer(nursery)
        await peer.gossip("certificate")
        await peer.open("/slow", b"\x00\x00\x00\x01x")
        if number % 2:
            peer.reset_tcp()
        else:
            await trio.aclose_forcefully(peer.tcp)
    await trio.sleep(1.0)
    return {"count": count}


async def restarts(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """A peer that starts anew with its key, whose numbers of messages go back: is it heard again?"""
    seed, sequence = os.urandom(32), 5_000_000
    for _ in range(3):
        peer = await target.peer(nursery, seed=seed)
        stream = await peer.gossip("advert")
        for _ in range(20):
            sequence += 1
            await peer.send(stream, peer.message("advert", b"life" + os.urandom(8), sequence))
        await trio.sleep(0.3)
        peer.reset_tcp()
        sequence -= 20 + 1000  # an earlier one than before
        await trio.sleep(0.2)
    return {"published": 60}


async def wrong_clock(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Nothing: the victim's honest peers have the wrong clocks."""
    await trio.sleep(SECONDS)
    return {}


Attack = Callable[..., Awaitable[dict[str, Any]]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        slowloris,
        silent_connections,
        connection_flood,
        handshake_flood,
        huge_lengths,
        garbage,
        two_places,
        resets,
        restarts,
        wrong_clock,
    )
}
__all__ = ["ATTACKS", "RawPeer"]
