"""Containers: what the lease machine hears of starts, health and ends, and what is adopted after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from kaisar_p2p.errors import ContainerError, RuntimeUnavailable
from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus
from node.containers import HEALTH_TIMEOUT_S, STOP_RETRY_S, Containers
from node.inbox import RULES, Inbox, Lane
from protocols.actions import ContainerReport, Deploy, RequestEnded
from protocols.orders import Variable, Workload

ORDER = b"\xab" * 32
LEASE = ORDER.hex()


class Runtime:
    """Containers that do what a test says. A lease is in `statuses` while it exists."""

    def __init__(self) -> None:
        self.statuses: dict[str, ContainerStatus] = {}
        self.specs: list[ContainerSpec] = []
        self.stopped: list[str] = []
        self.ends: dict[str, trio.Event] = {}
        self.start_error: Exception | None = None
        self.stop_errors: list[Exception] = []
        self.wait_error: Exception | None = None
        self.start_gate: trio.Event | None = None

    def run(self, lease: str, *ports: tuple[int, tuple[str, int]], phase: str = "running") -> None:
        self.statuses[lease] = ContainerStatus(lease, phase, None, ports)
        self.ends.setdefault(lease, trio.Event())

    def end(self, lease: str, code: int) -> None:
        self.statuses[lease] = ContainerStatus(lease, "exited", code, self.statuses[lease].ports)
        self.ends[lease].set()

    async def start(self, spec: ContainerSpec) -> ContainerStatus:
        self.specs.append(spec)
        if self.start_gate is not None:
            await self.start_gate.wait()
        if self.start_error is not None:
            raise self.start_error
        if spec.lease not in self.statuses:
            self.run(spec.lease, *((port, ("127.0.0.1", 1)) for port in spec.ports))
        return self.statuses[spec.lease]

    async def status(self, lease: str) -> ContainerStatus | None:
        return self.statuses.get(lease)

    async def containers(self) -> list[ContainerStatus]:
        return list(self.statuses.values())

    async def stop(self, lease: str, grace_s: float) -> None:
        if self.stop_errors:
            raise self.stop_errors.pop()
        self.stopped.append(lease)
        self.statuses.pop(lease, None)
        if lease in self.ends:
            self.ends.pop(lease).set()

    async def wait(self, lease: str) -> int:
        if self.wait_error is not None:
            raise self.wait_error
        if lease not in self.statuses:
            raise ContainerError(f"lease {lease[:8]} is not here")
        await self.ends[lease].wait()
        if lease not in self.statuses:
            raise ContainerError(f"lease {lease[:8]} is not here")
        return self.statuses[lease].exit_code or 0


class Worker:
    """A runtime, the part under test, and its reports."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.runtime, self.inbox, self._nursery = Runtime(), Inbox(), nursery
        self.containers = Containers(self.runtime, self.inbox)  # type: ignore[arg-type]

    async def begin(self) -> None:
        await self._nursery.start(self.containers.run)

    async def deploy(self, *ports: int) -> None:
        work = Workload("", ("serve",), (Variable("NAME", "value"),), ports)
        await self.containers.deploy(Deploy(ORDER, work, 2, 512, 100, 1))

    async def reports(self, count: int) -> list[tuple[str, str]]:
        found = [await self.inbox.get() for _ in range(count)]
        assert all(isinstance(each, ContainerReport) and each.order_id == ORDER for each in found)
        return [(each.phase, each.detail) for each in found]  # type: ignore[union-attr]

    async def quiet(self) -> bool:
        await trio.testing.wait_all_tasks_blocked()
        return self.inbox.get_nowait() is None


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with trio.open_nursery() as nursery:
        yield Worker(nursery)
        nursery.cancel_scope.cancel()


async def test_a_program_without_a_port_is_healthy_once_it_runs(worker: Worker) -> None:
    await worker.begin()
    await worker.deploy()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]
    worker.runtime.end(LEASE, 3)
    assert await worker.reports(1) == [("exited", "3")]
    (spec,) = worker.runtime.specs
    assert (spec.lease, spec.command, spec.environment) == (LEASE, ("serve",), (("NAME", "value"),))
    assert (spec.cpu_cores, spec.memory_mb, spec.disk_mb, spec.gpus) == (2, 512, 100, 1)


async def test_a_program_is_healthy_when_its_first_port_answers(worker: Worker) -> None:
    await worker.begin()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    worker.runtime.run(LEASE, (80, ("127.0.0.1", listeners[0].socket.getsockname()[1])), (81, ("127.0.0.1", 1)))
    await worker.deploy(80, 81)
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]
    for listener in listeners:
        await listener.aclose()


async def test_a_port_that_never_answers_is_unhealthy_and_its_end_is_still_reported(
    worker: Worker, autojump_clock: trio.testing.MockClock
) -> None:
    await worker.begin()
    began = trio.current_time()
    await worker.deploy(80)
    (started, unhealthy) = await worker.reports(2)
    assert started == ("started", "")
    assert unhealthy[0] == "unhealthy"
    assert "80" in unhealthy[1]
    assert trio.current_time() - began >= HEALTH_TIMEOUT_S
    worker.runtime.end(LEASE, 0)
    assert await worker.reports(1) == [("exited", "0")]


