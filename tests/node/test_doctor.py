"""`kaisar doctor`: with and without a running node, every finding names its cause and the next step."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kaisar_p2p.mesh import Reachability
from node.api.address import ApiAddress, write_address
from node.commands import doctor as doctor_module
from node.config import Config
from node.diagnosis import machine
from node.diagnosis import network as checks
from node.diagnosis.finding import Findings
from tests.node.command_line import Invoke, command_line


@pytest.fixture
def kaisar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("KAISAR_HOME", str(tmp_path / "home"))
    return command_line()


@pytest.fixture
def made(kaisar: Invoke) -> Invoke:
    """A data directory of a provider that runs nothing."""
    assert kaisar(
        "init", "--no-passphrase", "--role", "provider", "--listen", "/ip4/127.0.0.1/tcp/0"
    ).code == 0  # fmt: skip
    return kaisar


def by_check(out: str) -> dict[str, dict[str, str]]:
    return {one["check"]: one for one in json.loads(out)["checks"]}


# -- without a running node -------------------------------------------------------------------------------------------


def test_without_a_data_directory_it_says_how_to_make_one(kaisar: Invoke) -> None:
    result = kaisar("doctor")
    assert result.code == 1
    assert result.out.startswith("fail  data directory") and "kaisar init" in result.out


def test_without_a_node_it_looks_at_the_machine(made: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    result = made("doctor", "--json")
    assert result.code == 0, result.out
    record = json.loads(result.out)
    assert (record["ok"], record["running"]) == (True, False)
    grades = {name: one["grade"] for name, one in by_check(result.out).items()}
    assert {name: grades[name] for name in ("configuration", "keys", "ledger", "port", "GPUs")} == dict.fromkeys(
        ("configuration", "keys", "ledger", "port", "GPUs"), "ok"
    )
    assert (grades["node"], grades["runtime"]) == ("warn", "warn")
    assert "kaisar run" in by_check(result.out)["node"]["hint"]


def test_the_text_has_a_line_for_each_check_and_its_hint_below(made: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    result = made("doctor")
    lines = result.out.splitlines()
    assert all(line.startswith(("ok    ", "warn  ", "fail  ", "      ")) for line in lines)
    assert "\x1b" not in result.out and "→ start one: kaisar run" in result.out
    assert "Asking the running node" in result.err


def test_a_broken_configuration_is_the_last_thing_looked_at(made: Invoke, tmp_path: Path) -> None:
    (tmp_path / "home" / "config.toml").write_text("[network.limits]\nconections = 1")
    result = made("doctor", "--json")
    assert result.code == 1
    found = by_check(result.out)["configuration"]
    assert (found["grade"], found["hint"]) == ("fail", "did you mean connections?")


def test_a_swarm_key_that_others_can_read_is_found(kaisar: Invoke, tmp_path: Path) -> None:
    assert kaisar("init", "--no-passphrase", "--private", "--listen", "/ip4/127.0.0.1/tcp/0").code == 0
    assert "swarm key" not in by_check(kaisar("doctor", "--json").out)
    (tmp_path / "home" / "swarm.key").chmod(0o644)
    found = by_check(kaisar("doctor", "--json").out)["swarm key"]
    assert found["grade"] == "warn" and found["hint"].startswith("chmod 600 ")


def test_missing_files_are_found(made: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    home = tmp_path / "home"
    (home / "keys" / "machine.json").unlink()
    (home / "ledger.sqlite").unlink()
    found = by_check(made("doctor", "--json").out)
    assert (found["keys"]["grade"], found["ledger"]["grade"]) == ("fail", "fail")
    assert found["keys"]["text"] and found["ledger"]["hint"]


def test_a_ledger_of_another_network_is_found(made: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    (tmp_path / "home" / "genesis.json").write_text("{}")
    found = by_check(made("doctor", "--json").out)["ledger"]
    assert found["grade"] == "fail" and "another network" in found["text"]


def test_a_port_that_is_taken_names_who_has_it(made: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("KAISAR_NETWORK_LISTEN", f"/ip4/127.0.0.1/tcp/{port}")
        result = made("doctor", "--json")
    found = by_check(result.out)["port"]
    assert (result.code, found["grade"]) == (1, "fail")
    assert f"port {port}: Address already in use" in found["text"] and found["hint"]


def test_a_clock_behind_the_ledger_is_told(made: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    monkeypatch.setattr(machine, "wall_clock_s", lambda: 1000.0)
    found = by_check(made("doctor", "--json").out)["clock"]
    assert found["grade"] == "warn" and "in the future" in found["text"]


def test_gpus_that_are_offered_and_missing_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kaisar_p2p.hardware.probe.probe", lambda _path: SimpleNamespace(gpus=()))
    monkeypatch.setattr(machine, "_DRIVER", tmp_path)
    findings = Findings()
    for gpus in (1, "auto", 0):
        machine.check_gpus(
            findings, Config(tmp_path).with_settings({"node.roles": ["provider"], "provider.gpus": gpus})
        )
    machine.check_gpus(findings, Config(tmp_path))  # of a client nothing is asked
    assert [finding.grade for finding in findings] == ["fail", "warn", "ok"]


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    findings = Findings()
    for free in (1, 500 << 20, 1 << 40):
        monkeypatch.setattr("shutil.disk_usage", lambda _path, free=free: SimpleNamespace(free=free))
        machine.check_directory(findings, tmp_path)
    assert [finding.grade for finding in findings] == ["fail", "warn", "ok"]


# -- with a running node ----------------------------------------------------------------------------------------------


@pytest.fixture
def beside(served: Any, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command beside a stand-in of a running node, whose files are not looked at."""
    monkeypatch.setenv("KAISAR_HOME", str(served.directory))
    for name in ("check_keys", "check_ledger"):
        monkeypatch.setattr(machine, name, lambda *_arguments: None)
    return command_line()


