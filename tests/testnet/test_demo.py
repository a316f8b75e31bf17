"""The demo around its steps: what it prints, how it ends, and that an unobserved step is never a success."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kaisar_p2p.errors import DataDirectoryError, KaisarError
from testnet import demo as demo_module
from testnet.demo import run_demo
from testnet.demo_context import Demo
from testnet.demo_rewards import _with_one_digit_changed
from testnet.demo_view import DemoView
from testnet.observer import LedgerObserver
from testnet.processes import Running
from testnet.swarm import Swarm, SwarmError

Step = Callable[[Demo], None]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Swarms that were told to stop."""
    calls: list[Path] = []

    def down(self: Swarm, **_: Any) -> list[str]:
        calls.append(self.directory)
        return []

    monkeypatch.setattr(Swarm, "down", down)
    monkeypatch.setattr(demo_module, "_work_ms", lambda demo: 10.0)
    return calls


def steps(monkeypatch: pytest.MonkeyPatch, *functions: Step) -> None:
    named = tuple((f"step{number}", f"Step {number}", step) for number, step in enumerate(functions))
    monkeypatch.setattr(demo_module, "STEPS", (*named, ("stop", "Everything stops", lambda demo: None)))


def seen(demo: Demo) -> None:
    demo.view.line("seen")


def unseen(demo: Demo) -> None:
    raise SwarmError("not seen within 1 s: a unicorn", hint="look in the forest")


def broken(demo: Demo) -> None:
    raise KaisarError("it broke")


def interrupted(demo: Demo) -> None:
    raise KeyboardInterrupt


def test_success_ends_with_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    steps(monkeypatch, seen, seen)
    assert run_demo("small", None, keep=False, as_json=True) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["ok"] is True
    assert set(figures["steps_s"]) == {"step0", "step1", "stop"}
    assert sum("seen" in line for line in lines) == 2
    assert list((tmp_path / "kaisar").iterdir()) == []


@pytest.mark.parametrize("step", [unseen, broken])
def test_a_step_that_was_not_observed_fails_the_demo_and_stops_everything(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: list[Path],
    capsys: pytest.CaptureFixture[str],
    step: Step,
) -> None:
    steps(monkeypatch, seen, step, seen)
    assert run_demo("small", tmp_path / "net", keep=True, as_json=True) == 1
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert (figures["ok"], figures["failed_step"]) == (False, "step1")
    assert output.count("   seen") == 1
    assert stopped == [tmp_path / "net"]
    assert str(tmp_path / "net") in output
    if step is unseen:
        assert "a unicorn" in output and "look in the forest" in output


def test_ctrl_c_stops_everything_and_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[Path]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    steps(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo("small", None, keep=False, as_json=False)
    assert len(stopped) == 1
    assert list((tmp_path / "kaisar").iterdir()) == []


def test_a_state_directory_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataDirectoryError) as caught:
        run_demo("small", None, keep=False, as_json=False)
    assert "--directory" in caught.value.hint


def test_keep_leaves_it_running_and_says_how_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    steps(monkeypatch, seen)
    assert run_demo("small", tmp_path / "net", keep=True, as_json=False) == 0
    output = capsys.readouterr().out
    assert stopped == []
    assert f"kaisar testnet down --directory {tmp_path / 'net'}" in output
    assert f"export KAISAR_HOME={tmp_path / 'net' / 'nodes' / 'client'}" in output


def test_the_lines_to_copy_name_a_command_that_any_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "kaisar").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["here/kaisar", "demo"])
    for path, command in (
        ("", tmp_path / "here" / "kaisar"),
        ("other", tmp_path / "here" / "kaisar"),
        ("here", "kaisar"),
    ):
        monkeypatch.setenv("PATH", str(tmp_path / path) if path else "/nowhere")
        assert demo_module._command() == str(command)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
    assert demo_module._command() == "kaisar"


def test_figures_come_from_the_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[Path],
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    delays = {name: 1000 * number for number, name in enumerate("abcde", start=1)}
    views = [{"slot": 0, "received_ms": 50_000 + delay, "certificate_bytes": 400} for delay in delays.values()]
    monkeypatch.setattr(Demo, "get", lambda self, name, path, **query: views)
    monkeypatch.setattr(LedgerObserver, "slot_started_ms", lambda self, slot: 50_000)
    steps(monkeypatch, seen)
    run_demo("small", tmp_path / "net", keep=False, as_json=True)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["slot_to_certificate_ms"] == {"p50": 3000.0, "p95": 4800.0, "count": 5}
    assert figures["slot_to_certificate_minus_work_ms"] == {"p50": 2990.0, "p95": 4790.0, "count": 5}
    assert figures["checks"] == {"certificates": 5, "certificate_bytes": 400}


def test_waiting_names_what_is_missing_and_notices_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def dead(demo: Demo) -> None:
        demo.swarm._write({"checker-1": Running(2**22 + 1, 1.0)})
        demo.until("anything", lambda: False, 30)

    steps(monkeypatch, lambda demo: demo.until("a green moon", lambda: False, 0))
    assert run_demo("small", tmp_path / "one", keep=False, as_json=False) == 1
    assert "not seen within 0 s: a green moon" in capsys.readouterr().out
    steps(monkeypatch, dead)
    assert run_demo("small", tmp_path / "two", keep=False, as_json=False) == 1
    assert "checker-1 has died" in capsys.readouterr().out


def test_the_view_prints_plain_lines_when_piped_and_exact_texts_alone() -> None:
    out = io.StringIO()
    view = DemoView(Console(file=out, width=40))
    view.heading("A step")
    view.exactly("Container is deploying...")
    view.line("[not markup] " + "x" * 60)
    with view.registrations():
        view.registration({"provider": {1: "machine"}}, "provider", 1)
    lines = out.getvalue().splitlines()
    assert lines[1] == "Container is deploying..."
    assert lines[2] == "   [not markup] " + "x" * 60
    assert lines[3] == "   provider   1/10 register: machine"
    assert "\x1b" not in out.getvalue()


def test_the_view_draws_a_table_on_a_terminal() -> None:
    out = io.StringIO()
    view = DemoView(Console(file=out, force_terminal=True, width=100))
    with view.registrations():
        view.registration({"provider-1": {1: "machine [x]"}, "provider-2": {}}, "provider-1", 1)
    assert "machine [x]" in out.getvalue()
    assert "10 registered" in out.getvalue()


def test_one_digit_is_changed() -> None:
    text = json.dumps({"format": "x", "hex": "00ff" * 20, "short": "ab"})
    changed = _with_one_digit_changed(text)
    assert len(changed) == len(text)
    assert sum(one != other for one, other in zip(text, changed, strict=True)) == 1
    assert json.loads(changed)["short"] == "ab"
