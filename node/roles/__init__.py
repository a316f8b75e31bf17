"""What each role runs: lists of machines and served protocols, no logic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kaisar_p2p.wire.crypto import KeyPair
from node.store import NodeStore
from protocols.interpreter import calls
from protocols.machine import Machine

ROLE_BITS = {"provider": calls.PROVIDER, "checker": calls.CHECKER, "client": calls.CLIENT}


@dataclass(frozen=True)
class Served:
    """A stream protocol that the driver answers, and what one peer may ask of it."""

    protocol: str
    max_frame_bytes: int
    per_peer: int = 8
    rate_per_s: float = 20.0


@dataclass(frozen=True)
class RoleContext:
    """What a role may build its machines from. `wrong_tiles` makes a provider cheat, for networks of adversaries."""

    keys: KeyPair
    owner: bytes
    network: bytes
    store: NodeStore
    entropy: Callable[[int], bytes]
    runtime: str
    max_leases: int
    wrong_tiles: int = 0


@dataclass(frozen=True)
class Role:
    """Machines and protocols of one role."""

    machines: Callable[[RoleContext], list[Machine]]
    serves: tuple[Served, ...] = ()


def roles_mask(roles: tuple[str, ...]) -> int:
    """The bit set that is bound on the ledger; a node that only watches or introduces peers is bound as a client."""
    return sum(ROLE_BITS.get(role, 0) for role in roles) or calls.CLIENT
