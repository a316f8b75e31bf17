"""`kaisar network`: keys of private swarms."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from kaisar_p2p.errors import ConfigError
from node.commands.output import say

app = typer.Typer(no_args_is_help=True)


def write_swarm_key(path: Path, text: str) -> None:
    """Write a key file, mode 0600; ConfigError when there is one, or it cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", hint="nothing was changed; choose another --output") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="check free space and rights") from None


def new_swarm_key() -> str:
    """The text of a key file with a fresh key."""
    from kaisar_p2p.mesh.transport.pnet import KEY_BYTES, format_key

    return format_key(secrets.token_bytes(KEY_BYTES))


@app.command("key")
def key(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write to a new file (mode 0600).", show_default=False),
    ] = None,
) -> None:
    """Make the key of a private swarm. Only nodes that have it connect with each other: copy it to all of them.

    Example: kaisar network key --output swarm.key
    """
    text = new_swarm_key()
    if output is None:
        print(text, end="")
        return
    write_swarm_key(output, text)
    say(f"Wrote {output}. Set network.pre_shared_key_file to it on every node of the swarm.")
