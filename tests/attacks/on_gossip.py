"""Attacks through gossip: floods, lies, replays, garbage."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio
from nacl.signing import SigningKey

from kaisar_p2p.mesh.gossip import wire
from tests.attacks.raw_peer import RawPeer, peer_id, rpc_frame, topic
from tests.attacks.target import SECONDS, Target, until

from libp2p.pubsub.pb import rpc_pb2  # isort: skip

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


async def never_reads_gossip(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Subscribe to everything, let a friend publish much, and never read; TCP stands still, or only the stream."""
    friend = await target.peer(nursery)
    stream = await friend.gossip()
    deaf = [await target.peer(nursery) for _ in range(2)]
    for number, peer in enumerate(deaf):
        await peer.gossip("advert", "certificate", "evidence", "heartbeat")
        peer.opens_windows = False
        if number:
            peer.agrees = False
    sent, data = 0, os.urandom(20_000)
    with trio.move_on_after(seconds), suppress(*_GONE):
        while True:
            await friend.send(stream, friend.message("advert", data + os.urandom(8), sent + 1))
            sent += 1
            await trio.sleep(0.02)
    return {"sent": sent, "ended": [peer.ended.is_set() for peer in deaf]}


async def subscription_flood(nursery: trio.Nursery, target: Target, *, topics: int) -> dict[str, Any]:
    """Subscribe to so many topics, a few hundred in each RPC; then all of them in one."""
    peer = await target.peer(nursery)
    stream, said = await peer.gossip("advert"), 0
    with suppress(*_GONE):
        for start in range(0, topics, 200):
            names = [f"/kaisar/subject/{n}/1" for n in range(start, start + 200)]
            await peer.send(stream, wire.subscriptions_frame(names, True))
            said += 200
            if start % 2000 == 0:
                await trio.lowlevel.checkpoint()
    first = peer.ended.is_set()
    with suppress(*_GONE):
        second = await target.peer(nursery)
        stream = await second.gossip("advert")
        await second.send(stream, wire.subscriptions_frame([f"t{n}" for n in range(20_000)], True))
        return {"said": said, "first": first, "all at once": await second.is_gone(2.0)}
    return {"said": said, "first": first, "all at once": True}


def _control(rng: random.Random, kind: str) -> bytes:
    rpc = rpc_pb2.RPC()
    name = topic(rng.choice(("advert", "certificate", "heartbeat", "nobody")))
    if kind == "ihave":
        for _ in range(20):
            rpc.control.ihave.add(topicID=name, messageIDs=[rng.randbytes(46) for _ in range(50)])
    elif kind == "iwant":
        for _ in range(20):
            rpc.control.iwant.add(messageIDs=[rng.randbytes(46) for _ in range(50)])
    elif kind == "graft":
        for _ in range(50):
            rpc.control.graft.add(topicID=name)
    else:
        for _ in range(50):
            rpc.control.prune.add(topicID=name, backoff=rng.choice((0, 1, 60, 2**62)))
    return rpc_frame(rpc)


async def control_flood(nursery: trio.Nursery, target: Target, *, kind: str, seconds: float) -> dict[str, Any]:
    """One kind of control message, as fast as it goes."""
    peer, rng, sent = await target.peer(nursery), random.Random(1), 0
    stream = await peer.gossip("advert", "certificate")
    frames = [_control(rng, kind) for _ in range(20)]
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            await peer.send(stream, b"".join(frames))
            sent += len(frames)
            await trio.lowlevel.checkpoint()
    return {"sent": sent, "ended": peer.ended.is_set(), "received": sum(map(len, peer.received.values()))}


