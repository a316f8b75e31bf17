"""`kaisar run` as a real process: it becomes ready, answers, refuses a second one, and ends cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_S = 60


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "node.cli", *arguments]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("KAISAR_HOME", str(home))
    init = command("init", "--no-passphrase", "--listen", "/ip4/127.0.0.1/tcp/0")
    subprocess.run(init, check=True, capture_output=True, timeout=LIMIT_S)
    return home


@pytest.fixture
def node(home: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A node that is ready: it has printed its line."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command("run", "--role", "client", "--log-json"), stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("client ") and " is ready at /ip4/127.0.0.1/tcp/" in line, (tmp_path / "log").read_text()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_node_runs_until_it_is_told_to_stop(
    node: subprocess.Popen[str], home: Path, tmp_path: Path, how: signal.Signals
) -> None:
    answer = subprocess.run(command("status", "--json"), capture_output=True, text=True, timeout=LIMIT_S)
    status = json.loads(answer.stdout)
    assert (status["pid"], status["data_directory"]) == (node.pid, str(home))
    assert status["balance_kai"] == "1000000"

    second = subprocess.run(command("run"), capture_output=True, text=True, timeout=LIMIT_S)
    assert (second.returncode, second.stdout) == (4, "")
    assert f"in use by process {node.pid}" in second.stderr

    token = json.loads((home / "api.json").read_text())["token"]
    node.send_signal(how)
    assert node.wait(LIMIT_S) == 0
    assert not (home / "api.json").exists()
    log = (tmp_path / "log").read_text()
    assert all(json.loads(line)["message"] for line in log.splitlines())
    assert token not in log and "Traceback" not in log
    after = subprocess.run(command("status"), capture_output=True, text=True, timeout=LIMIT_S)
    assert after.returncode == 3


def test_a_port_that_is_taken_ends_the_start(node: subprocess.Popen[str], home: Path, tmp_path: Path) -> None:
    taken = json.loads((home / "api.json").read_text())["url"].rpartition(":")[2]
    other = {**os.environ, "KAISAR_HOME": str(tmp_path / "other")}
    init = command("init", "--no-passphrase", "--listen", "/ip4/127.0.0.1/tcp/0")
    subprocess.run(init, check=True, capture_output=True, timeout=LIMIT_S, env=other)
    failed = subprocess.run(
        command("run", "--api-port", taken), capture_output=True, text=True, timeout=LIMIT_S, env=other
    )
    assert failed.returncode == 1
    assert f"port {taken}" in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "other" / "api.json").exists()


def test_the_ledger_of_another_network_is_refused(home: Path, tmp_path: Path) -> None:
    other = {**os.environ, "KAISAR_HOME": str(tmp_path / "other")}
    init = command("init", "--no-passphrase", "--network", "testnet")
    subprocess.run(init, check=True, capture_output=True, timeout=LIMIT_S, env=other)
    (tmp_path / "other" / "ledger.sqlite").replace(home / "ledger.sqlite")
    failed = subprocess.run(command("run"), capture_output=True, text=True, timeout=LIMIT_S)
    assert (failed.returncode, failed.stdout) == (4, "")
    assert "ledger.sqlite is the ledger of another network than" in failed.stderr and "Traceback" not in failed.stderr
    assert not (home / "api.json").exists()

    (home / "genesis.json").unlink()
    failed = subprocess.run(command("run"), capture_output=True, text=True, timeout=LIMIT_S)
    assert failed.returncode == 4
    assert "genesis.json cannot be read: No such file" in failed.stderr
