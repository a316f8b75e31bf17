"""Checks of the network, from what the running node answers at `GET /v1/network`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from node.diagnosis.finding import Findings

Answer = Mapping[str, Any]

WARNED_SKEW_S, WRONG_SKEW_S = 10.0, 60.0
_JOIN_HINT = "do the addresses that were named answer, with the same swarm key, and does a firewall let TCP out?"
_NOBODY_TO_ASK = (
    "peers on the internet are asked, and none has been so far; in a network without internet that is as it should be"
    " (to have it checked there too, name this machine's address in network.listen instead of 0.0.0.0)"
)
_PATIENCE = "wait a minute: peers are asked again and again"
_LIMIT_OF = {
    "connections": "connections",
    "address": "connections_per_address",
    "subnet": "connections_per_subnet",
    "handshakes": "handshakes",
    "streams": "streams",
    "key": "connections_per_key",
}


def check_peers(findings: Findings, network: Answer, *, expected: bool) -> None:
    """Whether the node knows anybody; `expected`: it was told whom to meet."""
    peers = network["peers"]
    unreached = "; ".join(peers["unreached"])
    if peers["connected"]:
        relayed = f", {peers['relayed']} over relays" if peers["relayed"] else ""
        text = f"{peers['connected']} connected: {peers['in']} in, {peers['out']} out{relayed}"
        if unreached:
            findings.warn("peers", f"{text}; {unreached}", _JOIN_HINT)
        else:
            findings.ok("peers", text)
    elif expected or unreached:
        findings.fail("peers", "connected with nobody" + (f"; {unreached}" if unreached else ""), _JOIN_HINT)
    else:
        findings.warn("peers", "connected with nobody", "name a peer in network.join, or `kaisar run --join`")


def check_reachability(findings: Findings, network: Answer) -> None:
    """Whether others can dial the node, how that was found out, and what to do."""
    reach = network["reachability"]
    ago = f", {_ago(reach['checked_s'])}" if reach["checked_s"] is not None else ""
    how = f"{reach['how']}{ago}"
    match reach["status"]:
        case "public":
            findings.ok("reachable", f"yes: {how}")
        case "private":
            findings.warn("reachable", f"no: {how}", _advice(network))
        case _ if network["peers"]["connected"] and reach["checked_s"] is None:
            findings.ok("reachable", f"not known: {_NOBODY_TO_ASK}")
        case _:
            hint = _PATIENCE if network["peers"]["connected"] else "it needs a peer to ask"
            findings.warn("reachable", f"not known yet: {how}", hint)


def _advice(network: Answer) -> str:
    listening = [_host_and_port(text) for text in network["listening"]]
    inside = [(host, port) for host, port in listening if host not in ("127.0.0.1", "::1")]
    if not inside:
        return "no other machine can: set network.listen to more than loopback, such as /ip4/0.0.0.0/tcp/4001"
    host, port = inside[0]
    relays = len(network["relays"])
    meanwhile = (
        f"or leave it: {relays} relay{'s carry' if relays > 1 else ' carries'} connections meanwhile"
        if relays
        else "until then nobody can connect to this node: no relay was found either"
    )
    return (
        f"forward TCP port {port} on your router to {host} port {port}, and let the firewall of this machine pass it;"
        f" {meanwhile}"
    )


def _host_and_port(multiaddr: str) -> tuple[str, str]:
    parts = multiaddr.split("/")
    return (parts[2], parts[4]) if len(parts) > 4 else ("", "")


def check_translation(findings: Findings, network: Answer) -> None:
    """What stands between the node and the internet."""
    reach = network["reachability"]
    if not reach["observed"]:
        findings.ok("seen as", "fewer than two independent peers have said how they see this node")
        return
    inside = {_host_and_port(text)[0] for text in network["listening"]}
    seen = ", ".join(reach["observed"])
    if set(reach["observed"]) <= inside:
        findings.ok("seen as", f"{seen}: no address translation")
        return
    kind = {
        True: "it keeps ports, which suits hole punching",
        False: "it changes ports, so hole punching will often fail",
        None: "of unknown kind",
    }[reach["keeps_ports"]]
    findings.ok("seen as", f"{seen}, behind address translation: {kind}")


def check_helpers(findings: Findings, network: Answer) -> None:
    """Router, relays, local network."""
    findings.ok("router", f"UPnP: {network['port_mapping']}")
    relays, carried = network["relays"], network["relaying"]
    if relays:
        findings.ok("relays", f"{len(relays)} for this node, which is dialed there: {', '.join(relays)}")
    elif network["reachability"]["status"] == "private":
        findings.warn("relays", "none takes connections for this node", "nodes that can be reached relay: join one")
    else:
        findings.ok(
            "relays",
            f"none is used; this node carries {carried['circuits']} connections of others,"
            f" {carried['reservations']} nodes hold a place",
        )
    findings.ok("local network", "peers are looked for by mDNS" if network["on_lan"] else "mDNS is off")


def check_clock(findings: Findings, network: Answer) -> None:
    """Our clock against those of the peers."""
    skew_s = network["clock_skew_s"]
    if skew_s is None:
        findings.ok("clock", "fewer than three peers to compare it with")
        return
    way = "ahead of" if skew_s > 0 else "behind"
    text = f"{abs(skew_s):.1f} s {way} the peers' clocks"
    if abs(skew_s) > WARNED_SKEW_S:
        grade = findings.fail if abs(skew_s) > WRONG_SKEW_S else findings.warn
        grade("clock", text, "set this machine's clock, best by NTP: timedatectl set-ntp true; then restart the node")
    else:
        findings.ok("clock", text)


def check_key(findings: Findings, network: Answer) -> None:
    """Another process with our key."""
    if network["key_conflict"]:
        grade = findings.fail if network["key_conflict_proven"] else findings.warn
        grade("machine key", network["key_conflict"], "stop one of them, or make another data directory for it")
    else:
        findings.ok("machine key", "no other process uses it, as far as peers have told")


def check_limits(findings: Findings, network: Answer) -> None:
    """What gave way: refused connections, dropped messages, banned peers."""
    if network["private"]:
        strangers = network["refused"].get("pre-shared key", 0)
        findings.ok("swarm key", f"{strangers} connections had another one or none, and were refused")
    findings.ok("banned", f"{network['banned']} peers and addresses, for misbehaviour")
    dropped = {one["where"]: 0 for one in network["drops"]}
    for one in network["drops"]:
        dropped[one["where"]] += one["count"]
    if any(dropped.values()):
        text = ", ".join(f"{count} {where}" for where, count in sorted(dropped.items()) if count)
        findings.warn("gossip", f"messages gave way to more important ones: {text}", "this machine or its line is slow")
    else:
        findings.ok("gossip", "no message was dropped")
    hit = dict(_limits_hit(network["refused"]))
    if hit:
        text = ", ".join(f"{count} for {limit}" for limit, count in sorted(hit.items()))
        findings.warn("limits", f"connections or streams were refused: {text}", "raise them in [network.limits]")
    else:
        findings.ok("limits", "none was hit")


def _limits_hit(refused: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for reason, count in refused.items():
        if reason in _LIMIT_OF and count:
            yield _LIMIT_OF[reason], count


def _ago(seconds: int) -> str:
    return f"{seconds // 60} min ago" if seconds >= 60 else f"{seconds} s ago"
