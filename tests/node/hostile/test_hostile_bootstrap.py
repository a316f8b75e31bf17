"""Bootstrap records cost nothing: they must not make a node dial for ever, nor push out those who came first."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.wire.codec import is_line
from node.peers import MAX_BOOTSTRAP, PeerKeeper
from protocols.actions import BlockApplied
from protocols.interpreter.state import MachineState

ADDRS = ("/ip4/192.0.2.1/tcp/4001",)


class Mesh:
    """Records what it is asked to do."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.hinted: list[bytes] = []

    def keep_connected(self, key: bytes, addrs: Any) -> None:
        self.kept.append(key)

    def add_addresses(self, key: bytes, addrs: Any) -> None:
        self.hinted.append(key)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


def records(state: Any, *numbers: int) -> Any:
    """A state in which these machines have announced themselves; a lower number was bound earlier."""
    keys = {number: sha256(b"bootstrap %d" % number).digest() for number in numbers}
    machines = state.machines.update({key: MachineState(bytes(32), 4, number) for number, key in keys.items()})
    return replace(state, machines=machines, bootstrap=Map(dict.fromkeys(keys.values(), ADDRS)))


def test_records_that_come_and_go_do_not_pile_up(mesh: Mesh, world: Any) -> None:
    keeper = PeerKeeper(mesh, ())  # type: ignore[arg-type]
    for block in range(100):
        state = records(world.state, *range(10 * block, 10 * block + 10))
        keeper.step(BlockApplied(state, ()), 0.0)
    assert len(set(mesh.kept)) == MAX_BOOTSTRAP
    assert len(mesh.hinted) == 1000 - MAX_BOOTSTRAP


def test_who_was_bound_first_is_dialed_first(mesh: Mesh, world: Any) -> None:
    keeper = PeerKeeper(mesh, ())  # type: ignore[arg-type]
    keeper.step(BlockApplied(records(world.state, *range(200)), ()), 0.0)
    assert mesh.kept == [sha256(b"bootstrap %d" % number).digest() for number in range(MAX_BOOTSTRAP)]


def test_an_unchanged_record_is_not_dialed_again(mesh: Mesh, world: Any) -> None:
    keeper = PeerKeeper(mesh, ())  # type: ignore[arg-type]
    for _ in range(3):
        keeper.step(BlockApplied(records(world.state, 1, 2), ()), 0.0)
    assert len(mesh.kept) == 2


@given(
    st.lists(
        st.text(max_size=40).filter(is_line)
        | st.sampled_from(
            [
                "",
                "/",
                "/ip4//tcp/1",
                "/ip4/999.1.1.1/tcp/1",
                "/ip4/1.2.3.4/tcp/99999",
                "/ip4/1.2.3.4/tcp/-1",
                "/ip6/::/tcp/1",
                "/ip4/1.2.3.4/tcp/1/p2p/x",
                "/ip4/1.2.3.4/udp/1/quic",
                "/dns4/a/tcp/1",
                "/unix/etc/passwd",
            ]
        ),
        max_size=8,
    )
)
def test_any_address_is_taken_or_left(addrs: list[str]) -> None:
    book = AddressBook(allow_private=False, peers=4, addresses_per_peer=2)
    for number in range(8):
        book.add(bytes([number]) * 32, addrs)
    assert len(book.peers()) <= 4
    assert all(len(book.of(key)) <= 2 for key in book.peers())
