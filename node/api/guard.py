"""Who may use the API: requests with the token, addressed to this machine by a loopback name, with a small body.

A page on the web can make a browser send requests to 127.0.0.1, and can point a name of its own there (DNS rebinding).
It has no token, and the Host header tells its name; both are checked before anything of the body is read.
"""

from __future__ import annotations

import secrets

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.settings import is_loopback

MAX_BODY_BYTES = 256 * 1024


class Guard:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the refusal."""
        if scope["type"] != "http":
            return  # no WebSocket is served; the server answers for us
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, _Limited(receive), send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not is_loopback(_host_name(hosts[0])):
            return refuse(403, "this API answers to loopback names only", "use http://127.0.0.1 or http://localhost")
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1 or not secrets.compare_digest(given[0], self._expected):
            hint = "send `Authorization: Bearer …` with the token in api.json of the data directory"
            return refuse(401, "the token is missing or wrong", hint)
        length = [value for name, value in headers if name == b"content-length"]
        if length and (not length[0].isdigit() or int(length[0][:20]) > MAX_BODY_BYTES):
            return too_large()
        return None


class BodyTooLarge(Exception):
    """More bytes came than `MAX_BODY_BYTES`, in a request that did not announce how many."""


class _Limited:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = MAX_BODY_BYTES

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise BodyTooLarge
        return message


def refuse(status: int, error: str, hint: str = "") -> JSONResponse:
    """The one shape of every error answer."""
    return JSONResponse({"error": error, "hint": hint}, status_code=status)


def too_large() -> JSONResponse:
    """The answer to a body over the limit."""
    return refuse(413, f"the request is over {MAX_BODY_BYTES} bytes", "send less")


def _host_name(host: bytes) -> str:
    """The host without its port: `[::1]:80`, `localhost:80`, `127.0.0.1`."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text
