"""Commands that talk to a node: what they ask it, what they print, their exit codes. The node is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kaisar_p2p.errors import OrderRefused
from kaisar_p2p.identity import ss58_encode
from protocols.interpreter import calls
from protocols.params import KAI
from tests.node.command_line import Invoke, command_line
from tests.node.conftest import ORDER, STRANGER

DEPLOYING = "Container is deploying..."
DEPLOYED = "Your Container has been deployed successfully."

READS = [
    ["status"], ["peers"], ["workers"], ["checks", "--limit", "5"], ["epochs"], ["wallet", "balance"],
    ["order", "list"], ["order", "list", "--all"], ["order", "show", "ababab"], ["order", "templates"],
    ["lease", "list"], ["rewards", "show"], ["worker", "show"],
]  # fmt: skip
WRITES = [
    ["wallet", "transfer", ss58_encode(STRANGER), "1.5"], ["order", "cancel", "ababab"], ["lease", "connect", "ababab"],
    ["rewards", "claim"], ["stake", "bond", "5"], ["stake", "unbond", "5"], ["stake", "withdraw"],
    ["licence", "buy", "2"], ["worker", "retire"],
    ["order", "place", "--template", "web", "--max-price", "1", "--no-wait"],
]  # fmt: skip


@pytest.fixture
def kaisar(served: Any, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command against the stand-in."""
    monkeypatch.setenv("KAISAR_HOME", str(served.directory))
    return command_line()


@pytest.mark.parametrize("command", READS + WRITES, ids=" ".join)
def test_json_is_one_document_and_text_has_no_tabs(kaisar: Invoke, command: list[str]) -> None:
    if command[:2] != ["order", "cancel"]:  # that can be done once
        plain = kaisar(*command)
        assert (plain.code, bool(plain.out.strip())) == (0, True), plain.err
        assert "\t" not in plain.out and "\x1b" not in plain.out
    answered = kaisar(*command, "--json")
    assert answered.code == 0
    assert isinstance(json.loads(answered.out), dict | list)


@pytest.mark.parametrize("command", READS + WRITES, ids=" ".join)
def test_when_the_node_is_gone(served: Any, kaisar: Invoke, command: list[str]) -> None:
    if command == ["order", "templates"]:
        return
    (served.directory / "api.json").unlink()
    refused = kaisar(*command, "--json")
    assert (refused.code, refused.out, "kaisar run" in refused.err) == (3, "", True)


def test_when_a_killed_node_left_its_address(served: Any, kaisar: Invoke) -> None:
    path = served.directory / "api.json"
    left = json.loads(path.read_text())
    path.write_text(json.dumps({**left, "url": "http://127.0.0.1:1"}))
    assert kaisar("status").code == 3
    path.write_text(json.dumps({**left, "token": "of-an-earlier-run"}))
    assert kaisar("status").code == 3


def test_a_refusal_of_the_ledger_fails_the_command(served: Any, kaisar: Invoke) -> None:
    served.node.call_reason = "the balance is too small"
    refused = kaisar("stake", "bond", "5")
    assert (refused.code, "the balance is too small" in refused.err, refused.out) == (1, True, "")
    assert served.node.calls == [calls.StakeBond(5 * KAI)]


def test_peers_cannot_write_on_the_terminal(served: Any, kaisar: Invoke) -> None:
    served.node.index.adverts.popitem()
    worker = next(iter(served.node.index.lease_events.values()))[0]
    object.__setattr__(worker, "text", "\x1b[2Jcleared\r\n")
    served.node.tunnels.refusal = "no\x1b[2J"
    for command in (["order", "show", "ababab"], ["lease", "logs", "ababab"]):
        result = kaisar(*command)
        assert "\x1b" not in result.out + result.err


