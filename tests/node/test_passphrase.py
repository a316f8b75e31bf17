"""Where a passphrase comes from, and that no error quotes one."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kaisar_p2p.errors import ConfigError
from node.passphrase import read_passphrase


def answers(*texts: str) -> Callable[[str], str]:
    """A terminal that gives these answers, then its end."""
    queue = list(texts)

    def ask(_question: str) -> str:
        if not queue:
            raise EOFError
        return queue.pop(0)

    return ask


def test_a_file_wins_over_variables_over_the_terminal(tmp_path: Path) -> None:
    path, other = tmp_path / "one", tmp_path / "two"
    path.write_text("from the flag\n")
    other.write_text("from the variable's file")
    environ = {"KAISAR_PASSPHRASE": "from the variable"}
    assert read_passphrase(environ, passphrase_file=path, ask=answers("typed")) == "from the flag"
    assert read_passphrase(environ, ask=answers("typed")) == "from the variable"
    assert read_passphrase({"KAISAR_PASSPHRASE_FILE": str(other)}) == "from the variable's file"
    assert read_passphrase({}, ask=answers("typed")) == "typed"


@pytest.mark.parametrize(
    ("data", "passphrase"),
    [
        (b"a b\n", "a b"),
        (b"a b\r\n", "a b"),
        (b" a ", " a "),
        ("pass ü\n".encode(), "pass ü"),
        (b"x" * 1024 + b"\n", "x" * 1024),
    ],
)
def test_one_newline_at_a_files_end_does_not_count(tmp_path: Path, data: bytes, passphrase: str) -> None:
    (tmp_path / "p").write_bytes(data)
    assert read_passphrase({}, passphrase_file=tmp_path / "p") == passphrase


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"secret\nsecond", "control characters"),
        (b"secret\xff", "not UTF-8"),
        (b"secret" * 300, "over 1024 bytes"),
    ],
)
def test_an_unusable_file_is_named_and_not_quoted(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "p"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why) as caught:
        read_passphrase({}, passphrase_file=path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value).replace(str(path), "")
    assert caught.value.hint


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=f"{path} cannot be read"):
            read_passphrase({"KAISAR_PASSPHRASE_FILE": str(path)})


def test_two_variables_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match=r"both .* are set"):
        read_passphrase({"KAISAR_PASSPHRASE": "secret", "KAISAR_PASSPHRASE_FILE": "/x"})


@pytest.mark.parametrize("text", ["", "a\0b", "\udc80"])
def test_an_unusable_variable_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="KAISAR_PASSPHRASE"):
        read_passphrase({"KAISAR_PASSPHRASE": text})


def test_a_new_passphrase_is_asked_for_twice() -> None:
    assert read_passphrase({}, confirm=True, ask=answers("same", "same")) == "same"
    with pytest.raises(ConfigError, match="differ") as caught:
        read_passphrase({}, confirm=True, ask=answers("secret", "secrte"))
    assert "secret" not in str(caught.value)


def test_no_answer_is_told() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        read_passphrase({}, ask=answers(""))
    with pytest.raises(ConfigError, match="no passphrase was typed"):
        read_passphrase({}, ask=answers())


def test_without_a_terminal_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("secret\n"))
    with pytest.raises(ConfigError, match=r"no terminal .*--passphrase-file"):
        read_passphrase({})
