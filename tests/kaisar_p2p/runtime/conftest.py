"""A real Docker engine for the tests that need one (`just test-docker`); needs no registry.

The image is any local one that has a shell and Python (`KAISAR_TEST_IMAGE`, else `python:3.11-slim`); where it is
missing the tests are skipped.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import docker
import pytest
import trio
from docker.errors import ImageNotFound

from kaisar_p2p.runtime import ContainerRuntime, ContainerSpec
from kaisar_p2p.runtime import docker as docker_runtime
from kaisar_p2p.runtime.docker import DockerRuntime, open_docker
from kaisar_p2p.runtime.docker_options import NODE_LABEL
from kaisar_p2p.runtime.reach import answers

IMAGE = os.environ.get("KAISAR_TEST_IMAGE", "python:3.11-slim")
FOREVER = ("sleep", "1000")
SERVER = ("{python}", "-u", "-m", "http.server", "--bind", "{host}", "{port:8080}")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    client = docker.from_env()
    try:
        client.images.get(IMAGE)
    except ImageNotFound:
        client.close()
        pytest.skip(f"the image {IMAGE} is not in this engine (docker pull {IMAGE}, or set KAISAR_TEST_IMAGE)")
    yield client
    client.close()


def of_node(client: Any, node_id: str) -> list[Any]:
    return list(client.containers.list(all=True, filters={"label": f"{NODE_LABEL}={node_id}"}))


@pytest.fixture
def node_id(client: Any) -> Iterator[str]:
    """A node of this test alone; its containers are removed whatever happens."""
    name = secrets.token_hex(8)
    yield name
    for container in of_node(client, name):
        container.remove(force=True, v=True)


@pytest.fixture
async def runtime(node_id: str, monkeypatch: pytest.MonkeyPatch) -> DockerRuntime:
    monkeypatch.setattr(docker_runtime, "EXIT_CONFIRM_S", 0.1)
    return await open_docker(node_id)


def spec(*command: str, **changes: Any) -> ContainerSpec:
    plain = ContainerSpec(secrets.token_hex(32), IMAGE, command or FOREVER, (), (), 1, 128, 64, 0)
    return replace(plain, **changes)


async def output(runtime: ContainerRuntime, lease: str) -> str:
    return b"".join([chunk async for chunk in runtime.logs(lease, follow=False, tail_bytes=1 << 20)]).decode()


async def ran(runtime: ContainerRuntime, made: ContainerSpec) -> tuple[int, str]:
    """Exit code and output of a program that ends by itself."""
    await runtime.start(made)
    with trio.fail_after(60):
        code = await runtime.wait(made.lease)
    return code, await output(runtime, made.lease)


async def told(runtime: ContainerRuntime, lease: str, *command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of a command."""
    found = {1: b"", 2: b""}
    with trio.fail_after(60):
        async with runtime.exec(lease, command) as session:
            if stdin:
                await session.send(stdin)
            await session.send_eof()
            async for channel, data in session.output():
                found[channel] += data
            return await session.exit_code(), found[1], found[2]


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Ask an engine until it is so."""
    with trio.fail_after(timeout_s):
        while not await trio.to_thread.run_sync(condition):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def until_answers(address: tuple[str, int]) -> None:
    """Until a program listens."""
    with trio.fail_after(30):
        while not await answers(address, 1):  # noqa: ASYNC110
            await trio.sleep(0.1)
