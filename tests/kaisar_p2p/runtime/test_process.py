"""The process runtime with real processes: start, ports, logs, exec, limits, stop, and what a restart finds."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import trio

from kaisar_p2p.errors import ContainerError
from kaisar_p2p.runtime import shim
from kaisar_p2p.runtime.interface import ContainerSpec, ContainerStatus
from kaisar_p2p.runtime.process import LOST, ProcessRuntime

LEASE = "ab" * 32
PYTHON = sys.executable


def spec(*command: str, lease: str = LEASE, ports: tuple[int, ...] = (), **limits: int) -> ContainerSpec:
    wanted = {"cpu_cores": 1, "memory_mb": 256, "disk_mb": 64, "gpus": 0} | limits
    return ContainerSpec(lease, "", command, (("GREETING", "hello"),), ports, **wanted)


def script(text: str, **others: object) -> ContainerSpec:
    return spec(PYTHON, "-u", "-c", text, **others)  # type: ignore[arg-type]


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[ProcessRuntime]:
    runtime = ProcessRuntime(tmp_path / "leases")
    yield runtime
    with trio.CancelScope(shield=True):
        for status in await runtime.containers():
            await runtime.stop(status.lease, 0)


async def ended(runtime: ProcessRuntime, lease: str = LEASE) -> int:
    with trio.fail_after(20):
        return await runtime.wait(lease)


async def output(runtime: ProcessRuntime, *, follow: bool = False, tail_bytes: int = 1 << 16) -> bytes:
    return b"".join([chunk async for chunk in runtime.logs(LEASE, follow=follow, tail_bytes=tail_bytes)])


async def logged(runtime: ProcessRuntime, words: bytes) -> bytes:
    """The log up to and with these words."""
    text = b""
    with trio.fail_after(20):
        async for chunk in runtime.logs(LEASE, follow=True, tail_bytes=1 << 16):
            text += chunk
            if words in text:
                return text
    raise AssertionError(f"{words!r} is not in {text!r}")


async def fetch(status: ContainerStatus, port: int) -> str:
    address = status.address(port)
    assert address is not None
    with trio.fail_after(20):
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                try:
                    return (await client.get(f"http://{address[0]}:{address[1]}/")).text
                except httpx.TransportError:
                    await trio.sleep(0.05)


async def until(true: Callable[[], bool]) -> None:
    """Other processes have no event to wait for."""
    while not true():  # noqa: ASYNC110
        await trio.sleep(0.02)


def alive(pid: int) -> bool:
    return shim.start_ticks(pid) >= 0


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_web_server_is_reached_on_its_mapped_port(runtime: ProcessRuntime) -> None:
    status = await runtime.start(
        spec(PYTHON, "-m", "http.server", "{port:8080}", "--bind", "127.0.0.1", ports=(8080, 9090))
    )
    assert status.phase == "running"
    assert status.address(8080) != status.address(9090)
    assert status.address(1) is None
    assert "Directory listing" in await fetch(status, 8080)
    assert b"GET /" in await logged(runtime, b"GET /")
    assert await runtime.containers() == [status]


async def test_start_is_idempotent_by_lease(runtime: ProcessRuntime) -> None:
    first = await runtime.start(spec("sleep", "60", ports=(80,)))
    assert await runtime.start(spec("sleep", "61", ports=(80,))) == first


async def test_the_environment_is_the_tenants_alone(runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_SECRET", "never")
    text = "import os, json; print(json.dumps([dict(os.environ), os.getcwd()]))"
    status = await runtime.start(script(text, ports=(80,)))
    assert await ended(runtime) == 0
    environment, directory = json.loads(await output(runtime))
    assert "NODE_SECRET" not in environment
    assert environment["GREETING"] == "hello"
    assert environment["HOME"] == directory == str(runtime._base / LEASE / "work")
    assert environment["KAISAR_PORT_80"] == environment["PORT"] == str(status.ports[0][1][1])


async def test_exit_codes_and_signals(runtime: ProcessRuntime) -> None:
    await runtime.start(script("raise SystemExit(7)"))
    assert await ended(runtime) == 7
    other = "cd" * 32
    await runtime.start(script("import os; os.kill(os.getpid(), 9)", lease=other))
    assert await ended(runtime, other) == 128 + 9
    status = await runtime.status(LEASE)
    assert status is not None
    assert (status.phase, status.exit_code) == ("exited", 7)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("/nonexistent/program",), "No such file"),
        (("nonexistent-program",), "No such file"),
        (("/",), "ermission denied"),
        ((), "no command"),
    ],
)
async def test_what_cannot_be_started_says_why_and_leaves_nothing(
    runtime: ProcessRuntime, command: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ContainerError, match=f"^start-failed: .*{why}"):
        await runtime.start(spec(*command))
    assert await runtime.status(LEASE) is None
    assert await runtime.containers() == []


async def test_images_and_strange_names_are_refused(runtime: ProcessRuntime) -> None:
    image = ContainerSpec(LEASE, "nginx", (), (), (), 1, 64, 64, 0)
    with pytest.raises(ContainerError, match=r"^image-not-found: "):
        await runtime.start(image)
    for lease in ("../../etc", "", "AB" * 32, "g" * 64):
        with pytest.raises(ContainerError, match="does not name a lease"):
            await runtime.status(lease)


async def test_a_program_whose_port_is_taken_fails_and_says_so(runtime: ProcessRuntime) -> None:
    status = await runtime.start(spec(PYTHON, "-m", "http.server", "{port:80}", "--bind", "127.0.0.1", ports=(80,)))
    await fetch(status, 80)
    taken = status.ports[0][1][1]
    other = "cd" * 32
    await runtime.start(spec(PYTHON, "-m", "http.server", str(taken), "--bind", "127.0.0.1", lease=other))
    assert await ended(runtime, other) == 1
    assert b"in use" in b"".join([chunk async for chunk in runtime.logs(other, follow=False, tail_bytes=4096)])


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_following_logs_ends_with_the_program(runtime: ProcessRuntime) -> None:
    text = "import sys, time; print('one'); time.sleep(.3); print('two', file=sys.stderr); time.sleep(.3); print('end')"
    await runtime.start(script(text))
    with trio.fail_after(20):
        assert await output(runtime, follow=True) == b"one\ntwo\nend\n"
    assert await output(runtime, tail_bytes=4) == b"end\n"


async def test_logs_are_bounded_and_keep_the_newest(runtime: ProcessRuntime) -> None:
    lines = 200_000
    text = f"import sys\nfor n in range({lines}): sys.stdout.write(f'line {{n:08}} ' + 'x' * 85 + chr(10))"
    await runtime.start(script(text))
    assert await ended(runtime) == 0
    sizes = [path.stat().st_size for path in (runtime._base / LEASE).glob("output.log*")]
    assert len(sizes) == 2
    assert sum(sizes) <= 2 * shim.LOG_BYTES
    tail = await output(runtime, tail_bytes=shim.LOG_BYTES + 1000)
    assert tail.endswith(f"line {lines - 1:08} ".encode() + b"x" * 85 + b"\n")
    assert len(tail) <= shim.LOG_BYTES + 1000


async def test_logs_of_a_lease_that_is_not_here(runtime: ProcessRuntime) -> None:
    with pytest.raises(ContainerError, match="not here"):
        await output(runtime)
    with pytest.raises(ContainerError, match="not here"):
        await ended(runtime)


# ── exec ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_exec_shares_place_and_environment(runtime: ProcessRuntime) -> None:
    await runtime.start(script("open('made', 'w').write('by the program'); import time; time.sleep(60)"))
    with trio.fail_after(20):
        await until(lambda: (runtime._base / LEASE / "work" / "made").exists())
        command = ("sh", "-c", "cat made; echo $GREETING >&2; cat; exit 3")
        async with runtime.exec(LEASE, command) as session:
            await session.send(b" and by you")
            await session.send_eof()
            said = {1: b"", 2: b""}
            async for channel, data in session.output():
                said[channel] += data
            assert await session.exit_code() == 3
    assert said == {1: b"by the program and by you", 2: b"hello\n"}


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [("no-such-program", 127, b"No such file"), ("./none", 127, b"No such file"), ("/etc", 126, b"Permission denied")],
)
async def test_a_command_that_cannot_be_run_is_told_as_a_shell_would(
    runtime: ProcessRuntime, program: str, code: int, said: bytes
) -> None:
    await runtime.start(spec("sleep", "60"))
    with trio.fail_after(20):
        async with runtime.exec(LEASE, (program, "argument")) as session:
            output = b"".join([data async for channel, data in session.output() if channel == 2])
            assert await session.exit_code() == code
    assert output.startswith(program.encode() + b": " + said)
    assert b"Traceback" not in output


async def test_leaving_exec_kills_the_command_and_what_it_started(runtime: ProcessRuntime) -> None:
    await runtime.start(spec("sleep", "60"))
    with trio.fail_after(20):
        async with runtime.exec(LEASE, ("sh", "-c", "sleep 50 & echo $!; wait")) as session:
            async for _, data in session.output():
                pid = int(data)
                break
            assert alive(pid)
        await until(lambda: not alive(pid))


async def test_an_error_inside_exec_comes_out_as_it_is(runtime: ProcessRuntime) -> None:
    await runtime.start(spec("sleep", "60"))
    with pytest.raises(ContainerError, match="mine"):
        async with runtime.exec(LEASE, ("cat",)):
            raise ContainerError("mine")
    with pytest.raises(ContainerError, match="does not run"):
        async with runtime.exec("cd" * 32, ("cat",)):
            pass


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_program_that_takes_too_much_memory_is_stopped(runtime: ProcessRuntime) -> None:
    text = "import time\nkept = []\nwhile True:\n    kept.append(bytearray(8 << 20)); time.sleep(.02)"
    await runtime.start(script(text, memory_mb=96))
    assert await ended(runtime) == 128 + 9
    assert b"more than 96 MB of memory" in await output(runtime)


async def test_one_large_allocation_is_refused_at_once(runtime: ProcessRuntime) -> None:
    await runtime.start(script("bytearray(1 << 30)", memory_mb=96))
    assert await ended(runtime) == 1
    assert b"MemoryError" in await output(runtime)


async def test_a_file_cannot_grow_beyond_the_disk_limit(runtime: ProcessRuntime) -> None:
    text = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); open('f', 'wb').write(bytes(20 << 20))"
    await runtime.start(script(text, disk_mb=16))
    assert await ended(runtime) == 1
    assert b"File too large" in await output(runtime)


async def test_many_processes_are_stopped(runtime: ProcessRuntime) -> None:
    await runtime.start(spec("sh", "-c", "for i in $(seq 300); do sleep 60 & done; wait"))
    assert await ended(runtime) == 128 + 9
    assert b"processes" in await output(runtime)


# ── stop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_stop_asks_first_and_removes_everything(runtime: ProcessRuntime) -> None:
    text = (
        "import signal, sys, time\n"
        "def bye(*_): open('../../asked', 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, bye); print('up'); time.sleep(60)"
    )
    await runtime.start(script(text))
    await logged(runtime, b"up")
    with trio.fail_after(20):
        await runtime.stop(LEASE, 10)
    assert (runtime._base / "asked").exists()
    assert await runtime.status(LEASE) is None
    assert not (runtime._base / LEASE).exists()
    await runtime.stop(LEASE, 1)


async def test_stop_kills_whoever_ignores_it_and_grandchildren_in_sessions_of_their_own(
    runtime: ProcessRuntime,
) -> None:
    text = (
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['setsid', 'sh', '-c', 'trap \"\" TERM; sleep 77 & wait'])\n"
        "print(os.getpid(), child.pid, 'up'); time.sleep(60)"
    )
    await runtime.start(script(text))
    own, child = map(int, (await logged(runtime, b"up")).split()[:2])
    grandchildren = shim.descendants(child)
    with trio.fail_after(20):
        await runtime.stop(LEASE, 0.2)
    assert not any(map(alive, (own, child, *grandchildren)))


async def test_what_a_program_leaves_behind_ends_with_it(runtime: ProcessRuntime) -> None:
    await runtime.start(spec("sh", "-c", "setsid sleep 78 & echo $!; sleep 0.2"))
    assert await ended(runtime) == 0
    assert not alive(int(await output(runtime)))


async def test_children_are_found_on_kernels_that_do_not_list_them() -> None:
    child = await trio.lowlevel.open_process(["sleep", "60"])
    try:
        assert child.pid in shim.children(os.getpid())
        assert set(shim.children_by_parent(os.getpid())) == set(shim.children(os.getpid()))
    finally:
        child.kill()
        await child.wait()


# ── a restart of the node ────────────────────────────────────────────────────────────────────────────────────────────


async def test_ports_keep_the_order_in_which_they_were_asked_for(runtime: ProcessRuntime) -> None:
    """The first one is health-checked, also by a node that finds the program again."""
    started = await runtime.start(spec("sleep", "100", ports=(9000, 80)))
    assert [port for port, _ in started.ports] == [9000, 80]
    (found,) = await ProcessRuntime(runtime._base).containers()
    assert found.ports == started.ports
    await runtime.stop(LEASE, 0.1)


async def test_a_new_runtime_finds_running_and_ended_programs_again(runtime: ProcessRuntime) -> None:
    running = await runtime.start(spec(PYTHON, "-m", "http.server", "{port:80}", "--bind", "127.0.0.1", ports=(80,)))
    other = "cd" * 32
    await runtime.start(script("raise SystemExit(5)", lease=other))
    await ended(runtime, other)
    again = ProcessRuntime(runtime._base)
    assert {status.lease: status.phase for status in await again.containers()} == {LEASE: "running", other: "exited"}
    assert "Directory listing" in await fetch(running, 80)
    assert await again.start(spec("sleep", "1")) == running
    assert await ended(again, other) == 5
    with trio.fail_after(20):
        await again.stop(LEASE, 0.1)
    assert await again.status(LEASE) is None


async def test_a_stranger_with_a_recycled_pid_is_left_alone(runtime: ProcessRuntime) -> None:
    await runtime.start(spec("sleep", "60"))
    told = runtime._base / LEASE / "shim.json"
    keeper = json.loads(told.read_text())
    stranger = await trio.lowlevel.open_process(["sleep", "60"])
    while shim.start_ticks(stranger.pid) == keeper["started"]:  # a recycled pid is never that young
        stranger.kill()
        await stranger.wait()
        stranger = await trio.lowlevel.open_process(["sleep", "60"])
    try:
        told.write_text(json.dumps(keeper | {"pid": stranger.pid}))
        status = await runtime.status(LEASE)
        assert status is not None
        assert (status.phase, status.exit_code) == ("exited", LOST)
        await runtime.stop(LEASE, 0.1)
        assert stranger.poll() is None
    finally:
        os.kill(keeper["pid"], signal.SIGKILL)
        stranger.kill()
        await stranger.wait()


async def test_a_killed_keeper_takes_its_program_along(runtime: ProcessRuntime) -> None:
    await runtime.start(spec("sleep", "60"))
    keeper = json.loads((runtime._base / LEASE / "shim.json").read_text())
    os.kill(keeper["pid"], signal.SIGKILL)
    assert await ended(runtime) == LOST
    with trio.fail_after(20):
        await until(lambda: not alive(keeper["program"]))


async def test_a_start_that_was_interrupted_is_done_again(runtime: ProcessRuntime) -> None:
    (runtime._base / LEASE / "work").mkdir(parents=True)
    status = await runtime.status(LEASE)
    assert status is not None
    assert status.phase == "created"
    assert (await runtime.start(spec("sleep", "60"))).phase == "running"
