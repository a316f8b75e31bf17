"""The peer-to-peer layer: authenticated connections, gossip with verdicts, request streams, finding peers.

Peers are named by their machine keys (32-byte ed25519 public keys) everywhere above; peer ids of libp2p stay in here.
"""

from __future__ import annotations

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (imports libp2p, once, before anything else does)
from kaisar_p2p.mesh.discovery.addresses import peer_of
from kaisar_p2p.mesh.gossip.pubsub import GossipMessage, Validator
from kaisar_p2p.mesh.limits import MeshConfig, MeshLimits
from kaisar_p2p.mesh.memory import MeshMemory
from kaisar_p2p.mesh.mesh import Mesh, MeshStatistics, PeerInfo, open_mesh
from kaisar_p2p.mesh.reach.reachability import Reachability
from kaisar_p2p.mesh.report import MeshReport
from kaisar_p2p.mesh.streams import MeshStream

__all__ = [
    "GossipMessage",
    "Mesh",
    "MeshConfig",
    "MeshLimits",
    "MeshMemory",
    "MeshReport",
    "MeshStatistics",
    "MeshStream",
    "PeerInfo",
    "Reachability",
    "Validator",
    "open_mesh",
    "peer_of",
]
