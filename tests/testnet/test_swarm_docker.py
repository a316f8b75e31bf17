"""A lease in a real container of a real network: ordered, reached, restarted, cancelled (`just test-docker`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import docker
import httpx
import pytest
from docker.errors import ImageNotFound
from rich.console import Console

from kaisar_p2p.runtime.docker_options import LEASE_LABEL, NODE_LABEL
from protocols.interpreter.audit import conservation
from protocols.interpreter.state import ORDER_CLOSED
from testnet.demo_context import Demo
from testnet.demo_lease import settlement
from testnet.demo_view import DemoView
from testnet.manifest import load_manifest
from testnet.observer import observe
from testnet.prepare import LEDGER_FILE, prepare
from testnet.swarm import Swarm

pytestmark = [pytest.mark.swarm, pytest.mark.docker]

IMAGE = os.environ.get("KAISAR_TEST_IMAGE", "python:3.11-slim")


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    client = docker.from_env()
    try:
        client.images.get(IMAGE)
    except ImageNotFound:
        client.close()
        pytest.skip(f"the image {IMAGE} is not in this engine (docker pull {IMAGE}, or set KAISAR_TEST_IMAGE)")
    yield client
    client.close()


@pytest.fixture(scope="module")
def network(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The small network, but its provider has an engine; nothing of it is left."""
    base = tmp_path_factory.mktemp("docker")
    shipped = files("testnet").joinpath("networks", "small.toml").read_text("utf-8")
    manifest = base / "containers.toml"
    manifest.write_text(shipped.replace('runtime = "process"', 'runtime = "docker"'), "utf-8")
    swarm = Swarm(prepare(load_manifest(str(manifest)), base / "net", time_ms=time.time_ns() // 1_000_000))
    with observe(base / "net" / LEDGER_FILE) as ledger:
        swarm.up(lambda *_: None)
        try:
            yield Demo(swarm, ledger, DemoView(Console(stderr=True)))
        finally:
            killed = swarm.down()
        assert killed == []
        assert containers(engine, swarm.member("provider").key) == []
        assert conservation(ledger.look()) == 0


def containers(engine: Any, key: str) -> list[Any]:
    return list(engine.containers.list(all=True, filters={"label": f"{NODE_LABEL}={key[:16]}"}))


def kaisar(network: Demo, *words: str, stdin: str = "", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The command as the client's user types it."""
    return subprocess.run(
        [sys.executable, "-m", "node.cli", *words],
        env={"PATH": os.defpath, "KAISAR_HOME": str(network.swarm.prepared.data_directory("client"))},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def page(url: str) -> int:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def seen(network: Demo, what: str, condition: Callable[[], bool], timeout_s: float = 45) -> None:
    network.until(what, condition, timeout_s)


def is_active(network: Demo) -> bool:
    workers = network.get("client", "workers") or []
    return any(worker["status"] == "active" and worker.get("online") for worker in workers)


def test_a_lease_in_a_container_survives_restarts(network: Demo, engine: Any) -> None:
    seen(network, "the provider to be active", lambda: is_active(network), 60)
    key = network.swarm.member("provider").key
    wanted = ("--template", "web", "--image", IMAGE, "--max-price", "10", "--minutes", "60")
    placed = kaisar(network, "order", "place", *wanted)
    assert placed.returncode == 0, placed.stdout + placed.stderr
    assert placed.stdout.splitlines()[-2:] == [
        "Container is deploying...",
        "Your Container has been deployed successfully.",
    ]
    [order] = json.loads(kaisar(network, "order", "list", "--json").stdout)
    network.order = order["order"]
    [container] = containers(engine, key)
    assert container.labels[LEASE_LABEL] == network.order

    # reached, read, entered
    address = network.swarm.api("client").post(f"leases/{network.order}/connect", port=8080, local_port=0)
    url = f"http://{address['host']}:{address['port']}/"
    assert page(url) == 200
    seen(network, "the request in the log", lambda: '"GET / HTTP/1.1" 200' in logs(network), 15)
    ran = kaisar(network, "lease", "exec", "--stdin", network.order, "--", "sh", "-c", "cat; exit 3", stdin="hello\n")
    assert (ran.returncode, ran.stdout) == (3, "hello\n")

    # its container, and its node, are restarted
    container.restart(timeout=2)
    seen(network, "the program after its container's restart", lambda: page(url) == 200)
    network.swarm.stop_node("provider")
    assert [each.id for each in containers(engine, key)] == [container.id]
    network.swarm.start("provider")
    seen(network, "the program after its node's restart", lambda: page(url) == 200)
    paid_s = network.ledger_order().paid_seconds
    seen(network, "more windows that are paid", lambda: network.ledger_order().paid_seconds > paid_s)
    assert network.get("client", f"orders/{network.order}")["state"] == "RUNNING"

    # the end
    cancelled = kaisar(network, "order", "cancel", network.order)
    assert cancelled.returncode == 0, cancelled.stderr
    seen(network, "no container", lambda: containers(engine, key) == [], 30)
    settlement(network)
    assert network.ledger_order().status == ORDER_CLOSED


def test_an_image_that_is_nowhere_ends_the_order_with_that_reason(network: Demo, engine: Any) -> None:
    nowhere = ("--image", "127.0.0.1:9/nobody/nothing:1", "--command", "true", "--max-price", "10", "--minutes", "60")
    refused: list[subprocess.CompletedProcess[str]] = []

    def ordered() -> bool:  # the last order's offer may still be held
        refused.append(kaisar(network, "order", "place", *nowhere))
        return "no worker made an offer" not in refused[-1].stderr

    seen(network, "an offer", ordered)
    assert refused[-1].returncode == 1
    assert "image-not-found" in refused[-1].stderr
    assert containers(engine, network.swarm.member("provider").key) == []


def logs(network: Demo) -> str:
    return network.swarm.api("client").text(f"leases/{network.order}/logs")
