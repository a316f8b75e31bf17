from __future__ import annotations

from types import SimpleNamespace

import pytest

from node.relay_members import is_relay_member
from protocols.interpreter.calls import CHECKER, CLIENT, PROVIDER

KEY, OTHER, WORKER = bytes(32), bytes([1]) * 32, bytes([2]) * 32


def _state(machines=(), open_orders=()):
    return SimpleNamespace(
        machines={key: SimpleNamespace(roles=roles) for key, roles in machines},
        orders={number: SimpleNamespace(client_key=key) for number, key in enumerate(open_orders)},
        open_orders={WORKER: tuple(range(len(open_orders)))} if open_orders else {},
    )


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (_state(), False),
        (_state([(KEY, PROVIDER)]), True),
        (_state([(KEY, CHECKER | CLIENT)]), True),
        (_state([(KEY, CLIENT)]), False),
        (_state([(OTHER, PROVIDER)]), False),
        (_state([(KEY, CLIENT)], [KEY]), True),
        (_state([(KEY, CLIENT)], [OTHER]), False),
    ],
)
def test_who_may_send_bulk_over_a_relay(state, expected: bool) -> None:
    assert is_relay_member(state, KEY) is expected
