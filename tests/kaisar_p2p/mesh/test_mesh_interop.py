"""We speak the protocols, not just with ourselves: the library's own host, muxer and pubsub as the other side."""

from __future__ import annotations

import logging

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.host.ping import ID as PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.network import swarm as library_swarm
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from kaisar_p2p.mesh import MeshStream
from kaisar_p2p.wire.verdict import Verdict

TOPIC = "/kaisar/test/advert/1"


def accept(*_message: object) -> tuple[Verdict, str]:
    return Verdict.ACCEPT, ""


@pytest.fixture
def library_host(monkeypatch):
    monkeypatch.setattr(library_swarm, "_HAPPY_EYEBALLS_DELAY", 0.0)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # the library configures the root logger
    monkeypatch.setattr(library_swarm, "DNSResolver", lambda: None)  # a stand-in here
    pair = create_new_key_pair()
    host = new_host(
        key_pair=pair,
        sec_opt={NOISE: Transport(pair, noise_privkey=create_x25519().private_key)},
        muxer_opt={TProtocol(YAMUX): Yamux},
    )
    return host


async def _connect(host, mesh):
    info = info_from_p2p_addr(Multiaddr(mesh.addrs[0]))
    with trio.fail_after(10):
        await host.connect(info)
        await mesh.wait_connected()
    return info.peer_id


async def test_ping_and_identify(lab, library_host) -> None:
    host = library_host
    mesh = await lab.mesh()
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        peer = await _connect(host, mesh)
        with trio.fail_after(10):
            ping = await host.new_stream(peer, [PING])
            await ping.write(b"p" * 32)
            assert await ping.read(32) == b"p" * 32
            identify = await host.new_stream(peer, [IDENTIFY])
            told = parse_identify_response(await identify.read(4096))
        network = mesh._network
        assert told.public_key == network.peerstore.pubkey(network.self_id).serialize()
        assert "/kaisar/peers/2" not in told.protocols  # our own protocols are not told


async def test_streams_both_ways(lab, library_host) -> None:
    host = library_host
    mesh = await lab.mesh()

    async def echo(stream: MeshStream) -> None:
        while data := await stream.receive_some():
            await stream.send_some(data)

    async def library_echo(stream) -> None:
        await stream.write(await stream.read(4096))
        await stream.close()

    mesh.serve("/echo", echo, max_frame_bytes=100)
    host.set_stream_handler(TProtocol("/library"), library_echo)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        peer = await _connect(host, mesh)
        with trio.fail_after(20):
            stream = await host.new_stream(peer, [TProtocol("/echo")])
            data = bytes(range(256)) * 2000
            await stream.write(data)
            got = b""
            while len(got) < len(data):
                got += await stream.read(65536)
            assert got == data
            key = mesh.peers()[0].key
            assert await mesh.request(key, "/library", b"frame", deadline_s=10, max_reply_bytes=100) == b"frame"


async def test_gossip_both_ways(lab, library_host) -> None:
    host = library_host
    gossipsub = GossipSub(
        [TProtocol("/meshsub/1.1.0")],
        6,
        4,
        12,
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
    )
    pubsub = Pubsub(host, gossipsub, strict_signing=True)
    mesh = await lab.mesh()
    received = mesh.subscribe("advert", accept)
    async with (
        host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(pubsub),
        background_trio_service(gossipsub),
    ):
        await pubsub.wait_until_ready()
        subscription = await pubsub.subscribe(TOPIC)
        await _connect(host, mesh)
        with trio.fail_after(20):
            while not mesh.subscribers("advert") or not gossipsub.mesh.get(TOPIC):  # noqa: ASYNC110
                await trio.sleep(0.01)
            await mesh.publish("advert", b"from us")
            assert (await subscription.get()).data == b"from us"
            await pubsub.publish(TOPIC, b"from the library")
            message = await received.receive()
        assert message.data == b"from the library"
        assert message.author == host.get_public_key().to_bytes()
