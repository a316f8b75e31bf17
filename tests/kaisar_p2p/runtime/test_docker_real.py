"""The Docker runtime against a real engine: programs, isolation and limits, logs, commands (`just test-docker`)."""

from __future__ import annotations

import io
import secrets
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import ContainerError
from kaisar_p2p.runtime import docker as docker_runtime
from kaisar_p2p.runtime import docker_engine, select_runtime
from kaisar_p2p.runtime.docker import MAX_STREAMS, DockerRuntime
from kaisar_p2p.runtime.docker_options import CAPABILITIES, LEASE_LABEL, NODE_LABEL
from kaisar_p2p.runtime.reach import answers
from tests.kaisar_p2p.runtime.conftest import (
    FOREVER,
    IMAGE,
    SERVER,
    of_node,
    output,
    ran,
    spec,
    told,
    until,
    until_answers,
)

pytestmark = pytest.mark.docker

CAPABILITY_NUMBERS = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "KILL": 5, "SETGID": 6, "SETUID": 7}
CAPABILITY_NUMBERS["NET_BIND_SERVICE"] = 10
HOG = "b = []\nwhile True: b.append(bytearray(8 << 20))"
CROWD = """
import subprocess, sys
crowd = []
try:
    while len(crowd) < 400: crowd.append(subprocess.Popen(["sleep", "100"]))
except OSError: pass
print(len(crowd), flush=True)
"""


# ── start, reach, stop ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_auto_takes_the_engine_that_answers(client: Any, tmp_path: Path) -> None:
    runtime = await select_runtime("auto", tmp_path, "0" * 16)
    assert (runtime.name, runtime.for_development) == ("docker", False)


async def test_a_template_is_reached_on_loopback_once_it_listens(client: Any, runtime: DockerRuntime) -> None:
    made = spec(*SERVER, ports=(8080, 9090), environment=(("GREETING", "hello"),))
    status = await runtime.start(made)
    assert (status.lease, status.phase, status.exit_code) == (made.lease, "running", None)
    assert [port for port, _ in status.ports] == [8080, 9090]
    assert {host for _, (host, _) in status.ports} == {"127.0.0.1"}
    serves, silent = status.address(8080), status.address(9090)
    assert serves and silent
    await until_answers(serves)
    assert not await answers(silent, 1)  # the engine's proxy accepts there, too
    code, environment, _ = await told(runtime, made.lease, "env")
    assert code == 0
    for line in (
        b"GREETING=hello",
        b"KAISAR_HOST=0.0.0.0",
        b"KAISAR_PORT_8080=8080",
        b"PORT_9090=9090",
        b"PORT=8080",
        b"KAISAR_LEASE=" + made.lease.encode(),
    ):
        assert line in environment.split(b"\n")


async def test_start_is_idempotent_and_stop_too(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec()
    first = await runtime.start(made)
    assert await runtime.start(made) == first
    assert len(of_node(client, node_id)) == 1
    await runtime.stop(made.lease, 0)
    assert await runtime.status(made.lease) is None
    await runtime.stop(made.lease, 0)
    with pytest.raises(ContainerError, match="not here"):
        await runtime.wait(made.lease)


async def test_two_starts_of_one_lease_make_one_container(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.start, made)
        nursery.start_soon(runtime.start, made)
    assert len(of_node(client, node_id)) == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.stop, made.lease, 1)
        nursery.start_soon(runtime.stop, made.lease, 1)
    assert of_node(client, node_id) == []


@pytest.mark.parametrize(("trap", "last"), [("echo asked; exit 0", "asked"), ("", "ready")])
async def test_a_program_is_asked_first_and_then_killed(
    client: Any, runtime: DockerRuntime, trap: str, last: str
) -> None:
    made = spec("sh", "-c", f"trap '{trap}' TERM; echo ready; while true; do sleep 0.1; done")
    await runtime.start(made)
    lines: list[bytes] = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            async for chunk in runtime.logs(made.lease, follow=True, tail_bytes=100):
                if not lines:
                    nursery.start_soon(runtime.stop, made.lease, 1.0)
                lines += chunk.split()
    assert lines[-1].decode() == last
    assert await runtime.status(made.lease) is None