# ── order place ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_order_is_followed_until_it_is_deployed(served: Any, kaisar: Invoke) -> None:
    served.node.store.add("lease", order=ORDER.hex(), state="AUTHORISED", text="")
    served.node.store.add("lease", order=ORDER.hex(), state="DEPLOYING", text=DEPLOYING)
    served.node.store.add("lease", order=ORDER.hex(), state="RUNNING", text=DEPLOYED)
    placed = kaisar("order", "place", "--template", "web", "--max-price", "1", "--minutes", "30", "--connect")
    assert placed.code == 0, placed.err
    lines = placed.out.splitlines()
    assert lines[1:] == [DEPLOYING, DEPLOYED, "Port 8080 is at http://127.0.0.1:40000"]
    [request] = served.node.placed
    assert (request.duration_s, request.workload.ports, request.resources.memory_mb) == (1800, (8080,), 256)


def test_json_of_a_followed_order_is_one_document(served: Any, kaisar: Invoke) -> None:
    served.node.store.add("lease", order=ORDER.hex(), state="RUNNING", text=DEPLOYED)
    placed = kaisar("order", "place", "--command", "python3 -m 'http server'", "--max-price", "0.5", "--json")
    assert json.loads(placed.out)["deployed"] is True
    assert DEPLOYED in placed.err
    assert served.node.placed[0].workload.command == ("python3", "-m", "http server")


def test_a_deployment_that_fails(served: Any, kaisar: Invoke) -> None:
    served.node.store.add("lease", order=ORDER.hex(), state="DEPLOYING", text=DEPLOYING)
    served.node.store.add(
        "lease", order=ORDER.hex(), state="ENDED", text="the program ended", outcome="failed", reason="exited"
    )
    failed = kaisar("order", "place", "--template", "web", "--max-price", "1")
    assert (failed.code, DEPLOYED in failed.out) == (1, False)
    assert "the program ended" in failed.err
    as_json = kaisar("order", "place", "--template", "web", "--max-price", "1", "--json")
    assert (as_json.code, json.loads(as_json.out)["deployed"]) == (1, False)


def test_all_options_of_an_order_arrive(served: Any, kaisar: Invoke) -> None:
    options = "--cpu 2 --memory 4GiB --disk 10GiB --gpu 1 --gpu-memory 24GiB --gpu-model H200 --image nginx:1.27"
    more = "--port 80 --port 81 --env A=1 --env B=x=y --hours 0.5 --max-price 2.5 --points 1 --no-wait"
    placed = kaisar("order", "place", *options.split(), *more.split())
    assert placed.code == 0, placed.err
    [request] = served.node.placed
    spec, workload = request.resources, request.workload
    assert (spec.cpu_cores, spec.memory_mb, spec.disk_mb, spec.gpus, spec.gpu_memory_mb) == (2, 4096, 10240, 1, 24576)
    assert (spec.gpu_model, workload.image, workload.ports, workload.command) == ("H200", "nginx:1.27", (80, 81), ())
    assert [(each.name, each.value) for each in workload.environment] == [("A", "1"), ("B", "x=y")]
    assert (request.duration_s, request.max_price_planck_per_hour, request.points_planck) == (1800, 25 * KAI // 10, KAI)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--max-price", "1"], 2, "say what to run"),
        (["--template", "web"], 2, "--max-price"),
        (["--template", "wep", "--max-price", "1"], 4, "did you mean web?"),
        (["--template", "web", "--max-price", "cheap"], 2, "is not an amount of KAI"),
        (["--template", "web", "--max-price", "1", "--memory", "2"], 2, "is not a size"),
        (["--template", "web", "--max-price", "1", "--hours", "1", "--minutes", "1"], 2, "give one of the two"),
        (["--template", "web", "--max-price", "1", "--connect", "--no-wait"], 2, "needs --wait"),
        (["--template", "web", "--max-price", "1", "--port", "0"], 2, "--port"),
        (["--template", "web", "--max-price", "1", "--hours", "0"], 2, "no time at all"),
        (["--template", "web", "--max-price", "1", "--cpu", "100000"], 2, "--cpu"),
        (["--template", "web", "--max-price", "1", "--env", "A"], 2, "NAME=value"),
        (["--command", "'open", "--max-price", "1"], 2, "No closing quotation"),
        (["--command", "true", "--max-price", "1", "--connect"], 2, "needs a port"),
    ],
)
def test_an_order_that_makes_no_sense_is_not_sent(
    served: Any, kaisar: Invoke, arguments: list[str], code: int, said: str
) -> None:
    refused = kaisar("order", "place", *arguments)
    assert (refused.code, said in " ".join(refused.err.split())) == (code, True), refused.err
    assert served.node.placed == []


