"""`kaisar wallet`: keys on this machine, and what they own on the ledger."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kaisar_p2p.errors import ConfigError, KaisarError
from kaisar_p2p.identity import Keystore, Scheme, Wallet, ss58_decode
from kaisar_p2p.identity.private_files import create_private_file
from kaisar_p2p.wire.money import planck_to_kai
from node.commands.client import NodeClient
from node.commands.init import new_passphrase
from node.commands.options import AsJson, DataDir, NoPassphrase, PassphraseFile, SchemeName, data_directory, parse_kai
from node.commands.output import Row, kai, say, show_json, show_record, show_rows
from node.config import Config, check_data_directory
from node.passphrase import read_passphrase

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The wallet's name: a-z, 0-9, _ and -.")]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--file", metavar="FILE", help="Read the secret from a file instead of asking for it.", show_default=False
    ),
]
MAX_SECRET_BYTES = 64 * 1024


def _keystore(data_dir: Path | None) -> Keystore:
    directory = data_directory(data_dir)
    check_data_directory(directory)
    return Keystore(Config(directory).keys_path)


def _show(wallet: Wallet, as_json: bool, mnemonic: str | None = None) -> None:
    record = {"name": wallet.name, "scheme": Scheme(wallet.scheme).label, "address": wallet.address}
    if mnemonic is not None:
        record["mnemonic"] = mnemonic
    show_record(record, [(key.capitalize(), key) for key in record], as_json=as_json)


@app.command()
def new(
    name: Name,
    scheme: SchemeName = "ed25519",
    words: Annotated[int, typer.Option("--words", help="Words of the phrase: 12 or 24.")] = 12,
    show_mnemonic: Annotated[bool, typer.Option("--show-mnemonic", help="Print the phrase once.")] = False,
    no_passphrase: NoPassphrase = False,
    passphrase_file: PassphraseFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a wallet with a fresh phrase.

    Example: kaisar wallet new savings --scheme sr25519
    """
    if words not in (12, 24):
        raise typer.BadParameter("a phrase has 12 or 24 words", param_hint="--words")
    keystore = _keystore(data_dir)
    passphrase = new_passphrase(no_passphrase=no_passphrase, file=passphrase_file)
    wallet, phrase = keystore.create_wallet(name, Scheme.from_label(scheme), passphrase, words=words)
    _show(wallet, as_json, phrase if show_mnemonic else None)


