"""What a mesh says about itself beyond counters, for `kaisar doctor` and its like."""

from __future__ import annotations

from dataclasses import dataclass

from kaisar_p2p.mesh.reach.reachability import Reachability
from kaisar_p2p.mesh.reach.relay import RelayStatistics


@dataclass(frozen=True)
class MeshReport:
    """How a node stands in its network.

    `listening` are its addresses on its own interfaces, `port_mapping` a sentence on the router, `relays` the
    addresses at which relays take connections for it, `carrying` what it carries for others, `on_lan` whether it
    looks for peers on the local network, `banned` how many keys and addresses it refuses for misbehaviour,
    `key_conflict` a sentence on another process with its machine key, None when there is none, `key_conflict_proven`
    whether that is more than a peer's claim, `unreached` a sentence on each of the first peers that a person named and
    that cannot be reached.
    """

    reachability: Reachability
    listening: tuple[str, ...]
    port_mapping: str
    relays: tuple[str, ...]
    carrying: RelayStatistics
    on_lan: bool
    banned: int
    key_conflict: str | None
    key_conflict_proven: bool = False
    unreached: tuple[str, ...] = ()