@pytest.mark.parametrize("command", ["order show", "order cancel", "lease logs", "lease connect", "lease exec"])
@pytest.mark.parametrize("text", ["", "abc", "zzzzzz", "../status", "ababab?all=1", "ab" * 33])
def test_what_is_no_order_id_is_not_sent(served: Any, kaisar: Invoke, command: str, text: str) -> None:
    refused = kaisar(*command.split(), text, *(["ls"] if command == "lease exec" else []))
    assert (refused.code, "is not an order's id" in " ".join(refused.err.split())) == (2, True), refused.err


def test_an_order_that_nobody_can_serve(served: Any, kaisar: Invoke) -> None:
    served.node.refuse_order = OrderRefused("nobody can serve this order: none has 9 GPUs", hint="ask for less")
    refused = kaisar("order", "place", "--template", "web", "--max-price", "1", "--gpu", "9")
    assert refused.code == 1
    assert refused.err.splitlines()[1] == "hint: ask for less"


# ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_logs_are_printed_as_they_are(served: Any, kaisar: Invoke) -> None:
    assert kaisar("lease", "logs", "ababab", "-f").out == "first line\nsecond line\n"
    assert served.node.tunnels.opened[0].arguments == ("follow",)


@pytest.mark.parametrize(("exit_code", "expected"), [("0", 0), ("7", 7), ("-9", 137), ("x", 1)])
def test_a_command_inside_a_lease(served: Any, kaisar: Invoke, exit_code: str, expected: int) -> None:
    stream = served.node.tunnels.stream
    stream.frames = [b"\x01out\n", b"\x02err\n", b"\x03" + exit_code.encode()]
    done = kaisar("lease", "exec", "ababab", "--stdin", "--", "ls", "-l", "--color", text=b"input")
    assert (done.code, done.out) == (expected, "out\n")
    assert done.err.startswith("err\n")
    assert served.node.tunnels.opened[0].arguments == ("ls", "-l", "--color")
    assert stream.sent[0] == b"\0input"


def test_a_command_whose_connection_breaks(served: Any, kaisar: Invoke) -> None:
    served.node.tunnels.stream.frames = [b"\x01half"]
    broken = kaisar("lease", "exec", "ababab", "true")
    assert (broken.code, broken.out, "broke" in broken.err) == (1, "half", True)


# ── proofs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_proof_is_exported(served: Any, kaisar: Invoke, tmp_path: Path) -> None:
    assert kaisar("proof", "export").code == 1
    served.node.proof_text = '{"format": "x"}'
    assert kaisar("proof", "export").out == '{"format": "x"}\n'
    assert kaisar("proof", "export", "--output", str(tmp_path / "p.json")).code == 0
    assert (tmp_path / "p.json").read_text() == '{"format": "x"}'
    assert kaisar("proof", "export", "--output", str(tmp_path / "no" / "p.json")).code == 4


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "kaisar-reward-proof/1"}'])
def test_a_file_that_proves_nothing(kaisar: Invoke, tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    refused = kaisar("proof", "verify", str(tmp_path / "p.json"))
    assert (refused.code, refused.out, "does not hold" in refused.err) == (1, "", True)
    assert kaisar("proof", "verify", str(tmp_path / "none.json")).code == 4
