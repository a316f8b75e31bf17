"""The life of a swarm's processes, with stubs in place of nodes: what matters here is that none is lost or left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kaisar_p2p.errors import DataDirectoryError
from testnet import processes
from testnet.manifest import parse_manifest
from testnet.prepare import Prepared, prepare
from testnet.processes import MARK, Running, node_environment, peak_memory_bytes, strays, tail
from testnet.swarm import STATE_FILE, Swarm, SwarmError, swarm_lock

STUB = Path(__file__).with_name("stub_node.py")
MANIFEST = """
name = "stubs"
[[node]]
name = "bootstrap"
roles = ["bootstrap"]
[[node]]
name = "checker"
roles = ["checker"]
count = 2
[[node]]
name = "late"
roles = ["client"]
start = false
"""


def quiet(name: str, what: str) -> None:
    pass


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setattr(processes, "node_command", lambda directory: [sys.executable, str(STUB), str(directory)])
    monkeypatch.setenv("PYTHONPATH", str(STUB.parents[2]))
    return prepare(parse_manifest(MANIFEST), tmp_path / "swarm", time_ms=1)


@pytest.fixture
def swarm(prepared: Prepared) -> Iterator[Swarm]:
    swarm = Swarm(prepared)
    yield swarm
    swarm.down(grace_s=1)
    assert not list(strays(prepared.directory))


def manner(swarm: Swarm, name: str, text: str) -> None:
    (swarm.prepared.data_directory(name) / "stub").write_text(text)


def test_up_status_down(swarm: Swarm) -> None:
    seen: list[tuple[str, str]] = []
    assert swarm.up(lambda name, what: seen.append((name, what))) == ["bootstrap", "checker-1", "checker-2"]
    assert seen[0] == ("bootstrap", "starting")
    assert {name for name, what in seen if what == "ready"} == {"bootstrap", "checker-1", "checker-2"}
    states = {each.name: (each.state, each.peers, each.block) for each in swarm.status()}
    assert states == {
        "bootstrap": ("running", 3, 7),
        "checker-1": ("running", 3, 7),
        "checker-2": ("running", 3, 7),
        "late": ("stopped", None, None),
    }
    pids = [each.pid for each in swarm.running().values()]
    assert swarm.down() == []
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not (swarm.directory / STATE_FILE).exists()
    assert swarm.down() == []


def test_another_shell_finds_the_same_swarm(swarm: Swarm) -> None:
    swarm.up(quiet)
    other = Swarm.open(swarm.directory)
    assert other.running() == swarm.running()
    assert other.up(quiet) == []
    other.down()
    assert not swarm.running()


def test_up_resumes_what_is_missing(swarm: Swarm) -> None:
    swarm.up(quiet)
    before = swarm.running()
    swarm.kill("checker-2")
    assert swarm.up(quiet) == ["checker-2"]
    after = swarm.running()
    assert after["bootstrap"] == before["bootstrap"]
    assert after["checker-2"].pid != before["checker-2"].pid


def test_a_node_that_dies_at_the_start_is_named_with_its_last_words_and_all_stop(swarm: Swarm) -> None:
    manner(swarm, "checker-1", "die")
    with pytest.raises(SwarmError, match=r"checker-1 ended with exit code 7(.|\n)*told to die") as caught:
        swarm.up(quiet)
    assert str(swarm.prepared.log_path("checker-1")) in caught.value.hint
    assert not swarm.running()


def test_a_node_that_never_answers_is_named_and_all_stop(swarm: Swarm) -> None:
    manner(swarm, "checker-2", "mute")
    with pytest.raises(SwarmError, match="checker-2 does not answer"):
        swarm.up(quiet, timeout_s=1.5)
    assert not swarm.running()


def test_ctrl_c_while_starting_stops_all(swarm: Swarm) -> None:
    def interrupted(name: str, what: str) -> None:
        if what == "ready":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swarm.up(interrupted)
    assert not swarm.running()
    assert not list(strays(swarm.directory))


def test_a_node_that_dies_later_is_told(swarm: Swarm) -> None:
    swarm.up(quiet)
    swarm.check_alive()
    os.kill(swarm.running()["checker-1"].pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(swarm._read()["checker-1"].pid)], timeout=5)
    with pytest.raises(SwarmError, match="checker-1"):
        swarm.check_alive()
    assert {each.name: each.state for each in swarm.status()}["checker-1"] == "died"


def test_a_node_that_ignores_sigterm_is_killed_and_named(swarm: Swarm) -> None:
    manner(swarm, "checker-1", "deaf")
    swarm.up(quiet)
    assert swarm.down(grace_s=0.5) == ["checker-1"]
    assert not swarm.running()


def test_down_ends_leases_that_outlived_their_node(swarm: Swarm) -> None:
    manner(swarm, "checker-1", "lease")
    swarm.up(quiet)
    swarm.stop_node("checker-1")
    assert "checker-1" not in swarm.running()
    [lease] = [each for each in strays(swarm.directory) if Path(each.cwd()).name == "one"]
    swarm.down()
    assert Running(lease.pid, lease.create_time()).process() is None


def test_start_and_stop_one(swarm: Swarm) -> None:
    swarm.up(quiet)
    running = swarm.start("late")
    assert swarm.running()["late"] == running
    with pytest.raises(SwarmError, match="runs already"):
        swarm.start("late")
    swarm.stop_node("late")
    assert "late" not in swarm.running()
    with pytest.raises(SwarmError, match="does not run"):
        swarm.kill("late")
    for stop in (swarm.stop_node, swarm.kill):
        with pytest.raises(SwarmError, match="no node is called 'nobody'"):
            stop("nobody")
    with pytest.raises(SwarmError, match="no node is called 'nobody'") as caught:
        swarm.start("nobody")
    assert "checker-2" in caught.value.hint


def test_a_recycled_process_id_is_not_ours(swarm: Swarm) -> None:
    stranger = Running(os.getpid(), psutil.Process().create_time() - 100)
    assert stranger.process() is None
    swarm._write({"checker-1": stranger})
    assert swarm.running() == {}
    assert swarm.down() == []
    assert psutil.pid_exists(os.getpid())


def test_two_commands_do_not_work_on_one_swarm(swarm: Swarm) -> None:
    with swarm_lock(swarm.directory):
        with pytest.raises(SwarmError, match=f"process {os.getpid()}"):
            swarm.up(quiet)


def test_an_address_file_of_a_killed_run_does_not_count_as_an_answer(swarm: Swarm) -> None:
    swarm.up(quiet)
    swarm.kill("checker-1")
    assert (swarm.prepared.data_directory("checker-1") / "api.json").exists()
    manner(swarm, "checker-1", "mute")
    with pytest.raises(SwarmError, match="checker-1 does not answer"):
        swarm.up(quiet, timeout_s=1)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"a": {"pid": 1}}', '{"a": {"pid": "x", "started_s": 1}}']
)
def test_a_damaged_state_file_is_told(swarm: Swarm, text: str) -> None:
    path = swarm.directory / STATE_FILE
    path.write_text(text)
    with pytest.raises(DataDirectoryError, match=STATE_FILE):
        swarm.running()
    path.unlink()


def test_the_environment_of_a_node(tmp_path: Path) -> None:
    environ = node_environment({"PATH": "/bin", "KAISAR_API_PORT": "1", "KAISAR_PASSPHRASE": "x"}, tmp_path)
    assert environ["PATH"] == "/bin"
    assert environ[MARK] == str(tmp_path)
    assert {name for name in environ if name.startswith("KAISAR_")} == {MARK}
    assert environ["OPENBLAS_NUM_THREADS"] == environ["OMP_NUM_THREADS"] == "1"


def test_peak_memory_of_this_process() -> None:
    peak = peak_memory_bytes(os.getpid())
    assert peak is not None and peak > 1_000_000
    assert peak_memory_bytes(2**22 + 1) is None


def test_tail_begins_with_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n" + "x" * 50 + "\nlast\n")
    assert tail(log, 20) == "last\n"
    assert tail(log, 4000).startswith("first")
    assert tail(tmp_path / "none") == ""


def test_a_shell_in_a_lease_directory_is_not_a_stray(tmp_path: Path, start_on_terminal: Callable[[Path], int]) -> None:
    lease = tmp_path / "nodes" / "provider" / "leases" / "one"
    lease.mkdir(parents=True)
    pid = start_on_terminal(lease)
    assert Path(psutil.Process(pid).cwd()) == lease
    assert pid not in [each.pid for each in strays(tmp_path)]


@pytest.fixture
def start_on_terminal() -> Iterator[Callable[[Path], int]]:
    """Start a process whose controlling terminal is a new one."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        master, slave = os.openpty()
    except OSError as error:
        pytest.skip(f"this system has no pseudo terminals: {error}")

    def start(cwd: Path) -> int:
        code = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); print('up', flush=True); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=cwd, stdin=slave, stdout=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()
    os.close(master)
    os.close(slave)


def test_the_state_file_says_who_runs(swarm: Swarm) -> None:
    swarm.up(quiet)
    plain = json.loads((swarm.directory / STATE_FILE).read_text())
    assert {name: each["pid"] for name, each in plain.items()} == {
        name: each.pid for name, each in swarm.running().items()
    }
