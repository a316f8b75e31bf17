"""`kaisar lease`: use what was ordered."""

from __future__ import annotations

import base64
import json
import sys
from typing import Annotated, Any

import typer

from node.commands.client import NodeClient
from node.commands.options import AsJson, DataDir, OrderId, data_directory
from node.commands.output import FAILED, Column, brief, duration, print_error, show_json, show_rows, write_bytes

app = typer.Typer(no_args_is_help=True)

STDIN_BYTES = 64 * 1024


@app.command("list")
def list_(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List leases that this node uses or serves.

    Example: kaisar lease list
    """
    with NodeClient(data_directory(data_dir)) as node:
        rows = node.get("/v1/leases")
    columns: list[Column] = [
        ("order", brief("order")),
        ("side", "side"),
        ("state", "state"),
        ("outcome", "outcome"),
        ("reason", "reason"),
        ("worker", brief("worker")),
        ("witnessed", lambda row: duration(row["paid_seconds"])),
        ("ports", lambda row: [f"{p['host']}:{p['local_port']} → {p['port']}" for p in row["ports"]]),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="There is no lease.")


@app.command()
def logs(
    order: OrderId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the program ends.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Print what the program wrote.

    Example: kaisar lease logs 3f9a1c -f
    """
    with (
        NodeClient(data_directory(data_dir)) as node,
        node.stream("GET", f"/v1/leases/{order}/logs", params={"follow": int(follow)}) as answer,
    ):
        for chunk in answer.iter_bytes():
            write_bytes(sys.stdout, chunk)


@app.command()
def connect(
    order: OrderId,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="The program's port.", show_default="its first")
    ] = None,
    local_port: Annotated[int, typer.Option("--local-port", min=0, max=65535, help="0 picks a free one.")] = 0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Listen on a local port that leads into the lease; the node keeps it open until the order ends.

    Example: kaisar lease connect 3f9a1c --local-port 8080
    """
    with NodeClient(data_directory(data_dir)) as node:
        wanted = {} if port is None else {"port": port}
        answer = node.post(f"/v1/leases/{order}/connect", local_port=local_port, **wanted)
    if as_json:
        show_json(answer)
    else:
        print(f"{answer['host']}:{answer['port']}")


@app.command("exec", context_settings={"ignore_unknown_options": True})
def exec_(
    order: OrderId,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The program and its arguments.")],
    stdin: Annotated[bool, typer.Option("--stdin", help="Send standard input, at most 64 KiB.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Run a command inside the lease; the exit code is the command's own.

    Example: kaisar lease exec 3f9a1c -- ls -l
    """
    given = sys.stdin.buffer.read(STDIN_BYTES + 1) if stdin else b""
    if len(given) > STDIN_BYTES:
        raise typer.BadParameter("standard input is over 64 KiB", param_hint="--stdin")
    body: dict[str, Any] = {"command": command, "stdin": base64.b64encode(given).decode("ascii")}
    code: int | None = None
    with (
        NodeClient(data_directory(data_dir)) as node,
        node.stream("POST", f"/v1/leases/{order}/exec", json=body) as answer,
    ):
        for line in answer.iter_lines():
            part = json.loads(line)
            if "data" in part:
                stream = sys.stderr if part["channel"] == "stderr" else sys.stdout
                write_bytes(stream, base64.b64decode(part["data"]))
            elif "exit" in part:
                code = int(part["exit"])
            else:
                print_error(str(part.get("error")))
    if code is None:
        print_error("the command's end was not seen")
        code = FAILED
    raise typer.Exit(code if 0 <= code <= 255 else 128 - code if -128 < code < 0 else FAILED)
