"""How this node stands in its network, as the API answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from node.node import Node


def network_view(node: Node) -> dict[str, Any]:
    """Reachability and how it was found out, relays, router, limits that gave way; ages in seconds."""
    mesh, now = node.mesh, trio.current_time()
    report, counts, peers = mesh.report(), mesh.statistics(), mesh.peers()
    reach, carrying = report.reachability, report.carrying
    return {
        "reachability": {
            "status": reach.status,
            "how": reach.how,
            "addresses": list(reach.addresses),
            "checked_s": None if reach.checked_at is None else int(now - reach.checked_at),
            "observed": list(reach.observed),
            "keeps_ports": reach.keeps_ports,
        },
        "clock_skew_s": None if reach.clock_skew_s is None else round(reach.clock_skew_s, 3),
        "addrs": list(mesh.addrs),
        "listening": list(report.listening),
        "port_mapping": report.port_mapping,
        "relays": list(report.relays),
        "relaying": {
            "reservations": carrying.reservations,
            "circuits": carrying.circuits,
            "circuits_total": carrying.circuits_total,
            "bytes": carrying.relayed_bytes,
            "refused": dict(carrying.refused),
        },
        "on_lan": report.on_lan,
        "peers": {
            "connected": len(peers),
            "in": sum(peer.inbound for peer in peers),
            "out": sum(not peer.inbound for peer in peers),
            "relayed": sum(peer.relayed for peer in peers),
            "unreached": list(report.unreached),
        },
        "banned": report.banned,
        "key_conflict": report.key_conflict,
        "key_conflict_proven": report.key_conflict_proven,
        "refused": dict(counts.refused),
        "pruned": dict(counts.pruned),
        "drops": [
            {"where": where, "topic": topic, "priority": priority, "count": count}
            for (where, topic, priority), count in sorted(counts.drops.items())
        ],
        "sent_bytes": counts.sent_bytes,
        "received_bytes": counts.received_bytes,
        "private": mesh.config.pre_shared_key is not None,
    }
