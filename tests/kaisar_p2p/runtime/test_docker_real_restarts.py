"""The Docker runtime against a real engine: restarts, and engines that go away (`just test-docker`)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import ContainerError
from kaisar_p2p.runtime import ContainerStatus, docker_streams, select_runtime
from kaisar_p2p.runtime import docker as docker_runtime
from kaisar_p2p.runtime.docker import DockerRuntime, open_docker
from kaisar_p2p.runtime.docker_options import LEASE_LABEL, NODE_LABEL
from tests.kaisar_p2p.runtime.conftest import FOREVER, IMAGE, of_node, spec, told, until

pytestmark = pytest.mark.docker


async def test_a_node_finds_its_own_again_and_no_others(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    mine, done, theirs = spec(), spec("sh", "-c", "exit 5"), spec()
    first = await runtime.start(mine)
    await runtime.start(done)
    assert await runtime.wait(done.lease) == 5
    neighbour = await open_docker(node_id[::-1])
    try:
        await neighbour.start(theirs)
        again = await open_docker(node_id)
        found = {status.lease: status for status in await again.containers()}
        assert found == {mine.lease: first, done.lease: ContainerStatus(done.lease, "exited", 5, ())}
        assert await again.status(theirs.lease) is None
        await again.stop(theirs.lease, 0)
        assert await neighbour.status(theirs.lease) is not None
        assert (await told(again, mine.lease, "true"))[0] == 0
        await again.stop(mine.lease, 0)
        assert await runtime.status(mine.lease) is None
    finally:
        await neighbour.stop(theirs.lease, 0)


async def test_an_interrupted_start_is_done_again(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec()
    labels = {LEASE_LABEL: made.lease, NODE_LABEL: node_id}
    client.containers.create(IMAGE, list(FOREVER), labels=labels)
    assert [status.phase for status in await runtime.containers()] == ["created"]
    assert (await runtime.start(made)).phase == "running"
    assert len(of_node(client, node_id)) == 1


async def test_a_container_that_is_restarted_has_not_ended(client: Any, node_id: str) -> None:
    runtime = await open_docker(node_id)
    made = spec("sh", "-c", "test -e /again && exit 6; touch /again; sleep 1000", ports=(8080,))
    await runtime.start(made)
    [container] = of_node(client, node_id)
    await until(lambda: container.exec_run("test -e /again").exit_code == 0)
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await runtime.wait(made.lease))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.to_thread.run_sync(lambda: container.restart(timeout=1))
    assert codes == [6]  # of the second run


async def test_a_container_that_was_removed_is_an_error(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec()
    await runtime.start(made)
    [container] = of_node(client, node_id)
    with trio.fail_after(30), pytest.raises(BaseExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runtime.wait, made.lease)
            await trio.to_thread.run_sync(lambda: container.remove(force=True))
    assert caught.group_contains(ContainerError, match="not here")


class Gate:
    """A socket in front of the engine's, which can be shut, or stop to answer."""

    def __init__(self, path: Path) -> None:
        self.path, self.pairs, self.stalled = path, list[tuple[socket.socket, socket.socket]](), False
        self.open()

    def open(self) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.path))
        self.server.listen(64)
        threading.Thread(target=self._serve, args=(self.server,), daemon=True).start()

    def shut(self) -> None:
        self.path.unlink()
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for pair in self.pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.pairs.clear()

    def _serve(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect("/var/run/docker.sock")
                self.pairs.append((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not self.stalled:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def gate(client: Any, node_id: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The engine behind a gate; `DOCKER_HOST` leads there."""
    if not client.api.base_url.startswith("http+docker"):
        pytest.skip("the engine is not behind a local socket")
    path = Path(f"/tmp/kaisar-{node_id}.sock")
    gate = Gate(path)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    yield gate
    if path.exists():
        gate.shut()


async def test_an_engine_that_dies_in_between_is_an_error_everywhere(
    gate: Gate, node_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_runtime, "AWAY_S", 1.0)
    runtime = await open_docker(node_id)
    made = spec()
    await runtime.start(made)
    failed: list[str] = []

    async def waits() -> None:
        try:
            await runtime.wait(made.lease)
        except ContainerError as error:
            failed.append(error.message)

    async def follows() -> None:
        async for _chunk in runtime.logs(made.lease, follow=True, tail_bytes=10):
            pass

    with trio.fail_after(30):
        async with runtime.exec(made.lease, FOREVER) as session, trio.open_nursery() as nursery:
            nursery.start_soon(waits)
            nursery.start_soon(follows)
            await trio.sleep(0.3)
            gate.shut()
            assert [item async for item in session.output()] == []
            with pytest.raises(ContainerError):
                await session.exit_code()
        for call in (
            runtime.status(made.lease),
            runtime.containers(),
            runtime.stop(made.lease, 1),
            runtime.start(made),
        ):
            with pytest.raises(ContainerError):
                await call
    assert len(failed) == 1


async def test_a_lease_outlives_an_engine_that_comes_back(gate: Gate, client: Any, node_id: str) -> None:
    """Also one whose containers ended with it."""
    runtime = await open_docker(node_id)
    made = spec("sh", "-c", "test -e /again && exit 6; touch /again; sleep 1000")
    await runtime.start(made)
    [container] = of_node(client, node_id)
    await until(lambda: container.exec_run("test -e /again").exit_code == 0)
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await runtime.wait(made.lease))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.3)
            gate.shut()
            await trio.to_thread.run_sync(container.kill)
            await trio.sleep(1)
            gate.open()
    assert codes == [6]


async def test_an_engine_that_stops_to_answer_is_an_error(
    gate: Gate, node_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = await open_docker(node_id)
    made = spec()
    await runtime.start(made)
    monkeypatch.setattr(docker_runtime, "LOOK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(docker_streams, "LOOK_TIMEOUT_S", 0.5)
    async with runtime.exec(made.lease, FOREVER):
        gate.stalled = True
        with trio.fail_after(20):
            with pytest.raises(ContainerError, match="did not answer"):
                await runtime.status(made.lease)
            with pytest.raises(ContainerError, match="did not answer"):
                await told(runtime, made.lease, "true")
            with pytest.raises(ContainerError, match="did not answer"):
                await runtime.start(spec())


async def test_auto_takes_processes_when_the_engine_stops_to_answer(gate: Gate, tmp_path: Path) -> None:
    gate.stalled = True
    with trio.fail_after(10):
        assert (await select_runtime("auto", tmp_path / "leases", "0" * 16)).name == "process"
    gate.shut()
    with trio.fail_after(10):
        assert (await select_runtime("auto", tmp_path / "leases", "0" * 16)).name == "process"
