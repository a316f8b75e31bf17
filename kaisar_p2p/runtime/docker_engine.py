"""Calls of a Docker engine through its SDK, which blocks: each in a thread, with a deadline, and errors of our kind.

The SDK's own timeout is between two bytes of an answer and is absent where it pulls images, so every call has a
deadline of its own; a thread that is given up ends at the SDK's, and takes no other call's place while it lasts.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import trio
import urllib3
from docker.errors import APIError, DockerException, ImageNotFound
from docker.utils import parse_repository_tag
from requests import RequestException

from kaisar_p2p.errors import ContainerError

T = TypeVar("T")

CALL_TIMEOUT_S = 60.0
"""Also the SDK's own."""
LOOK_TIMEOUT_S = 10.0
PULL_TIMEOUT_S = 540.0
MAX_IMAGE_BYTES = 64 << 30
MAX_CALLS = 64
MAX_PULLS = 4
MAX_READERS = 512
ENGINE_ERRORS = (DockerException, RequestException, urllib3.exceptions.HTTPError, OSError, struct.error)
"""What the SDK raises when an engine refuses, is away, or goes away within an answer."""


class Engine:
    """One engine. Quick calls, pulls and streams have threads of their own: none can make another wait."""

    def __init__(self, client: Any) -> None:
        """`client` is a docker.DockerClient."""
        self.client = client
        self._calls = trio.CapacityLimiter(MAX_CALLS)
        self._pulls = trio.CapacityLimiter(MAX_PULLS)
        self._readers = trio.CapacityLimiter(MAX_READERS)

    async def call(self, function: Callable[[], T], what: str, timeout_s: float = CALL_TIMEOUT_S) -> T:
        """In a thread; every failure becomes a ContainerError that begins with `what`."""
        return await _in_thread(function, what, timeout_s, self._calls)

    async def read(self, function: Callable[[], T], what: str) -> T:
        """As `call`, of a stream: without a deadline, since a program may be silent; its owner hangs up."""
        return await _in_thread(function, what, float("inf"), self._readers)

    async def image(self, name: str) -> dict[str, str]:
        """The labels of an image, which is pulled if it is not here. ContainerError("image-not-found: …")."""
        if not name:
            raise ContainerError("image-not-found: no image is named", hint="this worker runs images only")
        labels = await self.call(partial(self._labels, name), "start-failed", LOOK_TIMEOUT_S)
        if labels is not None:
            return labels
        given_up = threading.Event()
        try:
            what = f"image-not-found: {name}"
            await _in_thread(partial(self._pull, name, given_up), what, PULL_TIMEOUT_S, self._pulls)
        finally:
            given_up.set()
        labels = await self.call(partial(self._labels, name), "start-failed", LOOK_TIMEOUT_S)
        if labels is None:
            raise ContainerError(f"image-not-found: {name}")
        return labels

    def _labels(self, name: str) -> dict[str, str] | None:
        try:
            return dict(self.client.images.get(name).labels or {})
        except ImageNotFound:
            return None

    def _pull(self, name: str, given_up: threading.Event) -> None:
        """Without the operator's credentials: a tenant must not get the operator's private images."""
        repository, tag = parse_repository_tag(name)
        sizes: dict[str, int] = {}
        told = self.client.api.pull(repository, tag=tag or "latest", stream=True, decode=True, auth_config={})
        for event in told:
            if given_up.is_set():
                return
            if "error" in event:
                raise ContainerError(f"image-not-found: {name}: {str(event['error'])[:200]}")
            if event.get("status") == "Downloading":
                sizes[event.get("id", "")] = (event.get("progressDetail") or {}).get("total") or 0
            if sum(sizes.values()) > MAX_IMAGE_BYTES:
                raise ContainerError(f"start-failed: {name} is larger than {MAX_IMAGE_BYTES >> 30} GiB")


async def _in_thread(function: Callable[[], T], what: str, timeout_s: float, limiter: trio.CapacityLimiter) -> T:
    try:
        with trio.fail_after(timeout_s):
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)
    except trio.TooSlowError:
        raise ContainerError(f"{what}: the Docker engine did not answer in {timeout_s:.0f} s") from None
    except ENGINE_ERRORS as error:
        raise ContainerError(f"{what}: {why(error)}") from error


def why(error: Exception) -> str:
    """The engine's explanation, in short."""
    explanation = error.explanation if isinstance(error, APIError) else None
    return str(explanation or error).strip()[:200]
