"""`kaisar order`: place, follow, list, show and cancel orders."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from node.commands.client import NodeClient
from node.commands.options import (
    AsJson,
    DataDir,
    OrderId,
    data_directory,
    parse_hours_s,
    parse_kai,
    parse_size_mb,
    parse_variable,
)
from node.commands.output import (
    FAILED,
    Column,
    brief,
    duration,
    kai,
    print_error,
    printable,
    resources,
    say,
    show_json,
    show_record,
    show_rows,
)
from node.templates import Template, template, templates

app = typer.Typer(no_args_is_help=True)

WAIT_S = 25
DEPLOYED = "Your Container has been deployed successfully."
"""The text with which the node reports a deployment that the committee has confirmed."""
ENDED = "ENDED"
DEFAULT_DURATION_S = 3600


@app.command()
def place(
    max_price: Annotated[
        int, typer.Option("--max-price", metavar="KAI", parser=parse_kai, help="The most to pay for an hour.")
    ],
    cpu: Annotated[int | None, typer.Option("--cpu", min=1, max=65535, help="CPU cores.", show_default="1")] = None,
    memory: Annotated[
        int | None, typer.Option("--memory", metavar="SIZE", parser=parse_size_mb, help="Such as 512MB or 2GB.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option("--disk", metavar="SIZE", parser=parse_size_mb, help="Such as 10GB.")
    ] = None,
    gpu: Annotated[int | None, typer.Option("--gpu", min=0, max=255, help="GPUs.", show_default="0")] = None,
    gpu_memory: Annotated[
        int | None, typer.Option("--gpu-memory", metavar="SIZE", parser=parse_size_mb, help="At least, of each GPU.")
    ] = None,
    gpu_model: Annotated[str, typer.Option("--gpu-model", help="Only workers with this GPU model.")] = "",
    template_name: Annotated[
        str | None,
        typer.Option("--template", help="A workload by name: see `kaisar order templates`.", show_default=False),
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="A container image.", show_default=False)] = None,
    command: Annotated[
        str | None,
        typer.Option("--command", help="The program and its arguments, in one text.", show_default=False),
    ] = None,
    port: Annotated[
        list[int] | None,
        typer.Option("--port", min=1, max=65535, help="A port it listens on; the first is watched. Repeatable."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="An environment variable. Repeatable.")
    ] = None,
    hours: Annotated[
        int | None, typer.Option("--hours", metavar="HOURS", parser=parse_hours_s, help="How long, such as 2 or 0.5.")
    ] = None,
    minutes: Annotated[int | None, typer.Option("--minutes", min=1, help="How long, in minutes.")] = None,
    points: Annotated[
        int | None, typer.Option("--points", metavar="KAI", parser=parse_kai, help="Pay so much of it with points.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the deployment until it is up.")] = True,
    connect: Annotated[
        bool, typer.Option("--connect", help="Then listen on a local port that leads to the first port.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Order a container: choose a worker, lock the price, deploy.

    Examples:

      kaisar order place --template web --max-price 1 --minutes 30 --connect

      kaisar order place --cpu 2 --memory 4GB --image nginx:1.27 --port 80 --hours 2 --max-price 0.5
    """
    chosen = template(template_name) if template_name else None
    if chosen is None and not image and not command:
        raise typer.BadParameter("say what to run", param_hint="--template, --image or --command")
    if hours is not None and minutes is not None:
        raise typer.BadParameter("give one of the two", param_hint="--hours or --minutes")
    if connect and not wait:
        raise typer.BadParameter("needs --wait", param_hint="--connect")
    workload = _workload(chosen, image, command, port, env)
    if connect and not workload["ports"]:
        raise typer.BadParameter("needs a port to lead to", param_hint="--connect")
    request = {
        "resources": _resources(chosen, cpu, memory, disk, gpu, gpu_memory, gpu_model),
        "workload": workload,
        "duration_s": hours if hours is not None else minutes * 60 if minutes is not None else DEFAULT_DURATION_S,
        "max_price_planck_per_hour": str(max_price),
        "points_planck": str(points or 0),
    }
    with NodeClient(data_directory(data_dir)) as node:
        _place(node, request, wait=wait, connect=connect, as_json=as_json)


def _place(node: NodeClient, request: dict[str, Any], *, wait: bool, connect: bool, as_json: bool) -> None:
    placed = node.post("/v1/orders", **request)
    tell = say if as_json else print
    tell(f"Order {placed['order']} is with worker {placed['worker'][:12]}, {placed['price_per_hour_kai']} KAI an hour")
    if wait:
        reason = follow(node, placed["order"], tell)
        if reason:
            if as_json:
                show_json({**placed, "deployed": False, "reason": reason})
            print_error(f"the container was not deployed: {reason}", "what was locked comes back when it is settled")
            raise typer.Exit(FAILED)
        placed["deployed"] = True
    if connect:
        port = request["workload"]["ports"][0]
        placed["address"] = node.post(f"/v1/leases/{placed['order']}/connect", port=port)
        tell(f"Port {port} is at http://{placed['address']['host']}:{placed['address']['port']}")
    if as_json:
        show_json(placed)


