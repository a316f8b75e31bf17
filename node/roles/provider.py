"""Rents out this machine: answers challenges, makes offers, runs leases."""

from __future__ import annotations

from node.roles import Role, RoleContext, Served
from protocols.deploy import DEPLOY_PROTOCOL
from protocols.lease_worker import LeaseWorkerMachine
from protocols.machine import Machine
from protocols.offers import Holds, OfferMachine
from protocols.orders import OFFER_PROTOCOL
from protocols.popw import CHALLENGE_PROTOCOL
from protocols.popw_worker import WorkerCheckMachine, WorkerFaults


def machines(context: RoleContext) -> list[Machine]:
    """Offers and leases share what is held."""
    holds, store = Holds(), context.store
    return [
        WorkerCheckMachine(context.keys, WorkerFaults(wrong_tiles=context.wrong_tiles)),
        OfferMachine(context.keys, holds, runtime=context.runtime, max_leases=context.max_leases),
        LeaseWorkerMachine(context.keys, context.network, holds, store.items("lease"), store.items("workload")),
    ]


PROVIDER = Role(
    machines,
    (
        Served(CHALLENGE_PROTOCOL, max_frame_bytes=1 << 12),
        Served(OFFER_PROTOCOL, max_frame_bytes=1 << 17),
        Served(DEPLOY_PROTOCOL, max_frame_bytes=1 << 17),
    ),
)