async def test_a_failed_start_leaves_nothing(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    for made in (spec(cpu_cores=100_000), spec(gpus=99)):  # refused when made, and when started
        with pytest.raises(ContainerError, match=r"^start-failed: "):
            await runtime.start(made)
        assert await runtime.status(made.lease) is None
    assert of_node(client, node_id) == []


async def test_a_program_that_is_not_in_the_image_says_so(client: Any, runtime: DockerRuntime) -> None:
    code, text = await ran(runtime, spec("/no/such/program"))
    assert code == 127
    assert "/no/such/program" in text


@pytest.mark.parametrize("image", ["127.0.0.1:9/nobody/nothing:1", "no.such.host.invalid/nothing", "UPPER//case", ""])
async def test_an_image_that_cannot_be_had(client: Any, runtime: DockerRuntime, node_id: str, image: str) -> None:
    with trio.fail_after(60), pytest.raises(ContainerError, match=r"^image-not-found: "):
        await runtime.start(spec(image=image))
    assert of_node(client, node_id) == []


async def test_a_registry_that_does_not_answer_is_given_up(
    client: Any, runtime: DockerRuntime, node_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "PULL_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        image = f"127.0.0.1:{silent.getsockname()[1]}/slow:1"
        with trio.fail_after(30), pytest.raises(ContainerError, match=r"^image-not-found: .* did not answer in 1 s"):
            await runtime.start(spec(image=image))
    assert of_node(client, node_id) == []


# ── isolation and limits ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_program_has_few_capabilities_and_gets_no_more(client: Any, runtime: DockerRuntime) -> None:
    code, text = await ran(runtime, spec("cat", "/proc/self/status"))
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    mask = sum(1 << CAPABILITY_NUMBERS[name] for name in CAPABILITIES)
    assert code == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert {int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {mask}
    assert {int(fields[name], 16) for name in ("CapInh", "CapAmb")} == {0}


async def test_nothing_of_the_host_is_inside(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec()
    await runtime.start(made)
    [container] = of_node(client, node_id)
    host, settings = container.attrs["HostConfig"], container.attrs["NetworkSettings"]
    assert container.attrs["Mounts"] == []
    assert not host["Binds"] and not host["Privileged"] and not host["Devices"]
    assert host["PidMode"] == "" and host["IpcMode"] == "private" and host["UTSMode"] == ""
    assert set(settings["Networks"]) == {"kaisar"}
    assert container.labels[LEASE_LABEL] == made.lease
    assert container.labels[NODE_LABEL] == node_id
    assert (await told(runtime, made.lease, "sh", "-c", "ls /var/run/docker.sock /run/docker.sock"))[0] != 0
    names = (await told(runtime, made.lease, "sh", "-c", "cat /proc/net/dev"))[1].decode()
    assert {line.partition(":")[0].strip() for line in names.splitlines()[2:]} <= {"lo", "eth0"}
    assert (await told(runtime, made.lease, "sh", "-c", "mount -t tmpfs none /mnt; mknod /dev/mem2 c 1 1"))[0] != 0


async def test_tenants_do_not_reach_each_other(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    serves, looks = spec(*SERVER, ports=(8080,)), spec()
    status = await runtime.start(serves)
    address = status.address(8080)
    assert address
    await until_answers(address)
    [container] = of_node(client, node_id)
    inside = container.attrs["NetworkSettings"]["Networks"]["kaisar"]["IPAddress"]
    program = f"import socket; socket.create_connection(({inside!r}, 8080), 2)"
    assert (await told(runtime, serves.lease, "python3", "-c", program))[0] == 0
    await runtime.start(looks)
    assert (await told(runtime, looks.lease, "python3", "-c", program))[0] != 0


async def test_too_much_memory_is_killed(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec("python3", "-c", HOG, memory_mb=64)
    code, _ = await ran(runtime, made)
    assert code == 137
    [container] = of_node(client, node_id)
    assert container.attrs["State"]["OOMKilled"]
    assert container.attrs["HostConfig"]["MemorySwap"] == container.attrs["HostConfig"]["Memory"] == 64 << 20


async def test_processes_are_counted(client: Any, runtime: DockerRuntime) -> None:
    code, text = await ran(runtime, spec("python3", "-c", CROWD))
    assert code == 0
    assert 200 < int(text) < 256


async def test_the_quota_of_cpu_time_is_set(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    made = spec()
    await runtime.start(made)
    [container] = of_node(client, node_id)
    assert container.attrs["HostConfig"]["NanoCpus"] == 10**9
    read = "cat /sys/fs/cgroup/cpu.max || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us"
    code, text, _ = await told(runtime, made.lease, "sh", "-c", read)
    quota, period = text.split()
    assert (code, quota) == (0, period)


async def test_too_large_a_disk_is_killed(client: Any, runtime: DockerRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_runtime, "DISK_POLL_S", 0.2)
    made = spec("sh", "-c", "head -c 40000000 /dev/zero > /big || exit 3; sleep 1000", disk_mb=8)
    code, _ = await ran(runtime, made)
    assert code in (137, 3)  # 3: where the engine's disk driver knows limits


async def test_an_image_may_ask_for_a_read_only_root(client: Any, runtime: DockerRuntime, node_id: str) -> None:
    """Its labels are its own wish; those by which nodes find containers are not."""
    tag = f"kaisar-test-{node_id}"
    labels = {"kaisar.root": "read-only", NODE_LABEL: "somebody", LEASE_LABEL: "else", "kaisar.disk-mb": "1"}
    built(client, tag, f"FROM {IMAGE}\nLABEL " + " ".join(f'{name}="{value}"' for name, value in labels.items()))
    try:
        made = spec("sh", "-c", "echo a > /tmp/a && echo b > /run/b; echo c > /c", image=tag)
        code, text = await ran(runtime, made)
        assert code != 0
        assert "ead-only file system" in text
        [container] = of_node(client, node_id)
        assert container.labels[LEASE_LABEL] == made.lease
        assert container.attrs["HostConfig"]["ReadonlyRootfs"]
    finally:
        for container in of_node(client, node_id):
            container.remove(force=True)
        client.images.remove(tag, force=True)


def built(client: Any, tag: str, dockerfile: str) -> None:
    """A tiny image, of what is here."""
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(dockerfile.encode())
        archive.addfile(entry, io.BytesIO(dockerfile.encode()))
    context.seek(0)
    client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True, pull=False, network_mode="none")


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_logs_are_cut_to_the_tail(client: Any, runtime: DockerRuntime) -> None:
    made = spec("sh", "-c", "seq 1 3000; echo last >&2")
    await runtime.start(made)
    await runtime.wait(made.lease)
    whole = await output(runtime, made.lease)
    assert sorted(whole.split()) == sorted([*map(str, range(1, 3001)), "last"])
    for tail_bytes in (0, 1, 5, 100):
        tail = b"".join([chunk async for chunk in runtime.logs(made.lease, follow=False, tail_bytes=tail_bytes)])
        assert tail == (whole.encode()[-tail_bytes:] if tail_bytes else b"")


async def test_a_long_line_is_whole(client: Any, runtime: DockerRuntime) -> None:
    made = spec("python3", "-c", "print('x' * 100_000)")
    await runtime.start(made)
    await runtime.wait(made.lease)
    assert await output(runtime, made.lease) == "x" * 100_000 + "\n"


async def test_following_misses_and_repeats_nothing(client: Any, runtime: DockerRuntime) -> None:
    program = "import time\nfor n in range(2000):\n print(n, flush=True)\n if n % 20 == 0: time.sleep(0.01)"
    made = spec("python3", "-c", program)
    await runtime.start(made)
    found: dict[int, bytes] = {}

    async def follow(number: int) -> None:
        found[number] = b"".join([chunk async for chunk in runtime.logs(made.lease, follow=True, tail_bytes=1 << 20)])

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(follow, number)
                await trio.sleep(0.1)  # at different lines; whichever, the result is the same
    assert set(found.values()) == {b"".join(b"%d\n" % n for n in range(2000))}


async def test_followers_of_a_silent_program_leave_no_thread(client: Any, runtime: DockerRuntime) -> None:
    made = spec()
    await runtime.start(made)
    for _ in range(MAX_STREAMS + 4):
        with trio.move_on_after(0.1) as scope:
            async for _chunk in runtime.logs(made.lease, follow=True, tail_bytes=100):
                pass
        assert scope.cancelled_caught
    await until(lambda: runtime._engine._readers.borrowed_tokens == 0)


async def test_streams_of_one_lease_are_counted(client: Any, runtime: DockerRuntime) -> None:
    made, other = spec(), spec()
    await runtime.start(made)
    await runtime.start(other)

    async def follow() -> None:
        async for _chunk in runtime.logs(made.lease, follow=True, tail_bytes=0):
            pass

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_STREAMS):
            nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ContainerError, match="open"):
            await told(runtime, made.lease, "true")
        assert (await told(runtime, other.lease, "true"))[0] == 0
        nursery.cancel_scope.cancel()
    assert (await told(runtime, made.lease, "true"))[0] == 0


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_command_has_input_output_errors_and_a_code(client: Any, runtime: DockerRuntime) -> None:
    made = spec()
    await runtime.start(made)
    data = secrets.token_bytes(1 << 20)
    command = ("sh", "-c", "head -c 1048576; echo bad >&2; exit 7")
    assert await told(runtime, made.lease, "cat", stdin=b"hello") == (0, b"hello", b"")
    found, done = b"", False
    with trio.fail_after(60):
        async with runtime.exec(made.lease, command) as session, trio.open_nursery() as nursery:
            nursery.start_soon(session.send, data)
            async for channel, piece in session.output():
                done, found = done or channel == 2, found + piece * (channel == 1)
            assert await session.exit_code() == 7
    assert done
    assert found == data


async def test_the_first_output_is_never_lost(client: Any, runtime: DockerRuntime) -> None:
    made = spec()
    await runtime.start(made)
    for _ in range(10):
        assert await told(runtime, made.lease, "echo", "quick") == (0, b"quick\n", b"")


async def test_a_command_that_is_not_there(client: Any, runtime: DockerRuntime) -> None:
    made = spec()
    await runtime.start(made)
    code, out, err = await told(runtime, made.lease, "no-such-command")
    assert code in (126, 127)
    assert b"no-such-command" in out + err
    with pytest.raises(ContainerError):
        await told(runtime, "ab" * 32, "true")


async def test_a_command_and_its_children_are_killed_when_left(
    client: Any, runtime: DockerRuntime, node_id: str
) -> None:
    made = spec()
    await runtime.start(made)
    [container] = of_node(client, node_id)

    def commands() -> set[str]:
        return {row[-1] for row in container.top()["Processes"]}

    async with runtime.exec(made.lease, ("sh", "-c", "trap '' HUP TERM; sleep 2001 & sleep 2002")) as session:
        await until(lambda: {"sleep 2001", "sleep 2002"} <= commands())
        with trio.move_on_after(0.1):
            async for _item in session.output():
                pass
    await until(lambda: not any("200" in command for command in commands()), 5)
    assert "sleep 1000" in commands()
    with pytest.raises(ContainerError):
        await session.send(b"more")
    await until(lambda: runtime._engine._readers.borrowed_tokens == 0)


async def test_a_command_that_reads_nothing_can_be_left(client: Any, runtime: DockerRuntime) -> None:
    made = spec()
    await runtime.start(made)
    with trio.fail_after(30):
        async with runtime.exec(made.lease, FOREVER) as session:
            with trio.move_on_after(0.5) as scope:
                await session.send(bytes(64 << 20))
            assert scope.cancelled_caught
    await until(lambda: runtime._engine._readers.borrowed_tokens == 0)


async def test_a_command_ends_with_its_lease(client: Any, runtime: DockerRuntime) -> None:
    made = spec()
    await runtime.start(made)
    with trio.fail_after(30):
        async with runtime.exec(made.lease, ("sh", "-c", "echo ready; sleep 1000")) as session:
            channels = []
            async for channel, _data in session.output():
                channels.append(channel)
                await runtime.stop(made.lease, 0)
    assert channels == [1]
