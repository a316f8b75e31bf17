"""`kaisar testnet …` and `kaisar demo`; `node/cli.py` finds them by the entry points "kaisar.commands"."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaisar_p2p.errors import KaisarError
from node.commands.options import AsJson
from node.commands.output import say, show_rows

if TYPE_CHECKING:
    from testnet.swarm import Swarm

Directory = Annotated[
    Path | None,
    typer.Option(
        "--directory",
        metavar="DIR",
        readable=False,
        help="Where the swarm lives; default: kaisar/testnet/<network> below XDG's state directory.",
        show_default=False,
    ),
]
Network = Annotated[
    str, typer.Option("--network", help="A network that is shipped (demo, small, wrong), or the path of a manifest.")
]
FOLLOW_S = 0.3

testnet_app = typer.Typer(no_args_is_help=True, help="Run a swarm of real node processes on this machine.")


@testnet_app.command()
def up(network: Network = "small", directory: Directory = None) -> None:
    """Start a swarm and wait until every node answers; one that was stopped goes on where it was.

    Examples:

      kaisar testnet up

      kaisar testnet up --network demo --directory /tmp/swarm
    """
    from testnet.manifest import load_manifest
    from testnet.paths import swarm_directory
    from testnet.prepare import is_prepared, prepare
    from testnet.swarm import Swarm

    stop_like_ctrl_c()
    manifest = load_manifest(network)
    target = swarm_directory(directory, manifest.name)
    if is_prepared(target):
        swarm = Swarm.open(target)
        if swarm.prepared.network != manifest.name:
            hint = "pass another --directory, or that --network"
            raise KaisarError(f"{target} holds network {swarm.prepared.network}, not {manifest.name}", hint=hint)
    else:
        swarm = Swarm(prepare(manifest, target, time_ms=time.time_ns() // 1_000_000))
        say(f"Made {target}; the keys have no passphrase: for development only.")
    started = swarm.up(lambda name, what: say(f"{name} {what}"))
    if not started:
        say(f"All nodes of {target} run already.")
        return
    say(f"{len(started)} nodes run. Look at them: kaisar testnet status --directory {target}")
    for member in swarm.prepared.members:
        if "client" in member.roles:
            say(f"Order from them:  KAISAR_HOME={swarm.prepared.data_directory(member.name)} kaisar workers")
            break


@testnet_app.command()
def status(directory: Directory = None, network: Network = "small", as_json: AsJson = False) -> None:
    """Show every node of a swarm: whether it runs, whom it knows, where it is, what memory it takes.

    Exits with 1 when a node that was started does not run.

    Example: kaisar testnet status
    """
    from dataclasses import asdict

    rows = [asdict(each) for each in _open(directory, network).status()]
    columns: list[tuple[str, Any]] = [
        ("node", "name"),
        ("roles", "roles"),
        ("state", "state"),
        ("process", "pid"),
        ("peers", "peers"),
        ("block", "block"),
        ("memory", lambda row: _megabytes(row["memory_bytes"])),
        ("peak", lambda row: _megabytes(row["peak_memory_bytes"])),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="The swarm has no nodes.")
    if any(row["state"] in ("died", "silent") for row in rows):
        raise typer.Exit(1)


@testnet_app.command()
def down(
    directory: Directory = None,
    network: Network = "small",
    delete: Annotated[bool, typer.Option("--delete", help="Remove the directory as well: keys, ledger, logs.")] = False,
) -> None:
    """Stop every node and what its leases run. The next `up` goes on with the same ledger, unless --delete is said.

    Example: kaisar testnet down --delete
    """
    import shutil

    swarm = _open(directory, network)
    killed = swarm.down()
    if killed:
        say(f"{', '.join(killed)} did not end when asked, and had to be killed.")
    if delete:
        shutil.rmtree(swarm.directory)
    say(f"Stopped {swarm.directory}{' and removed it' if delete else ''}.")


@testnet_app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="NODE", help="A node's name, as `kaisar testnet status` shows it.")],
    directory: Directory = None,
    network: Network = "small",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is written, until Ctrl-C.")] = False,
) -> None:
    """Print what a node has logged.

    Example: kaisar testnet logs provider --follow
    """
    swarm = _open(directory, network)
    path = swarm.prepared.log_path(swarm.member(name).name)
    try:
        with path.open("r", encoding="utf-8", errors="replace") as file:
            while True:
                while text := file.read(1 << 16):
                    sys.stdout.write(text)
                sys.stdout.flush()
                if not follow:
                    return
                time.sleep(FOLLOW_S)
    except FileNotFoundError:
        raise KaisarError(f"{name} has not been started yet", hint="kaisar testnet up") from None


@testnet_app.command()
def start(
    name: Annotated[str, typer.Argument(metavar="NODE", help="A node's name.")],
    directory: Directory = None,
    network: Network = "small",
) -> None:
    """Start one node again.

    Example: kaisar testnet start checker-2
    """
    stop_like_ctrl_c()
    running = _open(directory, network).start(name)
    say(f"{name} runs as process {running.pid}.")


@testnet_app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="NODE", help="A node's name.")],
    directory: Directory = None,
    network: Network = "small",
    kill: Annotated[bool, typer.Option("--kill", help="kill -9 instead, as a crash or a power cut would.")] = False,
) -> None:
    """Stop one node, and see what the others make of it. Its leases go on, as they would.

    Example: kaisar testnet stop provider --kill
    """
    swarm = _open(directory, network)
    if kill:
        swarm.kill(name)
    else:
        swarm.stop_node(name)
    say(f"{name} is stopped.")


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the network running at the end, and say how.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object of all figures.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory", metavar="DIR", help="An empty directory for it; default: a new one.", show_default=False
        ),
    ] = None,
    network: Network = "demo",
) -> None:
    """Show everything: 12 processes register, prove, certify and anchor; an order is served, paid and refunded.

    Every step is observed at the nodes' own APIs and on the ledger; the exit code is 0 only if all of them were.

    Examples:

      kaisar demo

      kaisar demo --keep

      kaisar demo --json | tail -n 1
    """
    from testnet.demo import run_demo

    stop_like_ctrl_c()
    target = directory.expanduser().absolute() if directory is not None else None
    raise typer.Exit(run_demo(network, target, keep=keep, as_json=as_json))


def stop_like_ctrl_c() -> None:
    """SIGTERM and a closed terminal end a command as Ctrl-C does: what it started is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def _open(directory: Path | None, network: str) -> Swarm:
    from testnet.manifest import load_manifest
    from testnet.paths import swarm_directory
    from testnet.swarm import Swarm

    name = load_manifest(network).name if directory is None else network
    return Swarm.open(swarm_directory(directory, name))


def _megabytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.0f} MB"
