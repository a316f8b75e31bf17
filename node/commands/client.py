"""The commands' side of the loopback API.

httpx is imported when a request is made: `kaisar run` is a command too, and a node should not carry 12 MB for nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kaisar_p2p.errors import KaisarError, NodeUnavailable
from node.api.address import no_node, read_address

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 100.0
"""A ledger call waits for finality, an order for offers first."""
READ_TIMEOUT_S = 15.0
"""What only looks waits for the node's turn, and for events as long as it asks to."""


class Refused(KaisarError):
    """The node, or the ledger, refused what was asked, and says why."""


class NodeSilent(NodeUnavailable):
    """A node runs, and does not answer: it is stopped, or has far too much to do."""


class NodeClient:
    """Requests to the node that runs on a data directory. NodeUnavailable when none does; Refused with its reason."""

    def __init__(self, data_directory: Path, *, answer_s: float = ANSWER_TIMEOUT_S) -> None:
        import httpx

        self._directory = data_directory
        address = read_address(data_directory)
        self._reading_s = min(answer_s, READ_TIMEOUT_S)
        self._http = httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.token}"},
            timeout=httpx.Timeout(answer_s, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # no proxy stands between us and ourselves
        )

    def __enter__(self) -> NodeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> Any:
        """The JSON answer to a GET."""
        return self._json("GET", path, params=query, timeout=self._reading_s + int(query.get("wait_s", 0)))

    def get_text(self, path: str) -> str:
        """The text of an answer to a GET."""
        return self._send("GET", path, timeout=self._reading_s).text

    def post(self, path: str, **body: object) -> Any:
        """The JSON answer to a POST of an object."""
        return self._json("POST", path, json=body)

    def delete(self, path: str) -> Any:
        """The JSON answer to a DELETE."""
        return self._json("DELETE", path)

    @contextlib.contextmanager
    def stream(self, method: str, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        """An answer that is read as it comes, without a time limit between two parts."""
        import httpx

        patient = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        with self._errors(), self._http.stream(method, path, timeout=patient, **arguments) as r:
            if r.is_error:
                r.read()
                self._check(r)
            yield r

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            return self._send(method, path, **arguments).json()
        except json.JSONDecodeError:
            raise NodeUnavailable("what answers is not a Kaisar node", hint=no_node(self._directory).hint) from None

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with self._errors():
            response = self._http.request(method, path, **arguments)
        self._check(response)
        return response

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.ConnectError:
            raise no_node(self._directory) from None
        except httpx.TimeoutException:
            raise NodeSilent(
                "the node does not answer in time", hint="look at its log, and whether its process is stopped"
            ) from None
        except httpx.HTTPError as error:
            raise NodeUnavailable(
                f"the connection to the node broke: {error}", hint="it may have been stopped; look at its log"
            ) from None

    def _check(self, response: httpx.Response) -> None:
        if not response.is_error:
            return
        try:
            answer = response.json()
            error, hint = str(answer["error"]), str(answer["hint"])
        except (ValueError, KeyError, TypeError):
            raise NodeUnavailable("what answers is not a Kaisar node", hint=no_node(self._directory).hint) from None
        if response.status_code == 401:  # another node took the port of one that was killed
            raise no_node(self._directory)
        raise Refused(error, hint=hint)
