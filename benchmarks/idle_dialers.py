"""`python -m benchmarks.idle_dialers MULTIADDR COUNT`: so many nodes in one process, each connected with one peer.

Prints "connected" when all of them are, and ends when stdin does. Used to measure what idle connections cost that peer.
"""

from __future__ import annotations

import os
import sys

import trio

from benchmarks.peers.interface import NETWORK
from kaisar_p2p.mesh import MeshConfig, MeshLimits, open_mesh, peer_of
from kaisar_p2p.wire.verdict import Verdict

_AT_ONCE = 4  # handshakes
_LIMITS = MeshLimits(target_peers=1, exchange_s=3600)  # they look for nobody else


async def _dial(multiaddr: str, count: int) -> None:
    key, address = peer_of(multiaddr)
    turn, connected = trio.CapacityLimiter(_AT_ONCE), trio.Semaphore(0)

    async def node() -> None:
        config = MeshConfig(network=NETWORK, upnp=False, mdns=False, relay=False, limits=_LIMITS)
        async with open_mesh(config, os.urandom(32)) as mesh:
            mesh.subscribe("bench", _ignore)
            async with turn:
                mesh.keep_connected(key, [address])
                await mesh.wait_connected()
            connected.release()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(node)
        for _ in range(count):
            await connected.acquire()
        print("connected", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


def _ignore(*_message: object) -> tuple[Verdict, str]:
    return Verdict.IGNORE, ""


if __name__ == "__main__":
    trio.run(_dial, sys.argv[1], int(sys.argv[2]))