async def test_a_program_that_ends_before_it_is_healthy(worker: Worker) -> None:
    await worker.begin()
    await worker.deploy(80)
    await trio.testing.wait_all_tasks_blocked()
    worker.runtime.end(LEASE, 1)
    assert await worker.reports(2) == [("started", ""), ("exited", "1")]


@pytest.mark.parametrize(
    "error", [ContainerError("image-not-found: no such image"), RuntimeUnavailable("the engine does not answer")]
)
async def test_a_start_that_fails_is_reported_with_its_reason(worker: Worker, error: Exception) -> None:
    await worker.begin()
    worker.runtime.start_error = error
    await worker.deploy(80)
    assert await worker.reports(1) == [("failed", str(error))]
    assert await worker.quiet()


@pytest.mark.parametrize("error", [ContainerError("the engine has gone"), RuntimeError("a bug"), OSError("a disk")])
async def test_a_runtime_that_fails_while_watching_costs_one_lease_only(worker: Worker, error: Exception) -> None:
    await worker.begin()
    worker.runtime.wait_error = error
    await worker.deploy()
    started, healthy, failed = await worker.reports(3)
    assert (started[0], healthy[0], failed[0]) == ("started", "healthy", "failed")
    assert str(error) in failed[1]
    worker.runtime.wait_error = None
    await worker.deploy()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]


async def test_reports_wait_for_room(worker: Worker) -> None:
    for n in range(RULES[Lane.RESULT].length):
        worker.inbox.put(Lane.RESULT, RequestEnded(str(n), ""))
    await worker.begin()
    await worker.deploy()
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(RULES[Lane.RESULT].length):
        await worker.inbox.get()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]
    worker.runtime.end(LEASE, 0)
    assert await worker.reports(1) == [("exited", "0")]


# ── restart ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_containers_of_an_earlier_run_are_adopted(worker: Worker) -> None:
    worker.runtime.run(LEASE)
    await worker.begin()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]
    worker.runtime.end(LEASE, 9)
    assert await worker.reports(1) == [("exited", "9")]


async def test_a_container_that_ended_while_the_node_was_away_is_reported(worker: Worker) -> None:
    worker.runtime.run(LEASE)
    worker.runtime.end(LEASE, 4)
    await worker.begin()
    assert await worker.reports(2) == [("started", ""), ("exited", "4")]


async def test_a_start_that_was_cut_short_leaves_nothing(worker: Worker) -> None:
    worker.runtime.run(LEASE, phase="created")
    await worker.begin()
    assert worker.runtime.stopped == [LEASE]
    assert await worker.quiet()
    await worker.deploy()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]


async def test_a_container_that_is_deployed_again_is_watched_once(worker: Worker) -> None:
    worker.runtime.run(LEASE)
    await worker.begin()
    await worker.deploy()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]
    assert await worker.quiet()
    worker.runtime.end(LEASE, 0)
    assert await worker.reports(1) == [("exited", "0")]
    assert await worker.quiet()


# ── stop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_container_that_is_stopped_is_silent(worker: Worker) -> None:
    await worker.begin()
    await worker.deploy()
    await worker.reports(2)
    await worker.containers.stop(ORDER)
    assert worker.runtime.stopped == [LEASE]
    assert await worker.quiet()
    await worker.containers.stop(ORDER)  # once more does no harm
    await worker.deploy()
    assert await worker.reports(2) == [("started", ""), ("healthy", "")]


async def test_a_stop_during_the_start_shows_what_is_left(worker: Worker) -> None:
    """The lease machine stops again whatever starts after its lease has ended; for that it must hear of it."""
    await worker.begin()
    worker.runtime.start_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.deploy)
        await trio.testing.wait_all_tasks_blocked()
        await worker.containers.stop(ORDER)
        worker.runtime.start_gate.set()
    assert (await worker.reports(1))[0] == ("started", "")
    await worker.containers.stop(ORDER)
    assert LEASE not in worker.runtime.statuses


async def test_an_engine_that_is_away_is_asked_again_to_stop(
    worker: Worker, autojump_clock: trio.testing.MockClock
) -> None:
    await worker.begin()
    worker.runtime.run(LEASE)
    worker.runtime.stop_errors = [RuntimeUnavailable("restarting")] * len(STOP_RETRY_S)
    await worker.containers.stop(ORDER)
    assert worker.runtime.stopped == [LEASE]


async def test_an_engine_that_never_stops_anything_is_given_up(
    worker: Worker, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    await worker.begin()
    worker.runtime.stop_errors = [RuntimeUnavailable("broken")] * 100
    await worker.containers.stop(ORDER)
    assert caplog.text.count("cannot stop container") == len(STOP_RETRY_S) + 1
