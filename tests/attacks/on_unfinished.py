"""Attacks that begin something large and do not finish it, at every layer."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from tests.attacks.raw_peer import DATA, GOSSIP, MULTISTREAM, RawPeer, frame, line
from tests.attacks.target import Target

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)
_RPC = 1 << 20
_STREAMS = 4


async def _half_rpc(peer: RawPeer) -> None:
    stream = await peer.open(GOSSIP)
    await peer.wait_for(stream, len(MULTISTREAM + line(GOSSIP)))
    length = bytes([_RPC & 127 | 128, _RPC >> 7 & 127 | 128, _RPC >> 14])
    await peer.send(stream, length + b"\x12" + os.urandom(_RPC - 1000))


async def _half_frame(peer: RawPeer) -> None:
    for _ in range(2):
        await peer.open("/echo", (64 * 1024).to_bytes(4, "big") + os.urandom(64_000))


async def _half_data(peer: RawPeer) -> None:
    stream = await peer.open("/slow")
    await peer.seal(frame(DATA, 0, stream, 250_000, os.urandom(60_000)))
    for _ in range(3):
        await peer.seal(os.urandom(60_000))


async def _half_noise(peer: RawPeer) -> None:
    await peer._sending.acquire()  # for ever: an answer of ours would be the frame's end
    await peer.tcp.send_all(b"\xff\xff" + os.urandom(65_000))


_LAYERS = {"rpc": _half_rpc, "frame": _half_frame, "data": _half_data, "noise": _half_noise}


async def unfinished(nursery: trio.Nursery, target: Target, *, layer: str, peers: int) -> dict[str, Any]:
    """So many peers begin what they may begin at one layer, and wait."""
    connected = [await target.peer(nursery) for _ in range(peers)]
    for peer in connected:
        for _ in range(_STREAMS if layer in ("rpc", "frame") else 1):
            with suppress(*_GONE), trio.move_on_after(1):
                await _LAYERS[layer](peer)
    await trio.sleep(1)
    return {"resets": sum(peer.resets for peer in connected), "ended": sum(p.ended.is_set() for p in connected)}


Attack = Callable[..., Awaitable[dict[str, Any]]]
ATTACKS: dict[str, Attack] = {"unfinished": unfinished}
