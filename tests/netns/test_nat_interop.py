"""From a relayed connection to a direct one with js-libp2p, whose DCUtR does that with public addresses only."""

from __future__ import annotations

import pytest
import trio

from benchmarks.peers import install
from benchmarks.peers.interface import CIRCUIT, Peer, PeerConfig, PeerFailed
from benchmarks.peers.process import js_peer
from kaisar_p2p.mesh.ids import id_of
from tests.netns.conftest import PORT, Internet, Subject, together

pytestmark = [pytest.mark.netns, pytest.mark.interop]


@pytest.fixture(scope="module")
def js() -> None:
    try:
        install.js()
    except install.Unavailable as error:
        pytest.skip(str(error))


async def _start(internet: Internet, namespace: str, *listen: str, public: str = "") -> Peer:
    """With a public address, if it has one: nobody has confirmed it, so js would not tell it by itself."""
    reached_at = (f"/ip4/{public}/tcp/{PORT}",) if public else ()
    config = PeerConfig(listen=(*reached_at, *listen), announce=reached_at, relay_client=True, dcutr=True)
    return await internet.peer(js_peer(config, through=("ip", "netns", "exec", namespace)))


def _circuit(relay: Subject, key: str = "") -> str:
    """Where a peer listens, or is dialed, through a relay."""
    behind = f"/p2p/{id_of(bytes.fromhex(key))}" if key else ""
    return f"/ip4/{relay.host}/tcp/{PORT}/p2p/{id_of(bytes.fromhex(relay.key))}{CIRCUIT}{behind}"


async def _js_has(peer: Peer, other: Subject, *, direct: bool) -> None:
    """Until js sees a connection of this kind with a node of ours."""
    seen: list[dict[str, object]] = []
    with trio.move_on_after(30):
        while True:
            seen = (await peer.call("connections"))["connections"]
            if any(one["key"] == other.key and one["limited"] is not direct for one in seen):
                return
            await trio.sleep(0.1)
    pytest.fail(f"js-libp2p has no such connection; it has {seen}")


async def _dial_through(dial, *arguments: object) -> None:
    """Until the relay knows the one who listens."""
    with trio.fail_after(30):
        while True:
            try:
                answer = await dial(*arguments)
            except PeerFailed as error:
                answer = {"error": str(error)}
            if not isinstance(answer, dict) or "error" not in answer:
                return
            await trio.sleep(0.2)


async def _is_upgraded(ours: Subject, theirs: Peer) -> None:
    await ours.until(lambda info: info["peers"].get(theirs.key) is False, 30)
    await _js_has(theirs, ours, direct=True)
    assert await theirs.ping(ours.key) > 0


async def test_we_dial_back_a_public_peer_that_came_over_a_relay(internet: Internet, js: None) -> None:
    relay, home = await together(internet.host(relay=True), internet.home("keeps-ports"))
    await internet.connect(home, relay)
    await home.until(lambda info: any(CIRCUIT in address for address in info["addresses"]))
    namespace, address = internet.place()
    public = await _start(internet, namespace, public=address)
    await _dial_through(public.dial, _circuit(relay, home.key))
    await _is_upgraded(home, public)


async def test_it_dials_us_back(internet: Internet, js: None) -> None:
    relay, host = await internet.hosts(2, relay=True)
    home = await _start(internet, internet.behind_nat("random-ports"), _circuit(relay))

    async def dial() -> dict[str, object]:
        return await host.ask("dial", peer=home.key, address=_circuit(relay, home.key))

    await _dial_through(dial)
    await _is_upgraded(host, home)


async def test_it_dials_when_we_give_the_signal(internet: Internet, js: None) -> None:
    """A firewall is before js: our dial does not get through, its own does."""
    relay, host = await internet.hosts(2, relay=True)
    await internet.connect(host, relay)
    await host.until(lambda info: info["reach"] == "public")
    await host.ask("reserve")
    await relay.until(lambda info: info["reservations"] == 1)
    namespace, address = internet.place()
    internet.shut(namespace)
    shut = await _start(internet, namespace, public=address)
    await _dial_through(shut.dial, _circuit(relay, host.key))
    await _is_upgraded(host, shut)
    await host.until(lambda info: info["punched"] == 1)


async def test_we_dial_when_it_gives_the_signal(internet: Internet, js: None) -> None:
    """We are behind a NAT and tell no public address that it could dial back; it has one."""
    relay, witness, home = await together(
        internet.host(relay=True), internet.host(relay=False), internet.home("keeps-ports")
    )
    await internet.connect(home, relay, witness)
    namespace, address = internet.place()
    public = await _start(internet, namespace, _circuit(relay), public=address)

    async def dial() -> dict[str, object]:
        return await home.ask("dial", peer=public.key, address=_circuit(relay, public.key))

    await _dial_through(dial)
    await _is_upgraded(home, public)
