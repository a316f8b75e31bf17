"""Ping, answered for as long as a peer comes back."""

from __future__ import annotations

import os

import trio
import trio.testing

PING = "/ipfs/ping/1.0.0"


async def _ping(mesh, peer) -> None:
    async with await mesh.open_stream(peer.key, PING, timeout_s=5, max_frame_bytes=1) as stream:
        for _ in range(3):
            sent, back = os.urandom(32), b""
            await stream.send_some(sent)
            while len(back) < 32:
                back += await stream.receive_some()
            assert back == sent


async def test_connections_that_break_in_a_ping_are_forgotten(lab) -> None:
    """The library's service refuses a peer that this happened to twice, for ever, and keeps its connections."""
    server, seed = await lab.mesh(), os.urandom(32)
    for _ in range(3):
        client = await lab.mesh(seed, target_peers=0)
        client.add_addresses(server.key, server.addrs)
        with trio.fail_after(10):
            stream = await client.open_stream(server.key, PING, timeout_s=5, max_frame_bytes=1)
            await stream.send_some(bytes(16))
            client._network.connection_to(server.key).muxer.abort()
            await client.wait_until(lambda client=client: not client.is_connected(server.key))
            await server.wait_until(lambda client=client: not server.is_connected(client.key))
            await _ping(client, server)
        await lab.stop(client)
        with trio.fail_after(10):
            await server.wait_until(lambda client=client: not server.is_connected(client.key))
    await trio.testing.wait_all_tasks_blocked()  # the streams of the connection end after it
    assert not server._host._pinging
