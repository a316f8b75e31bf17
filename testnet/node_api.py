"""A node's API as a program uses it: address and token from the data directory, JSON in, JSON out, our own errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from kaisar_p2p.errors import KaisarError, NodeUnavailable
from node.api.address import read_address

TIMEOUT_S = 20.0


class NodeApi:
    """One node's API. The file is read again whenever the node does not answer: a restart changes port and token."""

    def __init__(self, data_directory: Path) -> None:
        self._data_directory = data_directory
        self._http: httpx.Client | None = None
        self.pid = 0

    def get(self, path: str, **params: str | int) -> Any:
        """GET /v1/`path`; NodeUnavailable when no node answers, KaisarError with its reason when it refuses."""
        return self._call("GET", path, params=params)

    def post(self, path: str, body: object = None, timeout_s: float = TIMEOUT_S) -> Any:
        """POST /v1/`path` with a JSON body; errors as for `get`."""
        return self._call("POST", path, json={} if body is None else body, timeout=timeout_s)

    def delete(self, path: str, timeout_s: float = TIMEOUT_S) -> Any:
        """DELETE /v1/`path`; errors as for `get`."""
        return self._call("DELETE", path, timeout=timeout_s)

    def text(self, path: str, **params: str | int) -> str:
        """GET of plain text, such as logs."""
        return self._send("GET", path, params=params).text

    def close(self) -> None:
        """Give the connection back."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def _call(self, method: str, path: str, **options: Any) -> Any:
        response = self._send(method, path, **options)
        return response.json() if response.content else None

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        http = self._connected()
        try:
            response = http.request(method, f"/v1/{path}", **options)
        except httpx.HTTPError as error:
            self.close()
            raise NodeUnavailable(f"the node of {self._data_directory} does not answer: {error!r:.120}") from None
        if response.status_code >= 400:
            raise _refusal(response)
        return response

    def _connected(self) -> httpx.Client:
        if self._http is None:
            address = read_address(self._data_directory)
            self.pid = address.pid
            headers = {"authorization": f"Bearer {address.token}"}
            self._http = httpx.Client(base_url=address.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        return self._http


def _refusal(response: httpx.Response) -> KaisarError:
    try:
        plain = response.json()
        return KaisarError(str(plain["error"]), hint=str(plain.get("hint") or ""))
    except (ValueError, KeyError, TypeError):
        return KaisarError(f"the node answers {response.status_code} to {response.request.url.path}")