def test_a_node_that_is_well_is_said_to_be(beside: Invoke) -> None:
    result = beside("doctor", "--json")
    assert result.code == 0, result.out
    assert json.loads(result.out)["running"] is True
    found = by_check(result.out)
    assert {one["grade"] for one in found.values()} == {"ok"}
    assert found["reachable"]["text"].startswith("yes: 3 of 3 peers")
    assert (
        found["seen as"]["text"] == "203.0.113.7, behind address translation: it keeps ports, which suits hole punching"
    )


@pytest.mark.parametrize(
    ("relays", "advice"),
    [
        (("/ip4/198.51.100.1/tcp/1/p2p/a/p2p-circuit",) * 2, "or leave it: 2 relays carry connections meanwhile"),
        (("/ip4/198.51.100.1/tcp/1/p2p/a/p2p-circuit",), "or leave it: 1 relay carries connections meanwhile"),
        ((), "until then nobody can connect to this node: no relay was found either"),
    ],
)
def test_a_node_behind_a_router_learns_what_to_forward(
    served: Any, beside: Invoke, relays: tuple[str, ...], advice: str
) -> None:
    hidden = Reachability("private", (), "none of 4 peers that were asked to dial us back came through", 0.0)
    served.node.report = replace(served.node.report, reachability=hidden, relays=relays)
    found = by_check(beside("doctor", "--json").out)["reachable"]
    assert (found["grade"], found["text"].startswith("no: none of 4 peers")) == ("warn", True)
    assert found["hint"] == (
        "forward TCP port 4001 on your router to 192.168.1.20 port 4001, and let the firewall of this machine pass it;"
        f" {advice}"
    )


@pytest.mark.parametrize("listening", [(), ("/ip4/127.0.0.1/tcp/4001",)])
def test_a_node_that_listens_on_loopback_only_has_nothing_to_forward(
    served: Any, beside: Invoke, listening: tuple[str, ...]
) -> None:
    hidden = Reachability("private", (), "none of 1 peers that were asked to dial us back came through", 0.0)
    served.node.report = replace(served.node.report, reachability=hidden, listening=listening)
    hint = by_check(beside("doctor", "--json").out)["reachable"]["hint"]
    assert "network.listen" in hint and "forward" not in hint


@pytest.mark.parametrize(("checked_at", "grade"), [(None, "ok"), (0.0, "warn")])
def test_where_nobody_is_on_the_internet_reachability_is_no_warning(
    served: Any, beside: Invoke, checked_at: float | None, grade: str
) -> None:
    unknown = Reachability("unknown", (), "no peer could be asked yet", checked_at)
    served.node.report = replace(served.node.report, reachability=unknown)
    found = by_check(beside("doctor", "--json").out)["reachable"]
    assert found["grade"] == grade
    assert ("network without internet" in found["text"]) == (grade == "ok")


