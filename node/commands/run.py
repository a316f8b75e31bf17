"""`kaisar run`: the node itself, in the foreground."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaisar_p2p.errors import ungrouped
from kaisar_p2p.identity import Keystore
from kaisar_p2p.wire.ids import short
from node.commands.options import DataDir, PassphraseFile, data_directory
from node.config import Config, check_data_directory, load_config, lock_data_directory, read_passphrase

if TYPE_CHECKING:
    from kaisar_p2p.identity import MachineKey, Wallet
    from node.node import Node


def run(
    data_dir: DataDir = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role", help="provider, checker, client, explorer or bootstrap; repeatable, replaces those configured."
        ),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option("--join", metavar="MULTIADDR", help="A peer to meet first, besides those configured; repeatable."),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="MULTIADDR", help="Where to listen for peers; repeatable."),
    ] = None,
    api_port: Annotated[
        int | None,
        typer.Option("--api-port", min=0, max=65535, help="Port of the API; 0 for a free one.", show_default=False),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="debug, info, warning or error.", show_default=False)
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Run a node until Ctrl-C or SIGTERM. Leases are kept: they go on, and are taken up again at the next start.

    Examples:

      kaisar run --role client

      kaisar run --role provider --role checker --join /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW…
    """
    directory = data_directory(data_dir)
    check_data_directory(directory)
    flags: dict[str, object] = {}
    if role:
        flags["node.roles"] = role
    if listen:
        flags["network.listen"] = listen
    if api_port is not None:
        flags["api.port"] = api_port
    if log_level:
        flags["log.level"] = log_level
    if log_json:
        flags["log.json"] = True
    config = load_config(directory, flags=flags)
    if join:
        both = dict.fromkeys([*config.network.join, *join])
        config = config.with_settings({"network.join": list(both)})
    with lock_data_directory(directory):
        run_configured(config, _passphrase(config, passphrase_file))


def run_configured(config: Config, passphrase: str | None) -> None:
    """Unlock the keys and run; the caller holds the directory's lock."""
    from node.boot import unlock_keys
    from node.log import configure_logging

    configure_logging(config.log.level, as_json=config.log.json)
    keys, wallet = unlock_keys(config, passphrase)
    _run_until_signal(config, keys, wallet, _announce)


def _passphrase(config: Config, file: Path | None) -> str | None:
    """None when no key needs one; the files say so themselves."""
    keystore = Keystore(config.keys_path)
    if keystore.machine_info().encrypted or keystore.wallet_info(config.node.wallet).encrypted:
        return read_passphrase(os.environ, passphrase_file=file, purpose="Passphrase of the keys")
    return None


def _announce(node: Node) -> None:
    from node.api.address import read_address

    roles = ", ".join(node.roles)
    addrs = " ".join(node.mesh.addrs) or "no address: it only dials others"
    print(
        f"{roles} {short(node.key)} is ready at {addrs}, API {read_address(node.config.data_directory).url}", flush=True
    )


def _run_until_signal(config: Config, keys: MachineKey, wallet: Wallet, ready: Callable[[Node], None]) -> None:
    """A signal before the node is ready ends its start; later ones stop the node, and then cut its end short."""
    import trio

    from node.boot import run_node, stop_signals

    async def cancel_on_signal(scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*stop_signals()) as signals:
            task_status.started()
            async for _ in signals:
                scope.cancel()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(cancel_on_signal, nursery.cancel_scope)
            await run_node(config, keys, wallet, ready)
            nursery.cancel_scope.cancel()

    with ungrouped():
        trio.run(main)
