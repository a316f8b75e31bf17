"""Hole punching between meshes on loopback, with NATs that let in what is dialed from both sides at once."""

from __future__ import annotations

import pytest
import trio

from kaisar_p2p.mesh import Mesh
from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.reach import holepunch
from kaisar_p2p.mesh.reach.circuit_wire import (
    DCUTR,
    PunchMessage,
    PunchType,
    binary_of,
    direct_addresses_of,
    framed,
    receive,
)
from kaisar_p2p.mesh.transport import tcp
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream
from tests.kaisar_p2p.mesh.conftest import eventually
from tests.kaisar_p2p.mesh.relay_lab import echoed, introduce, relayed

from libp2p.stream_muxer.exceptions import MuxedStreamError  # isort: skip


@pytest.fixture
def from_listening_ports(monkeypatch) -> None:
    """Dials leave from the listening port on loopback too, so that relays see it."""
    monkeypatch.setattr(tcp, "dialing_source", lambda _address, bound: bound[0])


async def _punch_stream(leader: Mesh, follower: Mesh) -> MuxedStream:
    stream = leader._network.connection_to(follower.key).muxer.open_stream_nowait()
    await stream.write(proposal(DCUTR))
    await confirm(stream, DCUTR)
    return stream


async def _is_reset(stream: MuxedStream) -> bool:
    with trio.fail_after(5):
        try:
            while await stream.read():
                pass
        except MuxedStreamError:
            return True
    return False


def _addresses(*hosts: str) -> tuple[bytes, ...]:
    return tuple(binary_of(Address("ip4", host, 1)) for host in hosts)


@pytest.mark.usefixtures("from_listening_ports")
async def test_both_dial_at_once_and_leave_the_relay(internet) -> None:
    internet.punchable = True
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    assert await echoed(a, b) == b"hello"
    await eventually(lambda: relayed(a, b) == relayed(b, a) == [False])
    assert await echoed(b, a) == b"hello"
    await eventually(lambda: relay.relay_statistics().circuits == 0)
    direct = a._network.connection_to(b.key)
    assert direct.muxer.is_initiator is not b._network.connection_to(a.key).muxer.is_initiator


@pytest.mark.usefixtures("from_listening_ports")
async def test_after_three_tries_it_stays_with_the_relay(internet) -> None:
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    ports = [mesh._network.bound[0].port for mesh in (a, b)]
    internet.dialed.clear()
    introduce(a, b)
    assert await echoed(a, b) == b"hello"
    await eventually(lambda: len(_between(internet, ports)) == 7 and not b._relaying._punch._upgrading, within_s=10)
    punched = _between(internet, ports)
    assert punched.count((ports[1], ports[0])) == 4  # dialing back, and three tries
    assert punched.count((ports[0], ports[1])) == 3
    assert relayed(a, b) == relayed(b, a) == [True]


@pytest.fixture
async def stuck_pair(internet, from_listening_ports) -> tuple[Mesh, Mesh]:
    """Two nodes that could not punch a hole and wait for another attempt; now their NATs would let them."""
    relay = await internet.relay()
    follower, leader = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(follower, leader)
    assert await echoed(follower, leader) == b"hello"
    await eventually(lambda: leader._relaying._punch._waiting, within_s=10)
    assert relayed(follower, leader) == [True]
    internet.punchable = True
    return follower, leader


@pytest.fixture
def soon(monkeypatch) -> None:
    """Other attempts follow soon."""
    monkeypatch.setattr(holepunch, "_AGAIN_S", (0.1, 0.2))


@pytest.mark.usefixtures("from_listening_ports")
async def test_two_that_dial_each_other_at_once_agree_on_who_leads(internet) -> None:
    internet.punchable = True
    relay = await internet.relay()
    a, b = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(a, b)
    introduce(b, a)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echoed, a, b)
        nursery.start_soon(echoed, b, a)
    await eventually(lambda: relayed(a, b) == relayed(b, a) == [False], within_s=10)


@pytest.mark.usefixtures("soon")
async def test_what_failed_is_tried_again(stuck_pair: tuple[Mesh, Mesh]) -> None:
    follower, leader = stuck_pair
    await eventually(lambda: relayed(follower, leader) == relayed(leader, follower) == [False], within_s=20)


async def test_a_change_of_network_is_a_reason_to_try_again(stuck_pair: tuple[Mesh, Mesh]) -> None:
    follower, leader = stuck_pair
    leader._announcer.on_woken()
    await eventually(lambda: relayed(follower, leader) == relayed(leader, follower) == [False], within_s=20)


async def test_a_peer_that_tells_a_new_address_is_dialed(internet, stuck_pair: tuple[Mesh, Mesh]) -> None:
    """It has become reachable: the router forwards the port now."""
    follower, leader = stuck_pair
    internet.hidden.discard(follower._network.bound[0].port)
    leader.add_addresses(follower.key, [f"/ip4/127.0.0.2/tcp/{follower._network.bound[0].port}"])
    follower._discovery.on_addresses_changed()
    await eventually(lambda: relayed(follower, leader) == relayed(leader, follower) == [False], within_s=20)