@pytest.mark.parametrize(("proven", "code", "grade"), [(True, 1, "fail"), (False, 0, "warn")])
def test_another_process_with_our_key_fails_unless_one_peer_claims_it(
    served: Any, beside: Invoke, proven: bool, code: int, grade: str
) -> None:
    said = "another process at 192.0.2.5 uses this key"
    served.node.report = replace(served.node.report, key_conflict=said, key_conflict_proven=proven)
    result = beside("doctor", "--json")
    assert (result.code, by_check(result.out)["machine key"]["grade"]) == (code, grade)


@pytest.mark.parametrize(("skew_s", "grade"), [(0.5, "ok"), (-11.0, "warn"), (3600.0, "fail"), (-3600.0, "fail")])
def test_a_clock_that_is_off_is_told(served: Any, beside: Invoke, skew_s: float, grade: str) -> None:
    reached = replace(served.node.report.reachability, clock_skew_s=skew_s)
    served.node.report = replace(served.node.report, reachability=reached)
    found = by_check(beside("doctor", "--json").out)["clock"]
    assert found["grade"] == grade
    assert ("ahead of" if skew_s > 0 else "behind") in found["text"]


def test_limits_that_were_hit_and_drops_are_named(served: Any, beside: Invoke) -> None:
    counters = served.node.mesh.statistics()
    counters.refused = {"connections": 3, "handshake": 9, "address": 1}
    counters.drops = {("outbound", "advert", 2): 5, ("outbound", "certificate", 0): 1, ("subscriber", "advert", 2): 2}
    found = by_check(beside("doctor", "--json").out)
    assert found["limits"]["text"] == (
        "connections or streams were refused: 3 for connections, 1 for connections_per_address"
    )
    assert found["gossip"]["text"] == "messages gave way to more important ones: 6 outbound, 2 subscriber"


def test_a_node_without_peers_fails_only_when_it_was_told_whom_to_meet(served: Any, beside: Invoke) -> None:
    answer = {"peers": {"connected": 0, "in": 0, "out": 0, "relayed": 0, "unreached": []}}
    findings = Findings()
    checks.check_peers(findings, answer, expected=False)
    checks.check_peers(findings, answer, expected=True)
    assert [finding.grade for finding in findings] == ["warn", "fail"]


@pytest.mark.parametrize(("connected", "grade"), [(0, "fail"), (2, "warn")])
def test_why_a_named_peer_is_not_reached_is_told(connected: int, grade: str) -> None:
    why = "peer abc cannot be reached at /ip4/192.0.2.1/tcp/4001: perhaps because it has another pre-shared key"
    answer = {"peers": {"connected": connected, "in": 0, "out": connected, "relayed": 0, "unreached": [why]}}
    findings = Findings()
    checks.check_peers(findings, answer, expected=False)
    assert (findings[0].grade, why in findings[0].text, "swarm key" in findings[0].hint) == (grade, True, True)


def test_a_private_swarm_tells_who_was_refused(served: Any, beside: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    served.node.mesh.statistics().refused = {"pre-shared key": 4}
    assert "swarm key" not in by_check(beside("doctor", "--json").out)
    monkeypatch.setattr(served.node.mesh.config, "pre_shared_key", bytes(32))
    found = by_check(beside("doctor", "--json").out)["swarm key"]
    assert found["text"] == "4 connections had another one or none, and were refused"


def test_a_node_that_is_stopped_is_a_failure_within_seconds(
    tmp_path: Path, made: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAISAR_PROVIDER_RUNTIME", "process")
    monkeypatch.setattr(doctor_module, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        write_address(tmp_path / "home", ApiAddress(f"http://127.0.0.1:{port}", "token", os.getpid()))
        result = made("doctor", "--json")
    found = by_check(result.out)
    assert (result.code, found["node"]["grade"], "port" in found) == (1, "fail", False)
    assert "stopped" in found["node"]["hint"]


def test_a_node_that_refuses_is_a_failure(beside: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise doctor_module.KaisarError("the node made a mistake", hint="its log says more")

    monkeypatch.setattr("node.commands.client.NodeClient.get", refuse)
    result = beside("doctor", "--json")
    assert (result.code, by_check(result.out)["node"]["grade"]) == (1, "fail")
