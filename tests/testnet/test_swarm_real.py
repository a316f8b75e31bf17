"""A small network of real processes whose parts are killed and restarted (`just test-swarm`).

The tests of a class share one network and run in order: a network takes half a minute to certify its worker.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kaisar_p2p.errors import KaisarError, NodeUnavailable
from protocols.deploy import CANCELLED, FAILED
from protocols.interpreter.audit import conservation
from protocols.interpreter.state import ACTIVE, ORDER_CLOSED, ORDER_OPEN, REGISTERED
from testnet.demo_context import Demo
from testnet.demo_lease import connect, logs, order, settlement
from testnet.demo_network import checks, epoch, registration
from testnet.demo_view import DemoView
from testnet.manifest import load_manifest
from testnet.observer import observe
from testnet.prepare import LEDGER_FILE, prepare
from testnet.processes import node_environment, strays
from testnet.swarm import Swarm

pytestmark = pytest.mark.swarm

WINDOWS_UNTIL_UNPAID = 3


def run_network(name: str, directory: Path) -> Iterator[Demo]:
    """A shipped network, up; stopped at the end, with nothing left behind."""
    swarm = Swarm(prepare(load_manifest(name), directory, time_ms=time.time_ns() // 1_000_000))
    with observe(directory / LEDGER_FILE) as ledger:
        swarm.up(lambda *_: None)
        try:
            yield Demo(swarm, ledger, DemoView(Console(stderr=True)))
        finally:
            killed = swarm.down()
        assert killed == []
        assert list(strays(directory)) == []
        assert conservation(ledger.look()) == 0


@pytest.fixture(scope="class")
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The network that the class names."""
    yield from run_network(request.cls.NETWORK, tmp_path_factory.mktemp(request.cls.NETWORK) / "net")


