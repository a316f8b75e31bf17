"""A peer whose process hangs or whose machine is gone is noticed, and one whose process merely is slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from kaisar_p2p.mesh import Mesh, MeshLimits

_PEER = """
import sys, trio
from kaisar_p2p.mesh import MeshConfig, open_mesh, peer_of
from kaisar_p2p.wire.verdict import Verdict

async def main():
    async with open_mesh(MeshConfig(network="test"), bytes.fromhex(sys.argv[1])) as mesh:
        mesh.subscribe("advert", lambda *_: (Verdict.ACCEPT, ""))
        key, address = peer_of(sys.argv[2])
        mesh.keep_connected(key, [address])
        await trio.sleep_forever()

trio.run(main)
"""


@contextmanager
def process(mesh: Mesh) -> Iterator[subprocess.Popen[bytes]]:
    """Another node, in a process of its own, connected with `mesh`."""
    peer = subprocess.Popen([sys.executable, "-c", _PEER, os.urandom(32).hex(), mesh.addrs[0]])
    try:
        yield peer
    finally:
        peer.kill()
        peer.wait()


async def eventually(condition, within_s: float) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.01)


async def _notices(mesh: Mesh, within_s: float) -> None:
    mesh.subscribe("advert", lambda *_: None)
    with process(mesh) as peer:
        with trio.fail_after(30):
            await mesh.wait_connected()
        await eventually(lambda: len(mesh.subscribers("advert")) == 1, 15)
        peer.send_signal(signal.SIGSTOP)
        await eventually(lambda: not mesh.peers(), within_s)
        await eventually(lambda: not mesh._gossip._router._peers, 2)
        assert mesh.subscribers("advert") == []


async def test_a_stopped_process_is_noticed(lab) -> None:
    await _notices(await lab.mesh(keepalive_s=0.2, target_peers=0), within_s=10)


@pytest.mark.slow
async def test_a_stopped_process_is_noticed_within_30_s_by_default(lab) -> None:
    await _notices(await lab.mesh(keepalive_s=MeshLimits().keepalive_s, target_peers=0), within_s=30)
