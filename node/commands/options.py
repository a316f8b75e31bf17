"""Options that several commands share, and the texts that people write for sizes, times and amounts."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from kaisar_p2p.errors import ConfigError, IdentityError
from kaisar_p2p.identity import Scheme
from kaisar_p2p.wire.money import kai_to_planck
from node.datadir import resolve_data_directory

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        readable=False,  # whether it can be used is checked, and told, with its own exit code
        help="Data directory of the node; default: KAISAR_HOME, else XDG's data home.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoPassphrase = Annotated[bool, typer.Option("--no-passphrase", help="Store keys unencrypted; for development.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        readable=False,
        help="Read the passphrase from a file instead of asking for it.",
        show_default=False,
    ),
]

_SIZE = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,3}))?\s*([a-z]*)", re.IGNORECASE)
_UNITS_BYTES = {
    "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
    "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
MIB = 1 << 20


def parse_order_id(text: str) -> str:
    """An order's id as people write it: the first six or more of its 64 hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-f]{6,64}", text.lower()):
        raise typer.BadParameter(f"{text[:70]!r} is not an order's id; `kaisar order list` shows them")
    return text.lower()


OrderId = Annotated[
    str,
    typer.Argument(metavar="ORDER", parser=parse_order_id, help="The order's id, or at least its first six digits."),
]


def check_scheme(text: str) -> str:
    """The name of a signature scheme."""
    try:
        return Scheme.from_label(text).label
    except IdentityError as error:
        raise typer.BadParameter(f"{error.message}; {error.hint}") from None


SchemeName = Annotated[str, typer.Option("--scheme", callback=check_scheme, help="ed25519 or sr25519.")]


def data_directory(option: Path | None) -> Path:
    """Where the node's data is."""
    return resolve_data_directory(option, os.environ)


def parse_size_mb(text: str) -> int:
    """Mebibytes, rounded up, of a size such as `512MB`, `2GB` or `1.5GiB`; a unit is required."""
    matched = _SIZE.fullmatch(text.strip())
    unit = _UNITS_BYTES.get(matched[3].lower()) if matched else None
    if matched is None or unit is None:
        raise typer.BadParameter(f"{text!r} is not a size; write a number and a unit, such as 512MB or 2GB")
    size = Decimal(f"{matched[1]}.{matched[2] or 0}") * unit
    if not 0 < size <= (1 << 32) * MIB - MIB:
        raise typer.BadParameter(f"{text!r} is out of bounds")
    return -(-int(size) // MIB)


def parse_kai(text: str) -> int:
    """Planck of an amount of KAI such as `12.5`."""
    try:
        return kai_to_planck(text.strip())
    except ConfigError as error:
        raise typer.BadParameter(f"{error.message}; {error.hint}") from None


def parse_hours_s(text: str) -> int:
    """Seconds of a number of hours such as `2` or `0.5`."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise typer.BadParameter(f"{text!r} is not a number of hours, such as 2 or 0.5")
    seconds = int(Decimal(text) * 3600)
    if not seconds:
        raise typer.BadParameter(f"{text} hours are no time at all")
    return seconds


def parse_variable(text: str) -> tuple[str, str]:
    """Name and value of `NAME=value`."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise typer.BadParameter(f"{text[:60]!r} is not NAME=value")
    return name, value
