"""`kaisar init`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.identity import Scheme
from kaisar_p2p.wire.money import planck_to_kai
from node.commands.network import new_swarm_key
from node.commands.options import AsJson, DataDir, NoPassphrase, PassphraseFile, SchemeName, data_directory
from node.commands.output import say, show_json
from node.passphrase import read_passphrase

if TYPE_CHECKING:
    from node.initialise import Made, Plan

NETWORKS = ("demo", "testnet", "mainnet")


def new_passphrase(*, no_passphrase: bool, file: Path | None) -> str | None:
    """The passphrase for new keys; None when they are to be stored unencrypted."""
    if not no_passphrase:
        return read_passphrase(os.environ, passphrase_file=file, confirm=True, purpose="New passphrase for the keys")
    if file is not None:
        raise ConfigError("--no-passphrase and --passphrase-file exclude each other", hint="leave one of them out")
    return None


def init(
    data_dir: DataDir = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="What the node does: provider, checker, client, explorer, bootstrap; repeatable."),
    ] = None,
    network: Annotated[
        str, typer.Option("--network", help="Parameters of a new network: demo, testnet or mainnet.")
    ] = "demo",
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", metavar="FILE", help="Join the network of this ledger file.", show_default=False),
    ] = None,
    genesis: Annotated[
        Path | None,
        typer.Option("--genesis", metavar="FILE", help="Start from this genesis document.", show_default=False),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="MULTIADDR", help="Address to listen on for peers; repeatable."),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option("--join", metavar="MULTIADDR", help="A peer to meet first; repeatable."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a key for a private swarm; copy it to the swarm's other nodes.")
    ] = False,
    swarm_key: Annotated[
        Path | None,
        typer.Option(
            "--swarm-key", metavar="FILE", help="Take part in the private swarm with this key.", show_default=False
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="A name for people, shown in logs and on pages.")] = "",
    scheme: SchemeName = "ed25519",
    no_passphrase: NoPassphrase = False,
    passphrase_file: PassphraseFile = None,
    show_mnemonic: Annotated[
        bool, typer.Option("--show-mnemonic", help="Print the wallet's phrase once; whoever reads it owns the wallet.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a data directory: keys, configuration and, unless --ledger is given, a local ledger for development.

    Examples:

      kaisar init --no-passphrase

      kaisar init --role provider --ledger /srv/kaisar/ledger.sqlite --passphrase-file secret.txt
    """
    from node.initialise import Plan, initialise

    if network not in NETWORKS:
        raise typer.BadParameter(f"{network!r} is not one of {', '.join(NETWORKS)}", param_hint="--network")
    directory = data_directory(data_dir)
    settings: dict[str, object] = {"node.name": name}
    settings |= {key: value for key, value in _lists(role, listen, join) if value}
    passphrase = new_passphrase(no_passphrase=no_passphrase, file=passphrase_file)
    key = _swarm_key(private, swarm_key)
    plan = Plan(directory, passphrase, network, ledger, genesis, Scheme.from_label(scheme), settings, key)
    made = initialise(plan, time_ms=time.time_ns() // 1_000_000)
    if as_json:
        _show_json(plan, made, show_mnemonic)
    else:
        _tell(plan, made, show_mnemonic)


def _swarm_key(private: bool, file: Path | None) -> str | None:
    """The text of the key file of a private swarm, a new one or a given one that is checked; None for an open swarm."""
    if private and file is not None:
        raise ConfigError("--private and --swarm-key exclude each other", hint="leave one of them out")
    if private:
        return new_swarm_key()
    if file is None:
        return None
    from kaisar_p2p.mesh.transport.pnet import format_key
    from node.mesh_settings import read_swarm_key

    return format_key(read_swarm_key(file.expanduser()))


def _show_json(plan: Plan, made: Made, show_mnemonic: bool) -> None:
    record = {
        "data_directory": str(plan.data_directory),
        "key": made.machine.public_key.hex(),
        "peer_id": made.machine.peer_id,
        "address": made.wallet.address,
        "network": made.network.hex(),
        "own_ledger": made.own_ledger,
        "encrypted": plan.passphrase is not None,
        "private": plan.swarm_key is not None,
    }
    show_json(record | ({"mnemonic": made.phrase} if show_mnemonic else {}))


def _tell(plan: Plan, made: Made, show_mnemonic: bool) -> None:
    from node.initialise import OWN_BALANCE_PLANCK

    print(f"Made {plan.data_directory}")
    print(f"Machine key  {made.machine.public_key.hex()}")
    print(f"Wallet main  {made.wallet.address}")
    if show_mnemonic:
        print(f"Phrase       {made.phrase}")
    if made.own_ledger:
        balance = planck_to_kai(OWN_BALANCE_PLANCK)
        say(f"A new local ledger for development was made ({plan.network}); the wallet has {balance} KAI on it.")
    if plan.swarm_key is not None:
        say(f"The swarm is private: its nodes need a copy of {plan.data_directory / 'swarm.key'}.")
    if plan.passphrase is None:
        say("The keys are stored unencrypted.")
    if not show_mnemonic:
        say(f"Keep a copy of the wallet: kaisar wallet export main --data-dir {plan.data_directory}")
    say(f"Next: kaisar run --data-dir {plan.data_directory}")


def _lists(
    role: list[str] | None, listen: list[str] | None, join: list[str] | None
) -> list[tuple[str, list[str] | None]]:
    return [("node.roles", role), ("network.listen", listen), ("network.join", join)]
