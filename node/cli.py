"""The `kaisar` command: the table of commands, and how errors end one. `docs/cli.md` describes all of it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from kaisar_p2p.errors import KaisarError
from node.commands import doctor, init, lease, look, network, order, owner, proof, run, wallet
from node.commands.output import FAILED, INTERRUPTED, exit_code, print_error, say

EXTENSIONS = "kaisar.commands"
"""Entry points of this group add commands from packages above this one (`testnet`), which it may not import.

Each is a `typer.Typer` (a group under the entry point's name) or a function (a command).
"""
DEBUG_VARIABLE = "KAISAR_DEBUG"


def make_app() -> typer.Typer:
    """The whole tree of commands."""
    app = typer.Typer(
        name="kaisar",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,  # a secret may be among them
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        help="A peer-to-peer GPU network: providers prove their machines, checkers certify it, clients rent them.",
        epilog="Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 3 no node runs, "
        "4 configuration, keys or data directory cannot be used, 130 interrupted.",
    )
    app.callback()(_options)
    for command in (init.init, run.run, look.status, look.peers, look.workers, look.checks, look.epochs, doctor.doctor):
        app.command()(command)
    for name, group, text in _GROUPS:
        app.add_typer(group, name=name, help=text)
    _add_extensions(app)
    return app


_GROUPS = (
    ("wallet", wallet.app, "Wallets: keys on this machine, balances on the ledger."),
    ("order", order.app, "Orders: rent a container."),
    ("lease", lease.app, "Leases: connect, read logs, run commands."),
    ("rewards", owner.rewards, "Rewards of this node's owner."),
    ("proof", proof.app, "Proofs of rewards that verify offline."),
    ("stake", owner.stake, "Stake of a checker."),
    ("licence", owner.licence, "Checker licences."),
    ("network", network.app, "Private swarms: the key that only their nodes have."),
    ("worker", owner.worker, "This machine as a worker."),
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kaisar {version('kaisar-p2p')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def _add_extensions(app: typer.Typer) -> None:
    for entry in sorted(entry_points(group=EXTENSIONS), key=lambda entry: entry.name):
        try:
            added = entry.load()
        except (ImportError, AttributeError) as error:
            say(f"warning: the command {entry.name} cannot be loaded: {error}")
            continue
        if isinstance(added, typer.Typer):
            app.add_typer(added, name=entry.name)
        else:
            app.command(entry.name)(added)


def main() -> None:
    """The console script."""
    try:
        make_app()(prog_name="kaisar")
    except KaisarError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print_error(error.message, error.hint)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)
    except OSError as error:  # of standard output: a full disk, a closed pipe
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print_error(f"the system refuses: {error}", "check free space and rights")
        sys.exit(FAILED)
    except Exception as error:  # the edge of the program
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print_error(f"a mistake in this program: {type(error).__name__}: {error}", "KAISAR_DEBUG=1 shows where")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
