"""Commands that look at the network through the local node: status, peers, workers, checks, epochs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from node.commands.client import NodeClient
from node.commands.options import AsJson, DataDir, data_directory
from node.commands.output import brief, clock_time, duration, kai, resources, show_record, show_rows

Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many, newest first.")]


def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the local node: who it is, whom it knows, where the ledger stands.

    Example: kaisar status --json
    """
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.get("/v1/status")
    chain = answer["chain"]
    show_record(
        answer,
        [
            ("Machine key", "key"),
            ("Roles", "roles"),
            ("Wallet", "address"),
            ("Balance", kai("balance")),
            ("Points", kai("points")),
            ("Stake", kai("stake")),
            ("Addresses", "addrs"),
            ("Peers", "peers"),
            ("Reachable", lambda row: f"{row['reachable']} (`kaisar doctor` says more)"),
            ("Runtime", "runtime"),
            ("Running for", lambda row: duration(row["uptime_s"])),
            ("Process", "pid"),
            ("Data directory", "data_directory"),
            ("Network", lambda _: chain["network"]),
            ("Block", lambda _: f"{chain['block']} at {clock_time(chain['block_time_ms'])}"),
            ("Slot, epoch", lambda _: f"{chain['slot']}, {chain['epoch']} ({_anchored(chain['last_anchor'])})"),
            ("Workers", lambda _: chain["workers"]),
            ("Checkers", lambda _: chain["checkers"]),
        ],
        as_json=as_json,
    )


def _anchored(epoch: int) -> str:
    return f"last anchored: {epoch}" if epoch >= 0 else "none is anchored yet"


def peers(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the peers that are connected now.

    Example: kaisar peers
    """
    with NodeClient(data_directory(data_dir)) as node:
        rows = node.get("/v1/peers")
    columns: list[tuple[str, Any]] = [
        ("peer", brief("key")),
        ("roles", "roles"),
        ("direction", "direction"),
        ("path", lambda row: "relay" if row["relayed"] else "direct"),
        ("connected", lambda row: duration(row["connected_s"])),
        ("rtt", lambda row: "-" if row["rtt_ms"] is None else f"{row['rtt_ms']:.1f} ms"),
        ("address", lambda row: row["addresses"][:1]),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="No peer is connected.")


def workers(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List registered workers, what their checks certified, and what they advertise.

    Example: kaisar workers --json
    """
    with NodeClient(data_directory(data_dir)) as node:
        rows = node.get("/v1/workers")
    columns: list[tuple[str, Any]] = [
        ("worker", brief("worker")),
        ("status", "status"),
        ("online", "online"),
        ("checks passed", lambda row: f"{row['checks_passed']} of {row['checks']}"),
        ("last", "last_verdict"),
        ("price per hour", kai("price_per_hour")),
        ("has", lambda row: resources(row["spec"])),
        ("free", lambda row: resources(row["advert"]["free"]) if row["advert"] else "-"),
        ("runtime", lambda row: row["advert"]["runtime"] if row["advert"] else "-"),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="No worker is registered.")


def checks(
    data_dir: DataDir = None,
    limit: Limit = 20,
    worker: Annotated[
        str | None, typer.Option("--worker", metavar="KEY", help="Only checks of this worker.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List quorum certificates of checks that this node has heard of, newest first.

    Example: kaisar checks --limit 5
    """
    only = {"worker": worker} if worker else {}
    with NodeClient(data_directory(data_dir)) as node:
        rows = node.get("/v1/checks", limit=limit, **only)
    columns: list[tuple[str, Any]] = [
        ("epoch", "epoch"),
        ("slot", "slot"),
        ("worker", brief("worker")),
        ("verdict", "verdict"),
        ("signatures", "signatures"),
        ("heard at", lambda row: clock_time(row["received_ms"])),
        ("certificate", brief("certificate")),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="No certificate has been heard of yet.")


def epochs(data_dir: DataDir = None, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List epochs that are anchored on the ledger, newest first.

    Example: kaisar epochs
    """
    with NodeClient(data_directory(data_dir)) as node:
        rows = node.get("/v1/epochs", limit=limit)
    columns: list[tuple[str, Any]] = [
        ("epoch", "epoch"),
        ("verdicts", "verdicts"),
        ("rewards", "rewards"),
        ("leases", "leases"),
        ("minted", kai("minted")),
        ("block", "anchor_block"),
        ("bytes", "anchor_bytes"),
        ("header", brief("header_hash")),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="No epoch is anchored yet.")
