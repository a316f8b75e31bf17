"""What every node does: close epochs or judge those who do, keep and serve their bodies, settle what concerns it."""

from __future__ import annotations

from node.roles import Role, RoleContext, Served
from protocols.claims import Claims
from protocols.epoch_machine import EpochMachine
from protocols.epochs import FETCH_PROTOCOL
from protocols.machine import Machine


def machines(context: RoleContext) -> list[Machine]:
    """Nodes without stake judge and keep, but sign nothing."""
    store = context.store
    epochs = EpochMachine(
        context.keys, context.network, certificates=store.items("certificate"), bodies=store.items("body")
    )
    return [epochs, Claims(context.owner, lambda digest: store.item("body", digest))]


EVERYBODY = Role(machines, (Served(FETCH_PROTOCOL, max_frame_bytes=1 << 12),))
