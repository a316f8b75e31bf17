"""For whom a relay carries bulk: those that are at work in the network, not pure clients."""

from __future__ import annotations

from protocols.interpreter.calls import CHECKER, PROVIDER
from protocols.interpreter.state import State


def is_relay_member(state: State, key: bytes) -> bool:
    """The machine key is bound as a provider or checker, or is the client's of an open order."""
    machine = state.machines.get(key)
    if machine is not None and machine.roles & (PROVIDER | CHECKER):
        return True
    return any(state.orders[order].client_key == key for orders in state.open_orders.values() for order in orders)
