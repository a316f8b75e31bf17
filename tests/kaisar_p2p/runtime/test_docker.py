"""The Docker runtime against an engine that is simulated at the SDK's surface, and the choice of a runtime."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from kaisar_p2p.errors import ContainerError, RuntimeUnavailable
from kaisar_p2p.runtime import ContainerSpec, select_runtime
from kaisar_p2p.runtime.docker import DockerRuntime

LEASE = "ab" * 32
NODE = "0123456789abcdef"
IMAGE = "nginx@sha256:" + "0" * 64


def spec(lease: str = LEASE, image: str = IMAGE, gpus: int = 0) -> ContainerSpec:
    return ContainerSpec(lease, image, ("serve",), (("A", "b"),), (80, 443), 2, 512, 1024, gpus)


class FakeContainer:
    def __init__(self, engine: FakeEngine, image: str, options: dict[str, Any]) -> None:
        self.engine, self.image, self.options = engine, image, options
        self.id, self.labels = f"id-{len(engine.made)}", options["labels"]
        self.attrs: dict[str, Any] = {"State": {"Status": "created", "ExitCode": 0}, "NetworkSettings": {"Ports": {}}}
        self.stopped_with: int | None = None

    def start(self) -> None:
        if self.engine.start_fault:
            raise APIError("500", explanation=self.engine.start_fault)
        self.attrs["State"]["Status"] = "running"
        self.attrs["NetworkSettings"]["Ports"] = {
            name: [{"HostIp": host, "HostPort": str(32768 + index)}]
            for index, (name, (host, _)) in enumerate(self.options["ports"].items())
        } | {"9/udp": None}

    def stop(self, timeout: int) -> None:
        self.stopped_with = timeout
        self.ended(137)

    def ended(self, code: int) -> None:
        self.attrs["State"] = {"Status": "exited", "ExitCode": code}

    def remove(self, force: bool, v: bool) -> None:
        assert force and v
        if self not in self.engine.here:
            raise NotFound("gone")
        self.engine.here.remove(self)

    def logs(self, tail: int, **options: Any) -> Any:
        assert options.pop("timestamps")
        if not options.get("stream"):
            return b"T2 two\n"
        lines = [b"T1 one\n", b"T2 two\n"][-tail or 2 :]
        return FakeStream(iter(lines + [b"T3 more\n", b"T4 end\n"] * options["follow"]))


class FakeStream:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.closed = chunks, False

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> bytes:
        return next(self.chunks)

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """As much of docker.DockerClient as the runtime uses."""

    def __init__(self) -> None:
        self.here: list[FakeContainer] = []
        self.made: list[FakeContainer] = []
        self.local = {IMAGE}
        self.remote = {"busybox:latest"}
        self.pulled: list[str] = []
        self.layer_bytes = 1
        self.start_fault = ""
        self.no_quota = True
        self.image_labels: dict[str, str] = {}
        self.network_options: dict[str, dict[str, str]] = {}
        self.images = SimpleNamespace(get=self._get)
        self.networks = SimpleNamespace(get=self._get_network, create=self._create_network)
        self.containers = SimpleNamespace(list=self._list, create=self._create)
        self.api = SimpleNamespace(
            exec_create=self._exec_create,
            exec_start=self._exec_start,
            exec_inspect=self._exec_inspect,
            pull=self._pull,
        )
        self.exec_running = 1

    def _get(self, name: str) -> Any:
        if name not in self.local:
            raise ImageNotFound("no such image")
        return SimpleNamespace(labels=self.image_labels)

    def _get_network(self, name: str) -> None:
        if name not in self.network_options:
            raise NotFound("no such network")

    def _create_network(self, name: str, driver: str, options: dict[str, str], check_duplicate: bool) -> None:
        assert driver == "bridge"
        assert check_duplicate
        self.network_options[name] = options

    def _pull(self, name: str, tag: str, stream: bool, decode: bool, auth_config: dict[str, str]) -> Any:
        assert stream
        assert decode
        assert auth_config == {}  # none of the operator's
        self.pulled.append(f"{name}:{tag}")
        if self.pulled[-1] not in self.remote:
            raise NotFound("pull access denied")
        yield {"status": "Downloading", "id": "layer", "progressDetail": {"total": self.layer_bytes}}
        self.local.add(name)

    def _create(self, image: str, **options: Any) -> FakeContainer:
        if self.no_quota and "storage_opt" in options:
            raise APIError("500", explanation="--storage-opt is supported only for overlay over xfs with 'pquota'")
        container = FakeContainer(self, image, options)
        self.here.append(container)
        self.made.append(container)
        return container

    def _list(self, all: bool, filters: dict[str, list[str]], ignore_removed: bool = False) -> list[FakeContainer]:
        assert all and ignore_removed

        def has(labels: dict[str, str], wanted: str) -> bool:
            name, _, value = wanted.partition("=")
            return name in labels and (not value or labels[name] == value)

        return [each for each in self.here if all_of(has(each.labels, wanted) for wanted in filters["label"])]

    def _exec_create(self, container: str, command: list[str], stdin: bool, environment: list[str]) -> dict[str, str]:
        assert stdin
        assert environment[0].startswith("KAISAR_EXEC=")
        return {"Id": " ".join(command)}

    def _exec_start(self, exec_id: str, socket: bool) -> Any:
        assert socket
        return echo_socket()

    def _exec_inspect(self, exec_id: str) -> dict[str, Any]:
        self.exec_running -= 1
        return {"Running": self.exec_running >= 0, "ExitCode": 4}


def all_of(values: Any) -> bool:
    return all(values)


def echo_socket() -> socket.socket:
    """What an exec stream looks like: frames with an 8-byte header, until the other end closes."""
    ours, theirs = socket.socketpair()
    for channel, text in ((1, b"out"), (2, b"err")):
        theirs.sendall(struct.pack(">BxxxL", channel, len(text)) + text)
    theirs.close()
    return ours


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def runtime(engine: FakeEngine) -> DockerRuntime:
    return DockerRuntime(engine, NODE)


async def test_ports_keep_the_order_in_which_they_were_asked_for(runtime: DockerRuntime) -> None:
    """The first one is health-checked, also by a node that finds the container again."""
    started = await runtime.start(replace(spec(), ports=(443, 80)))
    assert [port for port, _ in started.ports] == [443, 80]
    (found,) = await runtime.containers()
    assert [port for port, _ in found.ports] == [443, 80]


async def test_a_container_is_limited_labelled_and_reached_on_loopback(
    engine: FakeEngine, runtime: DockerRuntime
) -> None:
    status = await runtime.start(spec(gpus=1))
    assert (status.lease, status.phase, status.exit_code) == (LEASE, "running", None)
    assert status.address(80) == ("127.0.0.1", 32768)
    assert status.address(443) == ("127.0.0.1", 32769)
    options = engine.here[0].options
    assert options["labels"] == {
        "kaisar.lease": LEASE,
        "kaisar.node": NODE,
        "kaisar.gpus": "0",
        "kaisar.disk-mb": "1024",
        "kaisar.ports": "80,443",
    }
    assert options["ports"] == {"80/tcp": ("127.0.0.1", None), "443/tcp": ("127.0.0.1", None)}
    assert (options["mem_limit"], options["memswap_limit"]) == ("512m", "512m")
    assert options["nano_cpus"] == 2 * 10**9
    assert options["pids_limit"] == 256
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges"]
    assert options["environment"]["A"] == "b"
    assert options["device_requests"][0]["DeviceIDs"] == ["0"]
    assert options["network"] == "kaisar"
    assert engine.network_options == {"kaisar": {"com.docker.network.bridge.enable_icc": "false"}}
    assert options["use_config_proxy"] is False
    assert not options.get("privileged")
    assert not options.get("volumes")
    assert not options.get("network_mode")
    assert engine.pulled == []


async def test_disk_limit_and_read_only_root_where_they_are_possible(
    engine: FakeEngine, runtime: DockerRuntime
) -> None:
    engine.no_quota = False
    engine.image_labels = {"kaisar.root": "read-only"}
    await runtime.start(spec())
    options = engine.here[0].options
    assert options["storage_opt"] == {"size": "1024m"}
    assert options["read_only"] is True
    assert set(options["tmpfs"]) == {"/tmp", "/run"}


async def test_start_is_idempotent_and_an_interrupted_one_is_done_again(
    engine: FakeEngine, runtime: DockerRuntime
) -> None:
    first = await runtime.start(spec())
    assert await runtime.start(spec()) == first
    assert len(engine.made) == 1
    engine.here[0].attrs["State"]["Status"] = "created"
    await runtime.start(spec())
    assert len(engine.made) == 2
    assert len(engine.here) == 1


async def test_an_image_that_is_not_here_is_pulled(engine: FakeEngine, runtime: DockerRuntime) -> None:
    await runtime.start(spec(image="busybox"))
    assert engine.pulled == ["busybox:latest"]
    with pytest.raises(ContainerError, match=r"^image-not-found: nobody/nothing:1"):
        await runtime.start(spec(lease="cd" * 32, image="nobody/nothing:1"))
    with pytest.raises(ContainerError, match=r"^image-not-found: "):
        await runtime.start(spec(lease="cd" * 32, image=""))
    assert len(engine.here) == 1


async def test_an_image_that_is_too_large_is_not_pulled(engine: FakeEngine, runtime: DockerRuntime) -> None:
    engine.layer_bytes = 1 << 50
    with pytest.raises(ContainerError, match=r"^start-failed: busybox is larger than 64 GiB"):
        await runtime.start(spec(image="busybox"))
    assert engine.made == []


async def test_no_two_leases_share_a_gpu(engine: FakeEngine, runtime: DockerRuntime) -> None:
    leases = [f"{n:02x}" * 32 for n in range(4)]
    for lease, gpus in zip(leases, (1, 2, 0, 1), strict=True):
        await runtime.start(spec(lease=lease, gpus=gpus))
    assert [each.labels["kaisar.gpus"] for each in engine.made] == ["0", "1,2", "", "3"]
    await runtime.stop(leases[1], 0)
    await runtime.start(spec(lease="ff" * 32, gpus=3))
    assert engine.made[-1].options["device_requests"][0]["DeviceIDs"] == ["1", "2", "4"]


async def test_a_command_is_filled_in_and_told_where_to_listen(engine: FakeEngine, runtime: DockerRuntime) -> None:
    command = ("{python}", "--bind={host}", "{port:80}", "{port:81}:{other}")
    await runtime.start(replace(spec(), command=command, environment=(("PORT", "9"), ("KAISAR_HOST", "x"))))
    options = engine.made[0].options
    assert options["command"] == ["python3", "--bind=0.0.0.0", "80", "81:{other}"]
    assert options["environment"] == {
        "PORT": "9", "PORT_80": "80", "PORT_443": "443", "KAISAR_PORT_80": "80", "KAISAR_PORT_443": "443",
        "KAISAR_HOST": "0.0.0.0", "KAISAR_LEASE": LEASE,
    }  # fmt: skip


async def test_a_failed_start_removes_the_container(engine: FakeEngine, runtime: DockerRuntime) -> None:
    engine.start_fault = "port is already allocated"
    with pytest.raises(ContainerError, match=r"^start-failed: port is already allocated"):
        await runtime.start(spec())
    assert engine.here == []
    assert len(engine.made) == 1


async def test_an_unknown_refusal_to_create_is_not_tried_without_limits(
    engine: FakeEngine, runtime: DockerRuntime
) -> None:
    def refuse(image: str, **options: Any) -> None:
        raise APIError("400", explanation="invalid name")

    engine.containers.create = refuse
    with pytest.raises(ContainerError, match=r"^start-failed: invalid name"):
        await runtime.start(spec())


async def test_a_node_sees_only_its_own_containers(engine: FakeEngine, runtime: DockerRuntime) -> None:
    await DockerRuntime(engine, "another").start(spec(lease="ef" * 32))
    await runtime.start(spec())
    again = DockerRuntime(engine, NODE)
    assert [status.lease for status in await again.containers()] == [LEASE]
    assert await again.status("ef" * 32) is None


async def test_stop_asks_removes_and_may_be_repeated(engine: FakeEngine, runtime: DockerRuntime) -> None:
    await runtime.start(spec())
    container = engine.here[0]
    await runtime.stop(LEASE, 3.4)
    assert container.stopped_with == 3
    assert engine.here == []
    await runtime.stop(LEASE, 1)


async def test_wait_gives_the_exit_code(
    engine: FakeEngine, runtime: DockerRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaisar_p2p.runtime.docker.EXIT_CONFIRM_S", 0.001)  # a mock clock would outrun the threads
    await runtime.start(spec())
    engine.here[0].ended(9)
    assert await runtime.wait(LEASE) == 9
    with pytest.raises(ContainerError, match="not here"):
        await runtime.wait("cd" * 32)


async def test_logs(runtime: DockerRuntime) -> None:
    await runtime.start(spec())
    assert [chunk async for chunk in runtime.logs(LEASE, follow=False, tail_bytes=4)] == [b"two\n"]
    assert [chunk async for chunk in runtime.logs(LEASE, follow=True, tail_bytes=0)] == [b"more\n", b"end\n"]


async def test_exec(runtime: DockerRuntime) -> None:
    await runtime.start(spec())
    async with runtime.exec(LEASE, ("ls",)) as session:
        assert [item async for item in session.output()] == [(1, b"out"), (2, b"err")]
        assert await session.exit_code() == 4
    with pytest.raises(ContainerError, match="not here"):
        async with runtime.exec("cd" * 32, ("ls",)):
            pass


async def test_an_engine_that_dies_is_a_container_error(engine: FakeEngine, runtime: DockerRuntime) -> None:
    def gone(**_: Any) -> None:
        raise requests.ConnectionError("connection refused")

    engine.containers.list = gone
    with pytest.raises(ContainerError, match="connection refused"):
        await runtime.status(LEASE)


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_auto_takes_processes_when_no_engine_answers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with caplog.at_level(logging.INFO):
        runtime = await select_runtime("auto", tmp_path / "leases", NODE)
    assert (runtime.name, runtime.for_development) == ("process", True)
    assert "NOT isolated" in caplog.text
    with pytest.raises(RuntimeUnavailable) as caught:
        await select_runtime("docker", tmp_path, NODE)
    assert "process" in caught.value.hint
    with pytest.raises(RuntimeUnavailable, match="podman"):
        await select_runtime("podman", tmp_path, NODE)


async def test_auto_takes_docker_when_its_engine_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(ping=lambda: True, api=SimpleNamespace(timeout=0))
    monkeypatch.setattr(docker, "from_env", lambda timeout: client)
    runtime = await select_runtime("auto", tmp_path, NODE)
    assert (runtime.name, runtime.for_development) == ("docker", False)


async def test_an_engine_that_answers_with_an_error_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(timeout: int) -> None:
        raise DockerException("Error while fetching server API version: timed out")

    monkeypatch.setattr(docker, "from_env", refuse)
    assert (await select_runtime("auto", tmp_path, NODE)).name == "process"
