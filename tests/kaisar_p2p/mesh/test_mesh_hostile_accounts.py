"""What an attacker could do to the accounts of others, to the database, and to the places at the door."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import trio

from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.guard.admission import Door, Origin, Standing, Visitor, gives_way, origin_of, relayed_origin
from kaisar_p2p.mesh.guard.conduct import Conduct
from kaisar_p2p.mesh.guard.pruning import Pruner
from kaisar_p2p.mesh.guard.reputation import BAN_POINTS, Reputation
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.memory import Remembered
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.transport.yamux_frames import NotAuthentic

KEY, RELAY, OTHER_RELAY = os.urandom(32), os.urandom(32), os.urandom(32)
LIMITS = MeshLimits(handshakes=32, handshakes_per_s=1000)


def test_bans_outlive_a_restart_whoever_else_has_an_account() -> None:
    """Failed handshakes over a relay once left an account with a name that the next start could not read."""
    before, after = Reputation(60.0), Reputation(60.0)
    before.ban(KEY, 0.0)
    before.penalise_address(relayed_origin(KEY, RELAY).account, 5.0, 0.0)
    before.penalise_address("x" * 300, 5.0, 0.0)
    before.penalise_address("2001:1234:1234:1234::/64", 5.0, 0.0)
    assert after.load(before.dump(1.0), 0.0, 1.0) == 3
    assert after.is_banned(KEY, 1.0)


async def test_a_lying_relay_bans_nobody_elsewhere() -> None:
    """It may name anybody as the source of a circuit whose handshake then fails."""
    network = Network(key_pair_of(os.urandom(32)), MeshLimits())
    reputation = Conduct(network, lambda _key: False).reputation
    for _ in range(int(BAN_POINTS) + 5):
        network.on_failed_handshake(relayed_origin(KEY, RELAY))
    assert network.is_origin_banned(relayed_origin(KEY, RELAY))
    assert not network.is_origin_banned(relayed_origin(KEY, OTHER_RELAY))
    assert not network.is_banned(KEY)
    assert reputation.banned(trio.current_time()) == 1


async def test_who_shares_an_address_with_an_attacker_still_gets_through() -> None:
    """Failed handshakes ban the address of a whole NAT."""
    network = Network(key_pair_of(os.urandom(32)), MeshLimits())
    reputation = Conduct(network, lambda _key: False).reputation
    nat, now = origin_of("8.8.8.8"), trio.current_time()
    for _ in range(int(BAN_POINTS) + 5):
        network.on_failed_handshake(nat)
    assert [network._refusal(nat, now + 4 * step) for step in range(4)] == [
        None,
        "banned address",
        "banned address",
        None,
    ]
    connected = Someone(key=KEY, origin=nat, relayed=False)
    network._open[KEY] = [connected]  # type: ignore[list-item]
    assert not network.is_origin_banned(nat)
    reputation.penalise(KEY, 20.0, trio.current_time())
    assert network.is_origin_banned(nat)


class Inn:
    def __init__(self) -> None:
        self.door, self.now, self.expelled = Door(LIMITS), 0.0, 0

    def enter(self, origin: Origin) -> Visitor | str:
        reason = self.door.refusal(origin, self.now)
        return reason if reason is not None else self.door.enter(origin, self.now, self._expel)

    def _expel(self) -> None:
        self.expelled += 1


@pytest.mark.parametrize(
    "origins",
    [
        [origin_of(f"2a00:1450:4001:{number:x}::1") for number in range(40)],  # the /56 of one customer
        [origin_of(f"8.8.8.{number}") for number in range(40)],
        [relayed_origin(os.urandom(32), RELAY) for _ in range(40)],  # whoever a relay makes up
    ],
)
def test_one_subnet_or_relay_does_not_take_all_handshakes(origins: list[Origin]) -> None:
    inn = Inn()
    taken = sum(isinstance(inn.enter(origin), Visitor) for origin in origins)
    assert taken == LIMITS.handshakes // 2
    assert isinstance(inn.enter(origin_of("9.9.9.9")), Visitor)


def test_when_all_handshakes_are_slow_the_oldest_gives_way_to_a_newcomer() -> None:
    """Many networks with one stalled handshake each: who owns a /48 has hundreds."""
    inn = Inn()
    for number in range(LIMITS.handshakes):
        assert isinstance(inn.enter(origin_of(f"2a00:1450:{number:x}::1")), Visitor)
    assert inn.enter(origin_of("9.9.9.9")) == "handshakes"
    inn.now = LIMITS.handshake_s / 2
    assert isinstance(inn.enter(origin_of("9.9.9.9")), Visitor)
    assert inn.expelled == 1
    assert inn.door.half_open == LIMITS.handshakes


class Disk:
    def __init__(self, blob: object) -> None:
        self._blob = blob

    def load(self, name: str) -> bytes | None:
        return self._blob  # type: ignore[return-value]

    def save(self, name: str, blob: bytes) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "rows",
    [
        [["00" * 32, [[]]]],
        [["00" * 32, [["/ip4/8.8.8.8/tcp/1", 10**400]]]],
        [["00" * 32, [["/ip4/8.8.8.8/tcp/1"], ["/ip4/8.8.8.8/tcp/1", None]]]],
        [["00" * 32, {"a": 1}]],
        {"a": 1},
        None,
        7,
    ],
)
async def test_a_damaged_database_does_not_keep_the_mesh_from_starting(rows: object) -> None:
    book = AddressBook(allow_private=True, peers=10, addresses_per_peer=4)
    await Remembered(Reputation(60.0), Disk(json.dumps(rows).encode()), book=book).load()
    await Remembered(Reputation(60.0), Disk("text in the place of bytes"), book=book).load()
    assert book.dump()


@pytest.mark.parametrize("relayed", [True, False])
async def test_a_relay_that_changes_bytes_bans_nobody(relayed: bool) -> None:
    network = Network(key_pair_of(os.urandom(32)), MeshLimits())
    Conduct(network, lambda _key: False)
    origin = relayed_origin(KEY, RELAY) if relayed else origin_of("8.8.8.8")
    connection = SimpleNamespace(key=KEY, relayed=relayed, origin=origin)
    for _ in range(30):
        network.on_offence(connection, NotAuthentic("changed"))  # type: ignore[arg-type]
    assert network.is_banned(KEY) is not relayed
    assert not network.is_origin_banned(relayed_origin(KEY, OTHER_RELAY))


class Someone(SimpleNamespace):
    __hash__ = object.__hash__


class Full:
    """A network whose inbound places are taken by busy peers, `each` from one public address."""

    def __init__(self, each: int, *, subnet: bool = False) -> None:
        self.limits, self.now, self.connections = MeshLimits(), 1000.0, []
        self.door = Door(self.limits)
        places = self.limits.connections - self.limits.outbound_reserved
        for number in range(places):
            host = f"8.8.8.{number // each}" if subnet else f"8.8.{number // each}.8"
            self.connections.append(self.connection(host, since=float(number)))

    def connection(self, host: str, since: float) -> SimpleNamespace:
        self.door._of_subnet[origin_of(host).subnet] += 1
        return Someone(
            key=os.urandom(32), inbound=True, busy=True, origin=origin_of(host), since=since, useful_at=since
        )

    def open_connections(self, *, joining: bool = False) -> list[SimpleNamespace]:
        return self.connections

    def has_room(self) -> bool:
        pruner = Pruner(self, self.limits, self.door)  # type: ignore[arg-type]
        return pruner.has_room_for_inbound(origin_of("9.9.9.9"), self.now)


def test_a_few_addresses_with_open_requests_do_not_hold_all_places() -> None:
    limits = MeshLimits()
    assert Full(each=limits.connections_per_address).has_room()
    assert Full(each=limits.busy_per_address, subnet=True).has_room()
    assert not Full(each=limits.busy_per_address).has_room(), "so many addresses are as many peers"


def test_an_open_request_does_not_protect_who_misbehaves() -> None:
    assert gives_way(Standing(busy=True, blame=60.0), Standing(), 300.0) == "blame"
    assert gives_way(Standing(busy=True, useful_s=900.0), Standing(), 300.0) is None
