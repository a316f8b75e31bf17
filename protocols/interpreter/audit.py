"""Checks on a whole state: that no money appeared or vanished, and its fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import msgpack

from kaisar_p2p.wire import merkle
from protocols.interpreter.state import State


def conservation(state: State) -> int:
    """Planck issued, less all that is anywhere; anything but 0 is a bug in the rules."""
    totals = state.totals
    accounts = sum(
        account.balance_planck + account.stake_planck + sum(entry.amount_planck for entry in account.unbonding)
        for account in state.accounts.values()
    )
    bonds = sum(worker.bond_planck for worker in state.workers.values())
    escrows = sum(order.escrow_planck for order in state.orders.values())
    pools = totals.treasury_planck + totals.burnt_planck + totals.reward_pool_planck
    return totals.issued_planck - (accounts + bonds + escrows + pools)


def state_root(state: State) -> bytes:
    """RFC 9162 root over the records [kind, key, record], sorted by kind and key.

    Records are msgpack arrays of their fields in order; integers from 2^64 on are big-endian bytes. Parameters are not
    among them: the network id is the hash of the document that they come from.
    """
    return merkle.root(msgpack.packb(entry, use_bin_type=True) for entry in _entries(state))


_KINDS = ("accounts", "anchors", "beacons", "bootstrap", "machines", "mixes", "open_orders", "orders", "registries",
          "used_offers", "workers")  # fmt: skip


def _entries(state: State) -> Iterator[tuple[Any, ...]]:
    head = (state.number, state.block_hash, state.time_ms, state.last_anchor, state.licences_sold)
    yield "", state.network, (*head, _plain(state.totals))
    for kind in _KINDS:
        records = getattr(state, kind)
        for key in sorted(records):
            yield kind, key, _plain(records[key])


def _plain(value: Any) -> Any:
    if type(value) is int:
        return value if value < 1 << 64 else value.to_bytes((value.bit_length() + 7) // 8, "big")
    if type(value) is tuple:
        return tuple([_plain(item) for item in value])
    if is_dataclass(value):
        return tuple([_plain(getattr(value, item.name)) for item in fields(value)])
    return value
