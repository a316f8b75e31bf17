"""Where a node's API is: `<data directory>/api.json` with its address, its token and the node's process id."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from kaisar_p2p.errors import DataDirectoryError, NodeUnavailable

FILE = "api.json"
MAX_FILE_BYTES = 16 * 1024
TOKEN_BYTES = 32


@dataclass(frozen=True)
class ApiAddress:
    """How to reach one node; whoever has the token may do everything that the node's owner may."""

    url: str
    token: str = field(repr=False)
    pid: int


def new_token() -> str:
    """A fresh token of 256 bits, for one run of one node."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def write_address(data_directory: Path, address: ApiAddress) -> None:
    """Write the file (mode 0600) so that a reader sees the old one or the new one, never a part."""
    path = data_directory / FILE
    temporary = path.with_name(f".{FILE}.{secrets.token_hex(8)}")
    text = json.dumps({"url": address.url, "token": address.token, "pid": address.pid})
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text + "\n")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise DataDirectoryError(
            f"{path} cannot be written: {error.strerror}", hint="check free space and rights of the data directory"
        ) from None


def remove_address(data_directory: Path, address: ApiAddress) -> None:
    """Remove the file if it is still this run's."""
    with contextlib.suppress(NodeUnavailable, OSError):
        if read_address(data_directory) == address:
            (data_directory / FILE).unlink()


def read_address(data_directory: Path) -> ApiAddress:
    """The address of the node that runs on this data directory; NodeUnavailable when there is none."""
    try:
        with (data_directory / FILE).open("rb") as file:
            content = json.loads(file.read(MAX_FILE_BYTES))
        url, token, pid = content["url"], content["token"], content["pid"]
    except PermissionError:
        raise NodeUnavailable(
            f"{data_directory / FILE} cannot be read", hint="only the user who runs the node may use its API"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise no_node(data_directory) from None
    if not (isinstance(url, str) and isinstance(token, str) and isinstance(pid, int)):
        raise no_node(data_directory)
    return ApiAddress(url, token, pid)


def no_node(data_directory: Path) -> NodeUnavailable:
    """The error for a data directory on which no node runs; the hint starts one."""
    if (data_directory / "config.toml").exists():
        hint = f"start one: kaisar run --data-dir {data_directory}"
    else:
        hint = f"make and start one: kaisar init --data-dir {data_directory} && kaisar run --data-dir {data_directory}"
    return NodeUnavailable(f"no node answers for {data_directory}", hint=hint)