class TestSmallNetwork:
    """One provider, four checkers, one client."""

    NETWORK = "small"

    def test_the_worker_is_certified_and_an_epoch_anchored(self, network: Demo) -> None:
        registration(network)
        checks(network)
        epoch(network)

    def test_a_second_node_on_one_data_directory_is_refused(self, network: Demo) -> None:
        path = network.swarm.prepared.data_directory("client")
        pid = network.swarm.running()["client"].pid
        command = [sys.executable, "-m", "node.cli", "run", "--data-dir", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 4
        assert str(pid) in done.stderr

    def test_an_order_that_nobody_can_serve_locks_nothing(self, network: Demo) -> None:
        before = network.ledger.account(network.client.owner)
        with pytest.raises(KaisarError, match="nobody can serve"):
            network.swarm.api("client").post(
                "orders",
                resources={"cpu_cores": 1, "memory_mb": 64, "gpus": 8},
                workload={"command": ["true"]},
                duration_s=3600,
                max_price_planck_per_hour=str(10**19),
            )
        network.ledger.look()
        assert network.ledger.account(network.client.owner) == before

    def test_an_order_over_the_balance_locks_nothing(self, network: Demo) -> None:
        before = network.ledger.account(network.client.owner)
        with pytest.raises(KaisarError, match="the balance is"):
            network.swarm.api("client").post(
                "orders",
                resources={"cpu_cores": 1, "memory_mb": 64},
                workload={"command": ["{python}", "-c", "pass"]},
                duration_s=80 * 86_400,
                max_price_planck_per_hour=str(10**19),
            )
        network.ledger.look()
        assert network.ledger.account(network.client.owner) == before

    def test_a_client_that_dies_after_paying_gets_its_lease(self, network: Demo) -> None:
        order_without_waiting(network)
        network.swarm.kill("client")
        network.swarm.start("client")
        network.until("RUNNING after the client's restart", lambda: lease_state(network) == "RUNNING", 60)
        connect(network)
        logs(network)

    def test_a_checker_that_dies_in_between_signs_again(self, network: Demo) -> None:
        network.swarm.kill("checker-2")
        network.swarm.start("checker-2")
        network.swarm.kill("checker-3")  # from now on there is no quorum without checker-2
        slot = network.ledger.look().slot
        before_s = most_seconds(network, slot)
        network.until("windows that checker-2 signed", lambda: network.ledger_order().paid_seconds > before_s, 60)
        assert lease_state(network) == "RUNNING"
        network.swarm.start("checker-3")
        for name in ("checker-2", "checker-3"):
            assert network.ledger.account(network.swarm.member(name).owner).licences == 1

    def test_the_lease_goes_on_while_its_provider_restarts(self, network: Demo) -> None:
        network.swarm.stop_node("provider")
        network.swarm.start("provider")
        network.until("the program through the restarted provider", lambda: reaches(network), 30)

    def test_the_client_cancels_and_the_sums_agree(self, network: Demo) -> None:
        network.swarm.api("client").delete(f"orders/{network.order}")
        settlement(network)
        assert network.ledger_order().outcome == CANCELLED

    def test_a_killed_provider_is_not_paid_for_more_than_was_witnessed(self, network: Demo) -> None:
        points = network.ledger.account(network.client.owner).points_planck
        order(network)
        started = network.running_slot
        network.until("two witness windows", lambda: network.ledger.state.slot >= started + 2, 30)
        network.swarm.kill("provider")
        most_s = most_seconds(network, network.ledger.look().slot + WINDOWS_UNTIL_UNPAID)
        network.until("the end of the order", lambda: network.ledger_order().status == ORDER_CLOSED, 90)
        ended = network.ledger_order()
        assert 0 < ended.paid_seconds <= most_s
        assert ended.outcome in (FAILED, CANCELLED)
        assert ended.refunded_points == ended.locked_planck - ended.paid_planck
        assert network.ledger.account(network.client.owner).points_planck == points + ended.refunded_points
        network.swarm.start("provider")

    def test_two_nodes_with_one_key_harm_nobody_else(self, network: Demo) -> None:
        twin = network.swarm.directory / "twin" / "data"
        shutil.copytree(
            network.swarm.prepared.data_directory("checker-1"),
            twin,
            ignore=shutil.ignore_patterns("api.json", "node.lock"),
        )
        with (twin.parent / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "node.cli", "run", "--data-dir", str(twin)],
                env=node_environment({"PATH": "/usr/bin:/bin"}, network.swarm.directory),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            slot = network.ledger.look().slot + 3
            network.until("certificates beside the twin", lambda: newest_slot(network, "checker-3") >= slot, 90)
            assert [status.state for status in network.swarm.status()].count("running") == 7
        finally:
            process.terminate()
            assert process.wait(20) == 0


class TestWrongWorker:
    """A provider that computes half of every check wrongly."""

    NETWORK = "wrong"

    def test_it_is_found_out_and_never_rented(self, network: Demo) -> None:
        honest, cheat = network.swarm.member("provider"), network.swarm.member("cheat")

        def verdicts() -> set[str]:
            return {view["verdict"] for view in network.get("client", "checks", worker=cheat.key) or []}

        def is_active(key: str) -> bool:
            worker = network.ledger.state.workers.get(bytes.fromhex(key))
            return worker is not None and worker.status == ACTIVE

        network.until("WRONG for the cheat", lambda: "WRONG" in verdicts(), 90)
        network.until("the honest provider to be active", lambda: is_active(honest.key), 60)
        order(network)
        assert "PASS" not in verdicts()
        assert network.ledger.state.workers[bytes.fromhex(cheat.key)].status == REGISTERED
        assert network.ledger_order().worker.hex() == honest.key
        assert network.ledger_order().status == ORDER_OPEN


def order_without_waiting(network: Demo) -> None:
    """Pay for a lease, and do not look what becomes of it."""
    network.order = network.place()["order"]


def lease_state(network: Demo) -> str:
    view = network.get("client", f"orders/{network.order}")
    return view["state"] if view else ""


def most_seconds(network: Demo, slot: int) -> int:
    """What the order can have earned by the end of a slot."""
    params = network.ledger.state.params
    return (slot - params.slot_of(network.ledger_order().placed_block) + 1) * params.slot_ms // 1000


def newest_slot(network: Demo, name: str) -> int:
    return max((view["slot"] for view in network.get(name, "checks") or []), default=0)


def reaches(network: Demo) -> bool:
    """Whether a request through the tunnel gets the page of this run."""
    try:
        connect(network)
    except (KaisarError, NodeUnavailable):
        return False
    return True
