"""Certifies providers: a seat in check committees and deploy committees, and the counting of their votes."""

from __future__ import annotations

from node.roles import Role, RoleContext, Served
from protocols.lease_witness import LeaseSeatMachine
from protocols.machine import Machine
from protocols.popw import VOTE_PROTOCOL
from protocols.popw_seat import SeatMachine


def machines(context: RoleContext) -> list[Machine]:
    """Seats of both kinds of committee."""
    return [
        SeatMachine(context.keys, context.entropy),
        LeaseSeatMachine(context.keys, context.entropy, context.store.items("watch")),
    ]


CHECKER = Role(machines, (Served(VOTE_PROTOCOL, max_frame_bytes=1 << 12, per_peer=32, rate_per_s=100.0),))
