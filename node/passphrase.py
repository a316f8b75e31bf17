"""Where a passphrase comes from: a file, the environment, or a question on the terminal."""

from __future__ import annotations

import getpass
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

from kaisar_p2p.errors import ConfigError

MAX_PASSPHRASE_BYTES = 1024
VARIABLE = "KAISAR_PASSPHRASE"
FILE_VARIABLE = "KAISAR_PASSPHRASE_FILE"

Ask = Callable[[str], str]


def read_passphrase(
    environ: Mapping[str, str],
    *,
    passphrase_file: Path | None = None,
    confirm: bool = False,
    purpose: str = "Passphrase",
    ask: Ask | None = None,
) -> str:
    """The passphrase from `--passphrase-file`, else `KAISAR_PASSPHRASE` or `KAISAR_PASSPHRASE_FILE`, else a question.

    A file may end in one newline, which does not count. `confirm` asks twice, for a new passphrase. `ask` stands in
    for the terminal. ConfigError when it is empty, too long or not UTF-8, when both variables are set, when the
    file cannot be read, when the two answers differ, and when there is nobody to ask.
    """
    if passphrase_file is not None:
        return _from_file(passphrase_file)
    text, file = environ.get(VARIABLE), environ.get(FILE_VARIABLE)
    if text is not None and file is not None:
        raise ConfigError(f"both {VARIABLE} and {FILE_VARIABLE} are set", hint="unset one of them")
    if text is not None:
        return _checked(text, VARIABLE)
    if file is not None:
        return _from_file(Path(file))
    return _from_terminal(ask or _terminal(), purpose, confirm)


def _from_file(path: Path) -> str:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read(MAX_PASSPHRASE_BYTES + 3)
    except OSError as error:
        raise ConfigError(
            f"the passphrase file {path} cannot be read: {error.strerror}", hint="check its path and rights"
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"the passphrase file {path} is not UTF-8 text", hint="write the passphrase as text"
        ) from None
    return _checked(text.removesuffix("\n").removesuffix("\r"), str(path))


def _from_terminal(ask: Ask, purpose: str, confirm: bool) -> str:
    try:
        answer = _checked(ask(f"{purpose}: "), "the answer")
        if confirm and ask(f"{purpose} again: ") != answer:
            raise ConfigError("the two passphrases differ", hint="try again")
    except EOFError:
        raise ConfigError("no passphrase was typed", hint="try again, or pass --passphrase-file") from None
    return answer


def _terminal() -> Ask:
    if not sys.stdin.isatty():
        raise ConfigError(
            "a passphrase is needed and there is no terminal to ask on",
            hint=f"pass --passphrase-file, or set {VARIABLE} or {FILE_VARIABLE}",
        )
    return getpass.getpass


def _checked(text: str, source: str) -> str:
    """The text itself; the error names its source and never quotes it."""
    if not text:
        raise ConfigError(f"the passphrase from {source} is empty", hint="choose one, or say --no-passphrase")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise ConfigError(f"the passphrase from {source} has control characters", hint="use one line of text")
    if len(text.encode("utf-8")) > MAX_PASSPHRASE_BYTES:
        raise ConfigError(
            f"the passphrase from {source} is over {MAX_PASSPHRASE_BYTES} bytes", hint="use a shorter one"
        )
    return text
