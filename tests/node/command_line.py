"""The `kaisar` command, run in this process as its console script would."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from typer.testing import CliRunner

from kaisar_p2p.errors import KaisarError
from node import cli

Invoke = Callable[..., Any]


def command_line() -> Invoke:
    """A function of the command's words that returns its exit code (`code`), output (`out`) and errors (`err`)."""
    app = cli.make_app()

    def invoke(*arguments: str, text: str | bytes | None = None, env: dict[str, str] | None = None) -> Any:
        result = CliRunner().invoke(app, [*arguments], input=text, env=env)
        if isinstance(result.exception, KaisarError):
            with contextlib.redirect_stderr(io.StringIO()) as error:
                cli.print_error(result.exception.message, result.exception.hint)
            code = cli.exit_code(result.exception)
            return SimpleNamespace(code=code, out=result.stdout, err=result.stderr + error.getvalue())
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)

    return invoke