async def test_nothing_waits_for_a_connection_that_is_over(stuck_pair: tuple[Mesh, Mesh]) -> None:
    follower, leader = stuck_pair
    for connection in leader._network.connections_with(follower.key):
        await connection.close()
    await eventually(lambda: not leader._relaying._punch._waiting)
    assert not leader._relaying._punch._upgrading


def _between(internet, ports: list[int]) -> list[tuple[int, int]]:
    return [(own, to.port) for own, to in internet.dialed if own in ports and to.port in ports]


async def _relayed_pair(internet) -> tuple[Mesh, Mesh]:
    """A leader that has given up, and its follower."""
    relay = await internet.relay()
    follower, leader = await internet.hidden_node(relay), await internet.hidden_node(relay)
    introduce(follower, leader)
    await echoed(follower, leader)
    await eventually(lambda: not leader._relaying._punch._upgrading)
    internet.dialed.clear()
    return follower, leader


@pytest.mark.parametrize(
    "data",
    [
        b"\x03abc",
        b"\xff\xff\xff\xff",
        framed(PunchMessage(PunchType.SYNC)),
        framed(PunchMessage(PunchType.CONNECT, _addresses("127.0.0.1"))) * 2,
    ],
)
async def test_nonsense_costs_the_stream_only(internet, data: bytes) -> None:
    follower, leader = await _relayed_pair(internet)
    stream = await _punch_stream(leader, follower)
    await stream.write(data)
    assert await _is_reset(stream)
    assert await echoed(follower, leader) == b"hello"


async def test_a_follower_dials_few_addresses_and_no_private_ones(internet) -> None:
    follower, leader = await _relayed_pair(internet)
    told = ("10.0.0.1", "192.168.1.1", "0.0.0.0", *(f"45.1.1.{number}" for number in range(1, 60)))

    async def refuse(address: Address, *, fresh_port: bool = False) -> None:
        internet.dialed.append((0, address))
        raise OSError("nobody there")

    follower._network.open_raw = refuse
    stream = await _punch_stream(leader, follower)
    with trio.fail_after(5):
        await stream.write(framed(PunchMessage(PunchType.CONNECT, _addresses(*told[:12]))))
        answer = PunchMessage.decode(await receive(stream))
        assert answer.type == PunchType.CONNECT
        assert direct_addresses_of(answer.addresses) == []  # on loopback nobody knows
        await stream.write(framed(PunchMessage(PunchType.SYNC)))
    await eventually(lambda: len(internet.dialed) >= 4)
    assert sorted(address.host for _own, address in internet.dialed) == [f"45.1.1.{number}" for number in range(1, 5)]


async def test_a_peer_cannot_make_us_punch_all_the_time(internet) -> None:
    follower, leader = await _relayed_pair(internet)
    rounds = 0
    for _ in range(10):
        stream = await _punch_stream(leader, follower)
        with trio.fail_after(5):
            try:
                for _ in range(3):
                    await stream.write(framed(PunchMessage(PunchType.CONNECT, _addresses("10.0.0.1"))))
                    await receive(stream)
                    await stream.write(framed(PunchMessage(PunchType.SYNC)))
                    rounds += 1
            except Exception:  # noqa: BLE001  (reset in the middle of any step)
                continue
        await eventually(lambda: not follower._relaying._punch._following)
    assert rounds <= 9


@pytest.mark.usefixtures("from_listening_ports")
async def test_a_peer_cannot_make_us_lead_all_the_time(internet) -> None:
    """Each round of dialing counts, not only the first of four."""
    follower, leader = await _relayed_pair(internet)
    punch, ports = leader._relaying._punch, [mesh._network.bound[0].port for mesh in (leader, follower)]
    for _ in range(5):
        await eventually(lambda: punch._waiting and not punch._upgrading, within_s=20)
        leader._announcer.on_woken()
    await eventually(lambda: punch._waiting and not punch._upgrading, within_s=20)
    assert _between(internet, ports).count((ports[0], ports[1])) <= 5


async def test_who_leads_is_fixed(internet) -> None:
    """Only the peer that received the relayed connection leads; nobody over a direct one."""
    follower, leader = await _relayed_pair(internet)
    for source, target in ((follower, leader), (leader, follower)):
        stream = await _punch_stream(source, target)
        assert source is leader or await _is_reset(stream)
    relay = next(key for key in follower._network.connected_keys() if key != leader.key)
    stream = follower._network.connection_to(relay).muxer.open_stream_nowait()
    await stream.write(proposal(DCUTR))
    await confirm(stream, DCUTR)
    assert await _is_reset(stream)
