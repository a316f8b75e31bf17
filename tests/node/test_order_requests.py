"""What a node refuses of an order before it asks any worker: nothing is locked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kaisar_p2p.errors import OrderRefused
from node.ordering import PlaceOrder, _check_request
from protocols.adverts import CPU_CLASS, Spec
from protocols.interpreter.state import AccountState
from protocols.orders import Workload
from protocols.params import DEMO, KAI

OWNER, KEY = b"\x01" * 32, b"\x02" * 32
NODE: Any = SimpleNamespace(key=KEY, wallet=SimpleNamespace(public_key=OWNER))
RESOURCES = Spec(CPU_CLASS, 1, 256, 100, 0, 0, "")
WORKLOAD = Workload("", ("sleep", "9"), (), ())


def check(points_planck: int, owned_planck: int | None, duration_s: int = 600) -> None:
    accounts = {} if owned_planck is None else {OWNER: AccountState(points_planck=owned_planck)}
    machines = {KEY: SimpleNamespace(owner=OWNER)}
    state: Any = SimpleNamespace(params=DEMO, accounts=accounts, machines=machines)
    _check_request(NODE, state, PlaceOrder(RESOURCES, WORKLOAD, duration_s, KAI, points_planck))


@pytest.mark.parametrize("owned", [None, 0, 5 * KAI - 1])
def test_points_that_nobody_has_are_not_taken_from_the_balance_instead(owned: int | None) -> None:
    with pytest.raises(OrderRefused, match="5 KAI are to be paid with points"):
        check(5 * KAI, owned)


def test_points_that_are_there_may_be_used() -> None:
    check(5 * KAI, 5 * KAI)
    check(0, None)


def test_a_duration_out_of_bounds() -> None:
    with pytest.raises(OrderRefused, match="out of bounds"):
        check(0, None, duration_s=1)
