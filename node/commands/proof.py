"""`kaisar proof`: proofs of rewards that need no node to be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kaisar_p2p.errors import ConfigError
from node.commands.client import NodeClient
from node.commands.options import AsJson, DataDir, data_directory
from node.commands.output import FAILED, Column, kai, print_error, say, show_record

app = typer.Typer(no_args_is_help=True)


@app.command()
def export(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write to this file.", show_default=False),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Export the proof of what this node's owner has earned: a JSON file that anybody can verify offline.

    Example: kaisar proof export --output reward.json
    """
    with NodeClient(data_directory(data_dir)) as node:
        text = node.get_text("/v1/rewards/proof")
    if output is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    try:
        output.expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}", hint="name another file") from None
    say(f"Wrote {output}")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", readable=False, help="A file of `kaisar proof export`.")],
    header: Annotated[
        str | None,
        typer.Option(
            "--header", metavar="HASH", help="The header's hash as `kaisar epochs` shows it.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a reward proof without a node or a network; exit code 1 when it proves nothing.

    The file shows that two thirds of the stake in its registry signed the reward. That the network anchored this very
    header is for you to compare: with `kaisar epochs` on a node you trust, or by --header.

    Example: kaisar proof verify reward.json
    """
    from kaisar_p2p.identity import ss58_encode
    from node.views import amount
    from protocols.proofs import FILE_BYTES_MAX, verify_export

    try:
        with file.expanduser().open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", hint="check its path and rights") from None
    report = verify_export(data)
    if header is not None and header.lower() != report.header_hash.hex():
        print_error("the proof is for another header", f"its hash is {report.header_hash.hex()}")
        raise typer.Exit(FAILED)
    record = {
        "valid": True,
        "account": ss58_encode(report.account),
        **amount("earned", report.cumulative_planck),
        "epoch": report.epoch,
        "header_hash": report.header_hash.hex(),
        "network": report.network.hex(),
        "signed_stake_planck": str(report.signed_stake_planck),
        "total_stake_planck": str(report.total_stake_planck),
        "header_compared": header is not None,
    }
    fields: list[Column] = [
        ("Account", "account"),
        ("Earned", kai("earned")),
        ("Up to epoch", "epoch"),
        ("Header", "header_hash"),
        ("Network", "network"),
        ("Signed by", lambda _: f"{100 * report.signed_stake_planck // report.total_stake_planck} % of the stake"),
    ]
    if not as_json:
        print("The proof holds.")
    show_record(record, fields, as_json=as_json)
