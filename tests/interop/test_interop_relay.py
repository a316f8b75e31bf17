"""Circuit relay v2 among ours, js-libp2p and go-libp2p: each as the relay, behind it, and as the one who dials."""

from __future__ import annotations

import errno

import pytest
import trio

from benchmarks.peers.interface import CIRCUIT, Peer, PeerFailed, digest_of
from kaisar_p2p.mesh.connection import TcpStream
from kaisar_p2p.mesh.discovery.addresses import Address, parse
from kaisar_p2p.mesh.ids import id_of
from tests.interop.conftest import Lab, OurPeer, eventually

pytestmark = pytest.mark.interop

_ANY = "/ip4/127.0.0.1/tcp/0"
TCP = {"ours": (), "js": (_ANY,), "go": (_ANY,)}  # ours cannot be dialed, or the others would do it at once
SIZE = 100_000  # relays do not carry bulk for strangers


def only_reaches(peer: Peer, relay: Peer) -> None:
    """A node of ours whose direct connections all fail but the one with the relay: no hole is punched."""
    if not isinstance(peer, OurPeer):
        return
    network, port = peer.mesh._network, parse(relay.addrs[0])[0].port
    dial = network.open_raw

    async def open_raw(address: Address, *, fresh_port: bool = False) -> TcpStream:
        if address.port != port:
            raise OSError(errno.EHOSTUNREACH, "behind a NAT")
        return await dial(address, fresh_port=fresh_port)

    network.open_raw = open_raw  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("relays", "listens", "dials"),
    [
        ("go", "ours", "ours"),
        ("js", "ours", "ours"),
        ("go", "ours", "js"),
        ("js", "ours", "go"),
        ("go", "js", "ours"),
        ("js", "go", "ours"),
        ("ours", "ours", "js"),
        ("ours", "ours", "go"),
        ("ours", "js", "ours"),
        ("ours", "go", "ours"),
        ("ours", "js", "go"),
        ("ours", "go", "js"),
    ],
)
async def test_a_circuit_carries_streams(lab: Lab, js: str, go: str, relays: str, listens: str, dials: str) -> None:
    await _talk_over_a_circuit(lab, relays, listens, dials)


@pytest.mark.parametrize(
    ("relays", "listens", "dials"), [("js", "ours", "ours"), ("ours", "js", "ours"), ("ours", "ours", "js")]
)
async def test_a_circuit_inside_a_private_swarm(lab: Lab, js: str, relays: str, listens: str, dials: str) -> None:
    """The connections with the relay are encrypted with the pre-shared key, and the circuit over them once more."""
    await _talk_over_a_circuit(lab, relays, listens, dials, pre_shared_key=bytes(range(32)))


async def _talk_over_a_circuit(lab: Lab, relays: str, listens: str, dials: str, **config: object) -> None:
    relay = await lab.start(relays, relay_server=True, **config)
    listening = await lab.start(
        listens, relay_client=True, listen=(*TCP[listens], f"{relay.addrs[0]}{CIRCUIT}"), **config
    )
    dialing = await lab.start(dials, relay_client=True, listen=TCP[dials], **config)
    for peer in (listening, dialing):
        only_reaches(peer, relay)
    await _dial_circuit(dialing, relay, listening)
    half_close = listening.half_closes and dialing.half_closes
    assert await dialing.digest(listening.key, SIZE, 10_000, half_close=half_close) == digest_of(SIZE)
    assert await dialing.ping(listening.key) > 0
    assert await listening.ping(dialing.key) > 0
    for peer, other in ((listening, dialing), (dialing, listening)):
        if isinstance(peer, OurPeer):
            assert [info.relayed for info in peer.mesh.peers() if info.key.hex() == other.key] == [True]


async def _dial_circuit(dialing: Peer, relay: Peer, listening: Peer) -> None:
    """Until the one who listens has its reservation."""
    address = f"{relay.addrs[0]}{CIRCUIT}/p2p/{id_of(bytes.fromhex(listening.key))}"
    failures: list[str] = []

    async def dialed() -> bool:
        try:
            await dialing.dial(address)
        except PeerFailed as error:
            failures.append(str(error))
            await trio.sleep(0.2)
            return False
        return True

    try:
        await eventually(dialed, within_s=20)
    except trio.TooSlowError:
        pytest.fail(f"no circuit: {failures[-1]}")
