"""Relays: many keys behind one address do not take the places of all others."""

from __future__ import annotations

import os
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from nacl.signing import SigningKey

from kaisar_p2p.mesh.guard.admission import origin_of
from kaisar_p2p.mesh.ids import key_pair_of
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach.relay import Relay

LIMITS = MeshLimits(relay_circuits=64, relay_circuits_per_peer=8)


def circuits(relay: Relay, places: ExitStack, host: str, count: int, target: bytes | None = None) -> int:
    """Circuits that so many keys of one address get, to one target or to as many."""
    got = 0
    for _ in range(count):
        comer = SimpleNamespace(key=os.urandom(32), origin=origin_of(host))
        try:
            places.enter_context(relay._place(comer, target or os.urandom(32)))  # type: ignore[arg-type]
        except Exception as refusal:  # noqa: BLE001  (a private class)
            assert "circuits" in str(refusal)
        else:
            got += 1
    return got


@pytest.mark.parametrize("members", [False, True])
def test_one_address_takes_its_share_of_the_circuits(members: bool) -> None:
    network = Network(key_pair_of(os.urandom(32)), LIMITS)
    relay = Relay(network, SigningKey(os.urandom(32)), tuple)
    relay.is_member = lambda _key: members
    target = os.urandom(32)
    with ExitStack() as places:
        assert circuits(relay, places, "6.6.6.6", 40) == 16
        assert circuits(relay, places, "8.8.8.8", 1) == 1
        assert circuits(relay, places, "9.9.9.9", 40, target) == 4
        assert circuits(relay, places, "8.8.8.8", 1, target) == 1
    assert not relay._comers
    assert not relay._ends
    with ExitStack() as places:
        assert circuits(relay, places, "192.168.0.1", 20) == 20
