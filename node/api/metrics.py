"""Counters and gauges in Prometheus' text exposition format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from protocols.interpreter.state import ORDER_OPEN

if TYPE_CHECKING:
    from node.node import Node

Labels = Mapping[str, str]


def metrics_text(node: Node) -> str:
    """All metrics of a node."""
    lines: list[str] = []
    for name, kind, doc, samples in _metrics(node):
        lines += [f"# HELP kaisar_{name} {doc}", f"# TYPE kaisar_{name} {kind}"]
        lines += [f"kaisar_{name}{_labels(labels)} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _metrics(node: Node) -> Iterator[tuple[str, str, str, list[tuple[Labels, float]]]]:
    state, mesh = node.chain.state, node.mesh.statistics()
    now = node.clock.now()
    orders = sum(order.status == ORDER_OPEN for order in state.orders.values())
    live = len(node.index.live_adverts(now, state.params.advert_ttl_ms))
    yield "uptime_seconds", "gauge", "Since this process started.", [({}, int(now - node.started_at))]
    yield "ledger_block", "gauge", "Newest block that was applied.", [({}, state.number)]
    yield "ledger_block_age_seconds", "gauge", "Its age.", [({}, round(now - state.time_ms / 1000, 3))]
    yield "last_anchored_epoch", "gauge", "Newest epoch on the ledger; -1 for none.", [({}, state.last_anchor)]
    yield "open_orders", "gauge", "Orders on the ledger that have not ended.", [({}, orders)]
    yield "advertised_workers", "gauge", "Workers whose advert is fresh.", [({}, live)]
    yield "certificates", "gauge", "Certificates in this node's index.", [({}, len(node.index.certificates))]
    report = node.mesh.report()
    reachable = {"public": 1, "private": 0, "unknown": -1}[report.reachability.status]
    yield "reachable", "gauge", "Others can dial this node: 1 yes, 0 no, -1 not known.", [({}, reachable)]
    yield "relays", "gauge", "Relays that take connections for this node.", [({}, len(report.relays))]
    yield "relayed_bytes_total", "counter", "Carried for others.", [({}, report.carrying.relayed_bytes)]
    yield "peers", "gauge", "Connected peers.", [({}, mesh.peers)]
    yield "connections", "gauge", "Open connections.", [({}, mesh.connections)]
    yield "sent_bytes_total", "counter", "To peers.", [({}, mesh.sent_bytes)]
    yield "received_bytes_total", "counter", "From peers.", [({}, mesh.received_bytes)]
    messages: list[tuple[Labels, float]] = [
        ({"topic": topic, "verdict": verdict}, count) for (topic, verdict), count in sorted(mesh.messages.items())
    ]
    yield "gossip_messages_total", "counter", "Gossip by topic and verdict.", messages
    yield "refused_total", "counter", "Connections and streams refused.", _by("reason", mesh.refused)
    yield "inbox_events", "gauge", "Events that wait for the driver.", _by("lane", node.inbox.depths())
    yield "dropped_total", "counter", "Events and effects dropped, by where.", _by("where", node.inbox.dropped)


def _by(label: str, counts: Mapping[str, int]) -> list[tuple[Labels, float]]:
    return [({label: name}, count) for name, count in sorted(counts.items())]


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
