"""A node's API for as long as the swarm lives: it connects again after a restart, which changes port and token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kaisar_p2p.errors import NodeUnavailable
from node.api.address import read_address
from node.commands.client import NodeClient


class NodeApi:
    """One node's API. NodeUnavailable when no node answers, `Refused` with its reason when it refuses."""

    def __init__(self, data_directory: Path) -> None:
        self._data_directory = data_directory
        self._client: NodeClient | None = None
        self.pid = 0
        """The process that answers, once one has."""

    def get(self, path: str, **query: str | int) -> Any:
        """The JSON answer to GET /v1/`path`."""
        with self._connected() as client:
            return client.get(f"/v1/{path}", **query)

    def text(self, path: str) -> str:
        """The text of GET /v1/`path`."""
        with self._connected() as client:
            return client.get_text(f"/v1/{path}")

    def post(self, path: str, **body: object) -> Any:
        """The JSON answer to POST /v1/`path` of an object."""
        with self._connected() as client:
            return client.post(f"/v1/{path}", **body)

    def delete(self, path: str) -> Any:
        """The JSON answer to DELETE /v1/`path`."""
        with self._connected() as client:
            return client.delete(f"/v1/{path}")

    def close(self) -> None:
        """Give the connection back; the next request makes another."""
        if self._client is not None:
            self._client.__exit__(None, None, None)
            self._client = None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[NodeClient]:
        try:
            if self._client is None:
                self.pid = read_address(self._data_directory).pid
                self._client = NodeClient(self._data_directory)
            yield self._client
        except NodeUnavailable:
            self.close()
            raise