@app.command("import")
def import_(
    name: Name,
    what: Annotated[str, typer.Option("--from", help="mnemonic, seed or json (a polkadot-js file).")] = "mnemonic",
    scheme: SchemeName = "ed25519",
    file: SecretFile = None,
    json_passphrase_file: Annotated[
        Path | None,
        typer.Option(
            "--json-passphrase-file", metavar="FILE", help="Passphrase of the polkadot-js file.", show_default=False
        ),
    ] = None,
    no_passphrase: NoPassphrase = False,
    passphrase_file: PassphraseFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Import a wallet from a phrase, a seed (0x and 64 digits) or a polkadot-js file. Secrets are never arguments.

    Examples:

      kaisar wallet import cold --from mnemonic --file phrase.txt

      kaisar wallet import cold --from json --file account.json
    """
    keystore, kind = _keystore(data_dir), Scheme.from_label(scheme)
    if what not in ("mnemonic", "seed", "json"):
        raise typer.BadParameter(f"{what!r} is not mnemonic, seed or json", param_hint="--from")
    if what == "json" and file is None:
        raise typer.BadParameter("a polkadot-js file is needed", param_hint="--file")
    secret = _secret(what, file)
    opening = None
    if what == "json":
        purpose = "Passphrase of the polkadot-js file"
        environ: dict[str, str] = {}  # KAISAR_PASSPHRASE is for our own files
        opening = read_passphrase(environ, passphrase_file=json_passphrase_file, purpose=purpose)
    passphrase = new_passphrase(no_passphrase=no_passphrase, file=passphrase_file)
    makers: dict[str, Callable[[], Wallet]] = {
        "mnemonic": lambda: keystore.import_mnemonic(name, kind, secret, passphrase),
        "seed": lambda: keystore.import_seed(name, kind, secret, passphrase),
        "json": lambda: keystore.import_json(name, secret, opening, passphrase),
    }
    _show(makers[what](), as_json)


@app.command()
def export(
    name: Name,
    what: Annotated[str, typer.Option("--as", help="mnemonic, seed or json (a polkadot-js file).")] = "mnemonic",
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write to a new file (mode 0600).", show_default=False),
    ] = None,
    json_passphrase_file: Annotated[
        Path | None,
        typer.Option(
            "--json-passphrase-file", metavar="FILE", help="Passphrase for the polkadot-js file.", show_default=False
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    data_dir: DataDir = None,
) -> None:
    """Print a wallet's secret, or write it to a file. Whoever reads it owns the wallet.

    Example: kaisar wallet export main --as json --output main.json
    """
    keystore = _keystore(data_dir)
    if what not in ("mnemonic", "seed", "json"):
        raise typer.BadParameter(f"{what!r} is not mnemonic, seed or json", param_hint="--as")
    passphrase = None
    if keystore.wallet_info(name).encrypted:
        passphrase = read_passphrase(os.environ, passphrase_file=passphrase_file, purpose=f"Passphrase of {name}")
    if what == "mnemonic":
        secret = keystore.export_mnemonic(name, passphrase)
    elif what == "seed":
        secret = keystore.export_seed(name, passphrase)
    else:
        purpose = "New passphrase for the exported file"
        locking = read_passphrase({}, passphrase_file=json_passphrase_file, confirm=True, purpose=purpose)
        secret = keystore.export_json(name, passphrase, locking)
    if output is None:
        print(secret)
        return
    try:
        create_private_file(output, secret.encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}", hint="name a new file") from None
    say(f"Wrote {output}")


@app.command("list")
def list_(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the wallets of the data directory.

    Example: kaisar wallet list
    """
    rows = [
        {"name": each.name, "scheme": each.scheme.label, "address": each.address, "encrypted": each.encrypted}
        for each in _keystore(data_dir).list()
    ]
    show_rows(
        rows,
        [(key, key) for key in ("name", "scheme", "address", "encrypted")],
        as_json=as_json,
        nothing="There is no wallet yet: kaisar wallet new NAME",
    )


@app.command()
def balance(
    who: Annotated[str, typer.Argument(metavar="[NAME|ADDRESS]", help="A wallet or an address.")] = "",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what an account owns; without an argument, the node's own wallet.

    Example: kaisar wallet balance
    """
    address = "me" if not who else _address(who, data_dir)
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.get(f"/v1/account/{address}")
    show_record(
        answer,
        [
            ("Address", "address"),
            ("Balance", kai("balance")),
            ("Points", kai("points")),
            ("Stake", kai("stake")),
            ("Unbonding", _unbonding),
            ("Rewards drawn", kai("claimed")),
            ("Licences", "licences"),
            ("Machines", lambda row: [machine["key"][:12] for machine in row["machines"]]),
        ],
        as_json=as_json,
    )


def _unbonding(row: Row) -> list[str]:
    return [f"{each['amount_kai']} KAI until epoch {each['due_epoch']}" for each in row["unbonding"]]


def _address(who: str, data_dir: Path | None) -> str:
    """The address of a wallet by name, or of what must be an address itself."""
    names = {each.name: each.address for each in _keystore(data_dir).list()}
    address = names.get(who, who)
    try:
        ss58_decode(address)
    except KaisarError as error:
        raise typer.BadParameter(f"{error.message}; it is no wallet's name either") from None
    return address


@app.command()
def transfer(
    to: Annotated[str, typer.Argument(metavar="ADDRESS", help="The receiving address.")],
    amount: Annotated[int, typer.Argument(metavar="KAI", parser=parse_kai, help="How much, such as 12.5.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Move KAI from the node's wallet to another account, and wait until that is final.

    Example: kaisar wallet transfer 5Grwva… 12.5
    """
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.post("/v1/transfer", to=to, amount_planck=str(amount))
    if as_json:
        show_json(answer)
    else:
        print(f"Moved {planck_to_kai(amount)} KAI to {to} in call {answer['call']}")


def _secret(what: str, file: Path | None) -> str:
    """From a file, else from a question on the terminal, else from what is piped in."""
    if file is None and sys.stdin.isatty():
        return str(typer.prompt(f"The {what}", hide_input=True, err=True))
    source = "standard input" if file is None else str(file)
    try:
        with contextlib.ExitStack() as stack:
            stream = sys.stdin.buffer if file is None else stack.enter_context(file.expanduser().open("rb"))
            data = stream.read(MAX_SECRET_BYTES + 1)
        text = data.decode("utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}", hint="check its path and rights") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source} is not UTF-8 text", hint="name another file") from None
    if not text or len(data) > MAX_SECRET_BYTES:
        raise ConfigError(
            f"{source} is {'too large for' if text else 'empty: it has not'} a {what}", hint="pass --file"
        )
    return text