async def graft_and_prune(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """In and out of topic meshes, against the backoff that was agreed on."""
    peer, sent = await target.peer(nursery), 0
    stream = await peer.gossip("advert", "certificate", "heartbeat")
    rpc = rpc_pb2.RPC()
    for name in ("advert", "certificate", "heartbeat"):
        rpc.control.prune.add(topicID=topic(name), backoff=60)
        rpc.control.graft.add(topicID=topic(name))
    data = rpc_frame(rpc)
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            await peer.send(stream, data)
            sent += 1
            await trio.sleep(0.005)
    return {"sent": sent, "ended": peer.ended.is_set()}


async def broken_promises(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Offer messages that do not exist, and never send one; and what do they ask?"""
    peer, sent = await target.peer(nursery), 0
    stream = await peer.gossip("advert", "certificate")
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            rpc = rpc_pb2.RPC()
            rpc.control.ihave.add(topicID=topic("certificate"), messageIDs=[os.urandom(46) for _ in range(400)])
            await peer.send(stream, rpc_frame(rpc))
            sent += 400
            await trio.sleep(0.02)
    return {"offered": sent, "asked_bytes": sum(map(len, peer.received.values())), "ended": peer.ended.is_set()}


async def iwant_amplification(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Ask again and again for one large message."""
    author, peer = await target.peer(nursery), await target.peer(nursery)
    written = await author.gossip("advert")
    message = wire.sign(author.key, topic("advert"), os.urandom(200_000), 1)
    await author.send(written, wire.publish_frame(message.raw))
    stream = await peer.gossip()  # subscribed to nothing: what comes was asked for
    await trio.sleep(0.3)
    rpc = rpc_pb2.RPC()
    rpc.control.iwant.add(messageIDs=[message.id] * 500)
    data, asked = rpc_frame(rpc), 0
    with trio.move_on_after(seconds), suppress(*_GONE):
        while not peer.ended.is_set():
            await peer.send(stream, data)
            asked += 500
            await trio.sleep(0.005)
    received = sum(map(len, peer.received.values()))
    return {"asked": asked, "received": received, "times": received / len(message.raw), "ended": peer.ended.is_set()}


async def replay(nursery: trio.Nursery, target: Target, *, seconds: float) -> dict[str, Any]:
    """Valid messages of somebody else, again and again, from several peers."""
    author, sent = SigningKey.generate(), 0
    frames = [wire.publish_frame(wire.sign(author, topic("advert"), b"once" * 50, n).raw) for n in range(100)]
    peers = [await target.peer(nursery) for _ in range(3)]
    streams = [await peer.gossip("advert") for peer in peers]
    with trio.move_on_after(seconds), suppress(*_GONE):
        while True:
            for peer, stream in zip(peers, streams, strict=True):
                await peer.send(stream, b"".join(frames))
                sent += len(frames)
            await trio.sleep(0.05)
    return {"sent": sent, "different": len(frames), "ended": [peer.ended.is_set() for peer in peers]}


async def message_flood(
    nursery: trio.Nursery, target: Target, *, name: str, verdict: str, peers: int, size: int, seconds: float
) -> dict[str, Any]:
    """Signed messages, thousands a second, by several identities; `verdict` is what the victim will say."""
    sent, ended = 0, 0

    block = min(400, 2_000_000 // size)

    def frames(peer: RawPeer, start: int) -> list[bytes]:
        body = verdict.encode() + os.urandom(size)
        return [peer.message(name, body + n.to_bytes(4, "big"), n) for n in range(start, start + block)]

    async def flood(peer: RawPeer) -> None:
        nonlocal sent, ended
        stream, number = await peer.gossip(name), 0
        with suppress(*_GONE):
            while not peer.ended.is_set():
                if number and number % block == 0:
                    prepared[peer] = frames(peer, number)
                few = prepared[peer][number % block : number % block + 20]
                await peer.send(stream, b"".join(few))
                number += len(few)
                sent += len(few)
                await trio.lowlevel.checkpoint()
        ended += 1

    connected = [await target.peer(nursery) for _ in range(peers)]
    prepared = {peer: frames(peer, 0) for peer in connected}
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as inner:
            for peer in connected:
                inner.start_soon(flood, peer)
    return {"sent": sent, "ended": ended}


def _bad_messages() -> dict[str, bytes]:
    key, other, rng = SigningKey.generate(), SigningKey.generate(), random.Random(4)

    def changed(**changes: Any) -> bytes:
        message = rpc_pb2.Message.FromString(wire.sign(key, topic("advert"), b"data", rng.getrandbits(60)).raw)
        for field, value in changes.items():
            message.ClearField(field)
            if field == "topicIDs":
                message.topicIDs.extend(value)
            else:
                setattr(message, field, value)
        return wire.publish_frame(message.SerializeToString())

    return {
        "random": rng.randbytes(3000),
        "random rpc": wire.frame(rng.randbytes(300)),
        "endless length": b"\xff" * 30,
        "no signature": changed(signature=b""),
        "wrong signature": changed(signature=bytes(64)),
        "changed data": changed(data=b"other"),
        "somebody else's name": changed(from_id=peer_id(bytes(other.verify_key))),
        "bad key": changed(from_id=peer_id(b"\xff" * 32)),
        "bad from": changed(from_id=b"\x12\x20" + bytes(32)),
        "no from": changed(from_id=b""),
        "long number": changed(seqno=bytes(9)),
        "two topics": changed(topicIDs=[topic("advert")] * 2),
        "too large": wire.publish_frame(wire.sign(key, topic("advert"), bytes(300_000), 1).raw),
    }


async def malformed_gossip(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Every malformed message on a connection of its own."""
    ended = {}
    for name, data in _bad_messages().items():
        peer = await target.peer(nursery)
        stream = await peer.gossip("advert")
        await peer.send(stream, data)
        ended[name] = await peer.is_gone(3)
    return {"ended": ended}


async def interleaved_writes(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Two writers of more than 64 KiB on one gossip stream, as the library's own peers do by accident."""
    peer = await target.peer(nursery)
    stream = await peer.gossip("advert")
    large = [peer.message("advert", bytes([n]) * 150_000, n) for n in range(1, 3)]
    with suppress(*_GONE):
        for start in range(0, len(large[0]), 65_535):
            for data in large:
                await peer.send(stream, data[start : start + 65_535])
        return {"ended": await peer.is_gone(3)}
    return {"ended": True}


async def resets_gossip_streams(nursery: trio.Nursery, target: Target) -> dict[str, Any]:
    """Reset the victim's gossip stream, many times; afterwards it must still speak to this peer."""
    peer = await target.peer(nursery)
    await peer.gossip("certificate")
    for _ in range(4):
        await trio.sleep(0.5)
        for stream in [s for s, protocol in peer.opened.items() if protocol.startswith("/meshsub")]:
            del peer.opened[stream]
            await peer.seal(b"\x00\x01\x00\x08" + stream.to_bytes(4, "big") + bytes(4))
    before = sum(map(len, peer.received.values()))
    await until(lambda: sum(map(len, peer.received.values())) > before + 2000, 15)
    return {"heard": sum(map(len, peer.received.values())) - before, "ended": peer.ended.is_set()}


async def raising_validators(nursery: trio.Nursery, target: Target, *, count: int) -> dict[str, Any]:
    """Messages on which the validator has a bug."""
    peer = await target.peer(nursery)
    stream = await peer.gossip("advert")
    for number in range(count):
        await peer.send(stream, peer.message("advert", b"raise" + os.urandom(8), number))
    await trio.sleep(0.5)
    await peer.send(stream, peer.message("advert", b"fine" + os.urandom(8), count))
    await trio.sleep(0.3)
    return {"ended": peer.ended.is_set()}


async def publishes(
    nursery: trio.Nursery, target: Target, *, name: str, count: int, rate_per_s: float
) -> dict[str, Any]:
    """Honest messages at an honest rate."""
    peer = await target.peer(nursery)
    stream = await peer.gossip(name)
    for number in range(count):
        await peer.send(stream, peer.message(name, b"ok" + os.urandom(200), number))
        await trio.sleep(1 / rate_per_s)
    await trio.sleep(0.3)
    return {"ended": peer.ended.is_set()}


Attack = Callable[..., Awaitable[dict[str, Any]]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        never_reads_gossip,
        subscription_flood,
        control_flood,
        graft_and_prune,
        broken_promises,
        iwant_amplification,
        replay,
        message_flood,
        malformed_gossip,
        interleaved_writes,
        resets_gossip_streams,
        raising_validators,
        publishes,
    )
}
__all__ = ["ATTACKS", "SECONDS", "RawPeer"]
