"""Messages of relays and hole punching, against the library's protocol buffers and against garbage."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import ModuleType

import libp2p
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.discovery.addresses import Address, CircuitAddress, parse_any, with_peer
from kaisar_p2p.mesh.ids import id_bytes_of
from kaisar_p2p.mesh.protobuf import MalformedMessage, parse_fields
from kaisar_p2p.mesh.reach.circuit_wire import (
    HopMessage,
    HopType,
    Limit,
    PunchMessage,
    PunchType,
    Reservation,
    Status,
    StopMessage,
    StopType,
    addresses_of,
    binary_of,
    direct_addresses_of,
)
from kaisar_p2p.mesh.reach.identify_client import parse

PEER, RELAY = bytes(range(32)), bytes(32)
THROUGH = Address("ip4", "45.1.2.3", 4001)


def _library(name: str) -> ModuleType:
    """The library's generated messages, without its relay."""
    path = Path(libp2p.__file__).parent / "relay" / "circuit_v2" / "pb" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"library_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


circuit_pb2 = _library("circuit_pb2")
dcutr_pb2 = _library("dcutr_pb2")

peers = st.none() | st.binary(min_size=1, max_size=50)
limits = st.none() | st.builds(Limit, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
statuses = st.none() | st.sampled_from(sorted(Status))
reservations = st.none() | st.builds(
    Reservation,
    st.integers(0, 2**64 - 1),
    st.lists(st.binary(max_size=40), max_size=5).map(tuple),
    st.binary(max_size=99),
)
hops = st.builds(HopMessage, st.sampled_from(sorted(HopType)), peers, reservations, limits, statuses)
stops = st.builds(StopMessage, st.sampled_from(sorted(StopType)), peers, limits, statuses)
punches = st.builds(
    PunchMessage, st.sampled_from(sorted(PunchType)), st.lists(st.binary(max_size=40), max_size=5).map(tuple)
)


@given(hops)
def test_hop_messages_are_the_librarys(message: HopMessage) -> None:
    theirs = circuit_pb2.HopMessage.FromString(message.encode())
    assert theirs.type == message.type
    assert theirs.HasField("peer") == (message.peer is not None)
    assert theirs.peer.id == (message.peer or b"")
    assert theirs.status == (message.status or 0)
    assert (theirs.limit.duration, theirs.limit.data) == (
        (message.limit.duration_s, message.limit.data_bytes) if message.limit else (0, 0)
    )
    if message.reservation is not None:
        assert theirs.reservation.expire == message.reservation.expires_at
        assert tuple(theirs.reservation.addrs) == message.reservation.addresses
        assert theirs.reservation.voucher == message.reservation.voucher
    assert HopMessage.decode(message.encode()) == message
    assert HopMessage.decode(theirs.SerializeToString()) == message


@given(stops)
def test_stop_messages_are_the_librarys(message: StopMessage) -> None:
    theirs = circuit_pb2.StopMessage.FromString(message.encode())
    assert (theirs.type, theirs.peer.id, theirs.status) == (message.type, message.peer or b"", message.status or 0)
    assert StopMessage.decode(message.encode()) == message
    assert StopMessage.decode(theirs.SerializeToString()) == message


@given(punches)
def test_punch_messages_are_the_librarys(message: PunchMessage) -> None:
    theirs = dcutr_pb2.HolePunch.FromString(message.encode())
    assert (theirs.type, tuple(theirs.ObsAddrs)) == (message.type, message.addresses)
    assert PunchMessage.decode(message.encode()) == message


@pytest.mark.parametrize("decode", [HopMessage.decode, StopMessage.decode, PunchMessage.decode, parse])
@given(
    data=st.binary(max_size=300)
    | hops.map(HopMessage.encode)
    | st.builds(lambda m, n: m.encode()[:n], hops, st.integers(0, 99))
)
def test_garbage_is_malformed_and_nothing_else(decode, data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # ends after a tag
        b"\x0a\x05abc",  # shorter than announced
        b"\x0b\x00",  # a group
        b"\x08" + b"\xff" * 11,  # a number of 77 bits
        b"\x08\x01" * 65,  # more fields than any message has
        b"\x12\x02ab",  # no type
        b"\x0a\x01x",  # the type is no number
    ],
)
def test_malformed_messages(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        HopMessage.decode(data)


def test_unknown_fields_are_skipped() -> None:
    assert HopMessage.decode(b"\x08\x00\x7d\x01\x02\x03\x04\x32\x03abc") == HopMessage(HopType.RESERVE)
    assert parse_fields(b"\x09" + bytes(8)) == {1: [bytes(8)]}


# -- addresses --------------------------------------------------------------------------------------------------------


def test_circuit_addresses() -> None:
    address = CircuitAddress(RELAY, THROUGH)
    assert str(address) == f"{with_peer(THROUGH, RELAY)}/p2p-circuit"
    assert parse_any(str(address)) == (address, None)
    assert parse_any(with_peer(address, PEER)) == (address, PEER)
    assert parse_any(str(THROUGH)) == (THROUGH, None)
    assert address.is_dialable
    assert not address.is_private
    assert CircuitAddress(RELAY, Address("ip4", "10.0.0.1", 1)).is_private
    assert not CircuitAddress(RELAY, Address("ip4", "45.1.2.3", 0)).is_dialable


@pytest.mark.parametrize(
    "text",
    [
        "/p2p-circuit",
        f"{THROUGH}/p2p-circuit",
        f"{CircuitAddress(RELAY, THROUGH)}/",
        f"{CircuitAddress(RELAY, THROUGH)}s",
        f"{CircuitAddress(RELAY, THROUGH)}/p2p",
        f"{CircuitAddress(RELAY, THROUGH)}/p2p/x",
        f"{CircuitAddress(RELAY, THROUGH)}/tcp/1",
        f"{CircuitAddress(RELAY, THROUGH)}{CircuitAddress(RELAY, THROUGH)}",
        f"{with_peer(CircuitAddress(RELAY, THROUGH), PEER)}/p2p-circuit",
    ],
)
def test_what_is_no_circuit_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_any(text)


def test_addresses_that_peers_send() -> None:
    circuit = CircuitAddress(RELAY, THROUGH)
    sent = [
        binary_of(THROUGH),
        binary_of(with_peer(circuit, PEER)),
        binary_of("/ip4/1.2.3.4/udp/1/quic-v1"),
        b"\xff",
        b"",
    ]
    assert addresses_of(sent) == [(THROUGH, None), (circuit, PEER)]
    assert direct_addresses_of(sent) == [THROUGH]
    assert len(addresses_of([binary_of(THROUGH)] * 1000)) < 20


@given(st.binary(max_size=100), st.integers(0, 80), st.integers(0, 255))
def test_garbage_for_an_address_is_left_out(data: bytes, position: int, byte: int) -> None:
    addresses_of([data])
    broken = bytearray(binary_of(with_peer(CircuitAddress(RELAY, THROUGH), PEER)))
    broken[position % len(broken)] = byte
    for address, key in addresses_of([bytes(broken)]):
        assert parse_any(str(address)) == (address, None)
        assert key is None or len(id_bytes_of(key)) == 38