def follow(node: NodeClient, order: str, tell: Any) -> str:
    """Print what happens to an order until it is deployed; the reason when it never will be."""
    after, last = 0, ""
    while True:
        answer = node.get(f"/v1/orders/{order}/events", after=after, wait_s=WAIT_S)
        after = answer["after"]
        for event in answer["events"]:
            data = event["data"]
            last = printable(data.get("text", "")) or last
            if data.get("text"):
                tell(last)
            if last == DEPLOYED:
                return ""
            if data.get("state") == ENDED:
                return f"{last} ({printable(data.get('reason'))})"
        if not answer["events"] and answer["state"] == ENDED:
            return last or "the order has ended"


def _workload(
    chosen: Template | None,
    image: str | None,
    command: str | None,
    ports: list[int] | None,
    env: list[str] | None,
) -> dict[str, Any]:
    try:
        words = shlex.split(command) if command else list(chosen.command) if chosen else []
    except ValueError as error:
        raise typer.BadParameter(f"{command!r}: {error}", param_hint="--command") from None
    return {
        "image": image if image is not None else chosen.image if chosen else "",
        "command": words,
        "environment": dict(map(parse_variable, env or [])),
        "ports": list(dict.fromkeys(ports or (chosen.ports if chosen else ()))),
    }


def _resources(
    chosen: Template | None,
    cpu: int | None,
    memory_mb: int | None,
    disk_mb: int | None,
    gpus: int | None,
    gpu_memory_mb: int | None,
    gpu_model: str,
) -> dict[str, Any]:
    """What was asked for, else what the template needs, else little."""

    def first(*values: int | None) -> int:
        return next(value for value in values if value is not None)

    return {
        "cpu_cores": first(cpu, chosen.cpu_cores if chosen else None, 1),
        "memory_mb": first(memory_mb, chosen.memory_mb if chosen else None, 512),
        "disk_mb": first(disk_mb, chosen.disk_mb if chosen else None, 1024),
        "gpus": first(gpus, chosen.gpus if chosen else None, 0),
        "gpu_memory_mb": first(gpu_memory_mb, 0),
        "gpu_model": gpu_model,
    }


ORDER_COLUMNS: list[Column] = [
    ("order", brief("order")),
    ("state", "state"),
    ("outcome", "outcome"),
    ("worker", brief("worker")),
    ("for", lambda row: duration(row["duration_s"])),
    ("price per hour", kai("price_per_hour")),
    ("locked", kai("locked")),
    ("paid", kai("paid")),
    ("resources", lambda row: resources(row["resources"])),
]


@app.command("list")
def list_(
    everybody: Annotated[bool, typer.Option("--all", help="Everybody's orders, not only this node's.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List orders of this node, newest first.

    Example: kaisar order list
    """
    with NodeClient(data_directory(data_dir)) as node:
        rows = node.get("/v1/orders", all=int(everybody))
    show_rows(rows, ORDER_COLUMNS, as_json=as_json, nothing="There is no order yet: kaisar order place")


@app.command()
def show(order: OrderId, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show one order: its money, its lease, what its worker said.

    Example: kaisar order show 3f9a1c
    """
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.get(f"/v1/orders/{order}")
    fields: list[Column] = [
        ("Order", "order"),
        ("On the ledger", "status"),
        ("State", "state"),
        ("Outcome", "outcome"),
        ("Reason", "reason"),
        ("Worker", "worker"),
        ("Client", "client"),
        ("Resources", lambda row: resources(row["resources"])),
        ("Ordered for", lambda row: duration(row["duration_s"])),
        ("Price per hour", kai("price_per_hour")),
        ("Locked", kai("locked")),
        ("Of that, points", kai("points")),
        ("Still in escrow", kai("escrow")),
        ("Paid", lambda row: f"{row['paid_kai']} KAI for {row['paid_seconds']} s witnessed"),
        ("Refunded", kai("refunded")),
        ("Refunded points", kai("refunded_points")),
        ("From the worker's bond", kai("penalty")),
    ]
    show_record(answer, fields, as_json=as_json)
    if not as_json:
        for event in answer["events"]:
            print(printable(f"{event['state']:<12} {event['reason']:<16} {event['text']}").rstrip())


@app.command()
def cancel(order: OrderId, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """End an order early; what was not used comes back when the ledger settles it.

    Example: kaisar order cancel 3f9a1c
    """
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.delete(f"/v1/orders/{order}")
    if as_json:
        show_json(answer)
    else:
        print(f"Order {order} is cancelled; what is left of it comes back when the next anchored epoch settles it")


@app.command("templates")
def templates_(as_json: AsJson = False) -> None:
    """List the workloads that `order place --template` knows.

    Example: kaisar order templates
    """
    rows = [
        {
            "name": each.name,
            "title": each.title,
            "image": each.image,
            "command": list(each.command),
            "ports": list(each.ports),
            "cpu_cores": each.cpu_cores,
            "memory_mb": each.memory_mb,
            "disk_mb": each.disk_mb,
            "gpus": each.gpus,
        }
        for each in templates()
    ]
    columns: list[Column] = [
        ("name", "name"),
        ("title", "title"),
        ("runs", lambda row: row["image"] or " ".join(row["command"])),
        ("ports", "ports"),
        ("memory", lambda row: f"{row['memory_mb']} MB"),
    ]
    show_rows(rows, columns, as_json=as_json, nothing="There is no template.")
