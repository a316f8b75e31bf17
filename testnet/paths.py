"""Where swarms live unless told otherwise: below XDG's state directory."""

from __future__ import annotations

import os
from pathlib import Path

from kaisar_p2p.errors import DataDirectoryError


def state_home() -> Path:
    """`$XDG_STATE_HOME/kaisar`, by default `~/.local/state/kaisar`; nothing is created."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "kaisar"
    try:
        return Path.home() / ".local" / "state" / "kaisar"
    except RuntimeError:
        raise DataDirectoryError("this user has no home directory", hint="pass --directory") from None


def swarm_directory(option: Path | None, network: str) -> Path:
    """The directory of a network: `--directory`, else one below the state directory with its name."""
    return option.expanduser().absolute() if option is not None else state_home() / "testnet" / network
