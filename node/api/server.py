"""Serves the API on a loopback port, and tells the commands where it is."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from kaisar_p2p.errors import PortUnavailable
from node.api.address import ApiAddress, new_token, remove_address, write_address
from node.api.app import make_app
from node.api.guard import MAX_BODY_BYTES

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
BACKLOG = 64


async def serve_api(node: Node, task_status: trio.TaskStatus[ApiAddress] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until cancelled; started once the port listens and `api.json` is written.

    PortUnavailable when the port is taken. Connections that a client holds open end with the node: hypercorn shields
    its writes from cancellation, so their sockets are closed under it.
    """
    host, directory = node.config.api.host, node.config.data_directory
    listeners = await _listen(host, node.config.api.port)
    port = listeners[0].socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    address = ApiAddress(f"http://{shown}:{port}", new_token(), os.getpid())
    server = _Server(wrap_app(make_app(node, address.token), MAX_BODY_BYTES, "asgi"))  # type: ignore[arg-type]
    write_address(directory, address)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.close_all_at_the_end)
            nursery.start_soon(trio.serve_listeners, server.handle, listeners)
            task_status.started(address)
    finally:
        remove_address(directory, address)


class _Server:
    """HTTP connections, at most `MAX_CONNECTIONS` at a time."""

    def __init__(self, app: object) -> None:
        self._app = app
        self._config = HypercornConfig()
        self._config.errorlog = None
        self._config.include_server_header = False
        self._context = WorkerContext(None)
        self._streams: set[trio.SocketStream] = set()

    async def handle(self, stream: trio.SocketStream) -> None:
        """One connection, from its first request to its end."""
        if len(self._streams) >= MAX_CONNECTIONS:
            log.warning("API: over %d connections, one refused", MAX_CONNECTIONS)
            await stream.aclose()
            return
        self._streams.add(stream)
        try:
            await TCPServer(self._app, self._config, self._context, ConnectionState({}), stream)  # type: ignore[arg-type]
        except Exception:  # the edge of a connection: the node lives on
            log.exception("an API connection failed")
        finally:
            self._streams.discard(stream)
            stream.socket.close()

    async def close_all_at_the_end(self) -> None:
        """Sleep until cancelled, then close every connection."""
        try:
            await trio.sleep_forever()
        finally:
            for stream in list(self._streams):
                stream.socket.close()


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        if port:
            return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
        first, *others = await trio.open_tcp_listeners(0, host=host, backlog=BACKLOG)
    except OSError as error:
        raise PortUnavailable(
            f"the API cannot listen on {host} port {port}: {error.strerror or error}",
            hint="stop what uses the port, or set api.port to 0 for a free one",
        ) from None
    for listener in others:  # localhost may be two addresses, each with another free port
        with contextlib.suppress(OSError):
            await listener.aclose()
    return [first]
