"""The application: the table of routes, and how errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from kaisar_p2p.errors import (
    CallRejected,
    ConfigError,
    ContainerError,
    DecodeError,
    IdentityError,
    KaisarError,
    LedgerError,
    MeshError,
    StoreError,
)
from node.api.guard import BodyTooLarge, Guard, refuse, too_large
from node.api.ledger_calls import LedgerCalls
from node.api.ordering import Ordering, UnknownOrder
from node.api.reading import Reading

if TYPE_CHECKING:
    from node.node import Node

log = logging.getLogger(__name__)

STATUS_OF_ERRORS: tuple[tuple[type[KaisarError], int], ...] = (
    (UnknownOrder, 404),
    (ConfigError, 400),
    (DecodeError, 400),
    (IdentityError, 400),
    (CallRejected, 409),
    (LedgerError, 503),
    (StoreError, 503),
    (MeshError, 502),
    (ContainerError, 502),
)
"""The first that fits; any other KaisarError is 409: a refusal that says why."""


def routes_of(node: Node) -> list[Route]:
    """Every route of the API."""
    return [*Reading(node).routes(), *Ordering(node).routes(), *LedgerCalls(node).routes()]


def make_app(node: Node, token: str) -> ASGIApp:
    """The API of a node, guarded by a token."""
    handlers = {
        KaisarError: _refused,
        BodyTooLarge: _too_large,
        HTTPException: _no_route,
        trio.TooSlowError: _too_slow,
        Exception: _broken,
    }
    app = Starlette(
        routes=routes_of(node), exception_handlers={kind: cast(ExceptionHandler, h) for kind, h in handlers.items()}
    )
    return Guard(_Edge(app), token)


class _Edge:
    """The edge of a request: a mistake of ours is logged and answered, and the node lives on."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception:  # Starlette has answered by `_broken` if the answer had not begun
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))


async def _refused(request: Request, error: KaisarError) -> Response:
    status = next((status for kind, status in STATUS_OF_ERRORS if isinstance(error, kind)), 409)
    return refuse(status, error.message, error.hint)


async def _too_large(request: Request, error: BodyTooLarge) -> Response:
    return too_large()


async def _too_slow(request: Request, error: trio.TooSlowError) -> Response:
    return refuse(504, "it took too long", "look at `kaisar status` and try again")


async def _broken(request: Request, error: Exception) -> Response:
    return refuse(500, "the node made a mistake", "its log says more; please report it")


async def _no_route(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        return refuse(405, f"{request.url.path} does not take {request.method}", "docs/api.md lists the routes")
    return refuse(error.status_code, f"no route {request.url.path}", "docs/api.md lists the routes")
