"""How commands print: data to standard output, the rest to standard error; tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from kaisar_p2p.errors import (
    ConfigError,
    DataDirectoryError,
    IdentityError,
    KaisarError,
    LedgerError,
    NodeUnavailable,
    StoreError,
)

Row = Mapping[str, Any]
Cell = Callable[[Row], object]
Column = tuple[str, str | Cell]
"""A title, and the key of a value or a function of the row."""

FAILED, USAGE, NO_NODE, CANNOT_BE_USED, INTERRUPTED = 1, 2, 3, 4, 130
SHORT = 12


def exit_code(error: KaisarError) -> int:
    """The exit code for an error: see the table in docs/cli.md."""
    if isinstance(error, NodeUnavailable):
        return NO_NODE
    if isinstance(error, ConfigError | DataDirectoryError | IdentityError | LedgerError | StoreError):
        return CANNOT_BE_USED
    return FAILED


def printable(text: object) -> str:
    """Peers choose some of the text: nothing in it may move the cursor, or break a line of a table."""
    return "".join(letter if letter.isprintable() else "�" for letter in str(text))


def print_error(message: str, hint: str = "") -> None:
    """`error: …` and `hint: …` on standard error; further lines of a message are indented: none passes for ours."""
    first, *more = message.split("\n")
    for line in (f"error: {first}", *(f"  {line}" for line in more), *([f"hint: {hint}"] if hint else [])):
        print(printable(line), file=sys.stderr)


def say(text: str) -> None:
    """A line for people on standard error, so that standard output stays data."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def show_rows(rows: Sequence[Row], columns: Sequence[Column], *, as_json: bool, nothing: str) -> None:
    """A table; with `as_json` the rows as they are; `nothing` on standard error when there are none."""
    if as_json:
        show_json(list(rows))
    elif not rows:
        say(nothing)
    else:
        titles = [title for title, _ in columns]
        cells = [[_text(_value(row, column)) for _, column in columns] for row in rows]
        (_rich_table if sys.stdout.isatty() else _plain_table)(titles, cells)


def show_record(record: Row, fields: Sequence[Column], *, as_json: bool) -> None:
    """One thing, a line for each field; with `as_json` the whole record."""
    if as_json:
        show_json(record)
        return
    width = max(len(title) for title, _ in fields)
    for title, column in fields:
        print(f"{title.ljust(width)}  {_text(_value(record, column))}")


def short(text: object) -> str:
    """The first digits of a key or hash, enough to tell it from others and to name an order by."""
    return str(text)[:SHORT]


def kai(name: str) -> Cell:
    """A cell with an amount of KAI."""
    return lambda row: f"{row[f'{name}_kai']} KAI"


def brief(key: str) -> Cell:
    """A cell with the first digits of a key or hash, whole when the output is not for a terminal."""
    return lambda row: short(row[key]) if sys.stdout.isatty() else row[key]


def clock_time(milliseconds: int | None) -> str:
    """Local time of day."""
    return "" if milliseconds is None else time.strftime("%H:%M:%S", time.localtime(milliseconds / 1000))


def duration(seconds: int) -> str:
    """`1h 2m 3s`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return " ".join(part for part in (f"{hours}h" * bool(hours), f"{minute}m" * bool(minutes), f"{second}s") if part)


def resources(spec: Mapping[str, Any]) -> str:
    """A spec on one line."""
    gpus = f", {spec['gpus']} × {spec['gpu_model'] or 'GPU'}" if spec["gpus"] else ""
    return f"{spec['cpu_cores']} cores, {spec['memory_mb']} MB{gpus}"


def _value(row: Row, column: str | Cell) -> object:
    return column(row) if callable(column) else row[column]


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(map(str, value)) or "-"
        case _:
            return printable(value) or "-"


def _plain_table(titles: list[str], cells: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [titles, *cells]) for i in range(len(titles))]
    for row in [[title.upper() for title in titles], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rich_table(titles: list[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


def write_bytes(stream: TextIO, data: bytes) -> None:
    """Bytes as they are, to standard output or error."""
    stream.buffer.write(data)
    stream.buffer.flush()
