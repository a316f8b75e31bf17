"""Routes of orders and leases: place, cancel, follow; connect, read logs, run a command."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kaisar_p2p.errors import ConfigError, MeshError
from kaisar_p2p.wire.codec import encode
from node import views
from node.api.ledger_calls import call_answer
from node.api.reading import wait_for_events
from node.api.requests import Fields, body_of, id_of, query_of
from node.ordering import PlaceOrder
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec
from protocols.deploy import TunnelOpen
from protocols.interpreter.calls import OrderCancel
from protocols.interpreter.state import ORDER_OPEN, OrderState
from protocols.orders import Variable, Workload

if TYPE_CHECKING:
    from kaisar_p2p.mesh import MeshStream
    from node.node import Node

M = TypeVar("M")

PROBE_TIMEOUT_S = 10.0
STDIN_BYTES = 64 * 1024
STDIN_CHUNK_BYTES = 32 * 1024
CHANNELS = {1: "stdout", 2: "stderr"}
EXIT_CHANNEL = 3
RESOURCES = ("cpu_cores", "memory_mb", "disk_mb", "gpus", "gpu_memory_mb", "gpu_model")


class UnknownOrder(ConfigError):
    """No order on the ledger has that id."""


class Ordering:
    """Routes of orders and leases on one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("/v1/orders", self.orders, methods=["GET"]),
            Route("/v1/orders", self.place, methods=["POST"]),
            Route("/v1/orders/{id}", self.order, methods=["GET"]),
            Route("/v1/orders/{id}", self.cancel, methods=["DELETE"]),
            Route("/v1/orders/{id}/events", self.events, methods=["GET"]),
            Route("/v1/leases", self.leases, methods=["GET"]),
            Route("/v1/leases/{id}/connect", self.connect, methods=["POST"]),
            Route("/v1/leases/{id}/logs", self.logs, methods=["GET"]),
            Route("/v1/leases/{id}/exec", self.execute, methods=["POST"]),
        ]

    # ── orders ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def orders(self, request: Request) -> JSONResponse:
        """Orders of this node's wallet or machine, newest first; with `all=1`, everybody's."""
        everybody = query_of(request, "all").flag("all")
        node = self._node
        account = None if everybody else node.wallet.public_key
        return JSONResponse(views.orders_view(node.chain.state, node.index, account, node.key))

    async def place(self, request: Request) -> JSONResponse:
        """Find a worker, lock the price, place the order; the deployment goes on by itself."""
        known = ("resources", "workload", "duration_s", "max_price_planck_per_hour", "points_planck")
        placed = await self._node.place_order(place_order_of(await body_of(request, *known)))
        return JSONResponse(
            {
                "order": placed.order_id.hex(),
                "worker": placed.worker.hex(),
                **views.amount("price_per_hour", placed.price_planck_per_hour),
                **views.amount("escrow", placed.escrow_planck),
                **views.amount("points", placed.points_planck),
            },
            status_code=201,
        )

    async def order(self, request: Request) -> JSONResponse:
        """One order, with what its worker said about it."""
        query_of(request)
        order_id, order = self._find(request)
        view = views.order_view(order_id, order, self._node.index)
        heard = self._node.index.lease_events.get(order_id, ())
        return JSONResponse({**view, "events": [views.lease_event_view(event) for event in heard]})

    async def cancel(self, request: Request) -> JSONResponse:
        """End an order early; what was not used comes back when it is settled."""
        query_of(request)
        order_id, _ = self._find(request)
        answer = await call_answer(self._node, OrderCancel(order_id))
        if answer.status_code < 300:
            self._node.tunnels.close_ports(order_id)
        return answer

    async def events(self, request: Request) -> JSONResponse:
        """This node's events about an order after an id; waits as `events` does."""
        query = query_of(request, "after", "wait_s", "limit")
        order_id, order = self._find(request)
        wanted = order_id.hex()
        found, after = await wait_for_events(self._node, query, lambda event: event.data.get("order") == wanted)
        order = self._node.chain.state.orders.get(order_id, order)
        return JSONResponse(
            {
                "events": [views.event_view(event) for event in found],
                "after": after,
                "state": views.lease_state(order_id, order, self._node.index)[0],
            }
        )

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def leases(self, request: Request) -> JSONResponse:
        """Leases that this machine uses or serves, and the local ports that lead into them."""
        query_of(request)
        node = self._node
        found = views.leases_view(node.chain.state, node.index, node.key)
        for view in found:
            view["ports"] = [
                {"port": each.port, "host": each.host, "local_port": each.local_port}
                for each in node.tunnels.local_ports
                if each.order_id.hex() == view["order"]
            ]
        return JSONResponse(found)

    async def connect(self, request: Request) -> JSONResponse:
        """Listen on a local port that leads to a port of the program (its first); it is open until the order ends."""
        fields = await body_of(request, "port", "local_port")
        order_id, order = self._find_open(request)
        node = self._node
        announced = views.announced_port(order_id, node.index) or None
        if announced is None and not fields.has("port"):
            hint = "if it listens, name its port: kaisar lease connect ORDER --port 8080"
            raise ConfigError(f"order {order_id.hex()[:8]} names no port", hint=hint)
        port, local_port = (
            fields.integer("port", announced, low=1, high=65535),
            fields.integer("local_port", 0, high=65535),
        )
        probed = await node.tunnels.probe(order_id, order.worker, port, PROBE_TIMEOUT_S)
        if not probed.up:
            raise MeshError(
                f"port {port} of lease {order_id.hex()[:8]} does not answer: {probed.detail}",
                hint="`kaisar lease logs` shows what the program says, `kaisar order show` its state",
            )
        host = node.config.api.host
        bound = await node.tunnels.listen(order_id, order.worker, port, host, local_port)
        return JSONResponse({"host": bound.host, "port": bound.local_port})

    async def logs(self, request: Request) -> Response:
        """What the program wrote, as text; with `follow=1` until it ends."""
        follow = query_of(request, "follow").flag("follow")
        order_id, order = self._find_open(request)
        arguments = ("follow",) if follow else ()
        stream = await self._node.tunnels.open(order.worker, TunnelOpen(order_id, "logs", 0, arguments))
        return StreamingResponse(_chunks(stream), media_type="application/octet-stream")

    async def execute(self, request: Request) -> Response:
        """Run a command inside; a line of JSON for each piece of output, the last with its exit code."""
        fields = await body_of(request, "command", "stdin")
        command, stdin = fields.texts("command"), fields.data("stdin", most=STDIN_BYTES)
        if not command:
            raise ConfigError("command must name a program", hint='such as ["ls", "-l"]')
        order_id, order = self._find_open(request)
        opening = checked(TunnelOpen(order_id, "exec", 0, command))
        stream = await self._node.tunnels.open(order.worker, opening)
        return StreamingResponse(_exec_lines(stream, stdin), media_type="application/x-ndjson")

    def _find(self, request: Request) -> tuple[bytes, OrderState]:
        wanted, orders = id_of(request), self._node.chain.state.orders
        if len(wanted) == 64:
            found = [bytes.fromhex(wanted)] if bytes.fromhex(wanted) in orders else []
        else:
            found = [order_id for order_id in orders if order_id.hex().startswith(wanted)]
        if not found:
            raise UnknownOrder(f"there is no order {wanted}", hint="`kaisar order list` shows the orders there are")
        if len(found) > 1:
            raise ConfigError(f"{len(found)} orders begin with {wanted}", hint="write more of the id")
        return found[0], orders[found[0]]

    def _find_open(self, request: Request) -> tuple[bytes, OrderState]:
        order_id, order = self._find(request)
        if order.status != ORDER_OPEN:
            raise ConfigError(f"order {order_id.hex()[:8]} has ended", hint="place another one: kaisar order place")
        return order_id, order


# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def place_order_of(fields: Fields) -> PlaceOrder:
    """What a client asks for; ConfigError names the field that is wrong."""
    return PlaceOrder(
        resources=_resources(fields.table("resources", RESOURCES)),
        workload=_workload(fields.table("workload", ("image", "command", "environment", "ports"))),
        duration_s=fields.integer("duration_s", low=1),
        max_price_planck_per_hour=fields.planck("max_price_planck_per_hour"),
        points_planck=fields.planck("points_planck", 0),
    )


def _resources(fields: Fields) -> Spec:
    gpus = fields.integer("gpus", 0, high=255)
    spec = Spec(
        device_class=GPU_CLASS if gpus else CPU_CLASS,
        cpu_cores=fields.integer("cpu_cores", low=1, high=65535),
        memory_mb=fields.integer("memory_mb", low=1),
        disk_mb=fields.integer("disk_mb", 0),
        gpus=gpus,
        gpu_memory_mb=fields.integer("gpu_memory_mb", 0),
        gpu_model=fields.text("gpu_model", "", most=64),
    )
    return checked(spec)


def _workload(fields: Fields) -> Workload:
    workload = Workload(
        image=fields.text("image", "", most=256),
        command=fields.texts("command"),
        environment=tuple(Variable(name, value) for name, value in fields.pairs("environment")),
        ports=fields.integers("ports", low=1, high=65535, most=16),
    )
    if not workload.image and not workload.command:
        raise ConfigError("a workload needs an image or a command", hint="such as --template web")
    return checked(workload)


def checked(message: M) -> M:
    """The message, if it fits its wire format; ConfigError names the field that does not."""
    try:
        encode(message)
    except ValueError as error:
        raise ConfigError(f"too much for one request: {error}", hint="use fewer or shorter values") from None
    return message


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _chunks(stream: MeshStream) -> AsyncIterator[bytes]:
    async with stream:
        while True:
            try:
                chunk = await stream.receive_frame()
            except MeshError:  # the worker has sent all there is, or is gone
                return
            yield chunk


async def _exec_lines(stream: MeshStream, stdin: bytes) -> AsyncIterator[bytes]:
    async with stream:
        ended = False
        try:
            for start in range(0, len(stdin), STDIN_CHUNK_BYTES):
                await stream.send_frame(b"\0" + stdin[start : start + STDIN_CHUNK_BYTES])
            await stream.send_eof()
            while not ended:
                frame = await stream.receive_frame()
                ended = frame[:1] == bytes([EXIT_CHANNEL])
                yield _exec_line(frame)
        except MeshError as error:
            yield _line({"error": f"the command's connection broke: {error.message}"})


def _exec_line(frame: bytes) -> bytes:
    channel, data = frame[0] if frame else 0, frame[1:]
    if channel == EXIT_CHANNEL:
        text = data.decode("ascii", "replace")
        return _line({"exit": int(text)} if text.lstrip("-").isdigit() else {"error": "the worker sent no exit code"})
    return _line({"channel": CHANNELS.get(channel, "stdout"), "data": base64.b64encode(data).decode("ascii")})


def _line(value: dict[str, object]) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"
