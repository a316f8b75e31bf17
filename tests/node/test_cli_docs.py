"""Nothing is undocumented: every command, option and route has a help text and its place in docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from node import cli
from node.api.app import STATUS_OF_ERRORS, routes_of
from node.config import setting_keys

EVERYWHERE = {"--help", "--install-completion", "--show-completion"}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command below a group, by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join(("kaisar", *path, name)), command


TREE = typer.main.get_command(cli.make_app())
COMMANDS = dict(commands(TREE))
ROUTES = [
    (method, route.path)
    for route in routes_of(SimpleNamespace())  # type: ignore[arg-type]
    for method in sorted((route.methods or set()) - {"HEAD"})
]


def sections(repository: Path) -> dict[str, str]:
    """The text of docs/cli.md below each command's heading."""
    parts = re.split(r"^#+ `(kaisar [^`]*)`\n", (repository / "docs" / "cli.md").read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_is_documented(repository: Path, name: str) -> None:
    text = sections(repository).get(name)
    assert text is not None, f"docs/cli.md has no heading `{name}`"
    for option in options(COMMANDS[name]):
        assert f"`{option}" in text, f"docs/cli.md does not say what {option} of `{name}` does"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_has_help_with_an_example(name: str) -> None:
    command = COMMANDS[name]
    assert command.help and len(command.help) > 20
    assert f"{name}" in command.help, "its help has no example"
    for parameter in command.params:
        if not set(parameter.opts) & EVERYWHERE:
            assert getattr(parameter, "help", None), f"{parameter.name} of `{name}` has no help"


def test_nothing_is_documented_that_does_not_exist(repository: Path) -> None:
    assert set(sections(repository)) <= set(COMMANDS)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_is_documented(repository: Path, method: str, path: str) -> None:
    assert f"### `{method} {path}`" in (repository / "docs" / "api.md").read_text("utf-8")


def test_no_route_is_documented_that_does_not_exist(repository: Path) -> None:
    found = re.findall(r"^### `(\w+) ([^`]+)`", (repository / "docs" / "api.md").read_text("utf-8"), flags=re.MULTILINE)
    assert {(method, path) for method, path in found} == set(ROUTES)


def test_every_status_of_an_error_is_documented(repository: Path) -> None:
    text = (repository / "docs" / "api.md").read_text("utf-8")
    for status in {status for _, status in STATUS_OF_ERRORS} | {401, 403, 405, 413, 500, 504}:
        assert f"| {status} |" in text


def test_every_setting_is_documented(repository: Path) -> None:
    text = (repository / "docs" / "cli.md").read_text("utf-8")
    for key in setting_keys():
        assert f"`{key}`" in text, f"docs/cli.md does not list the setting {key}"


def test_the_exit_codes_are_documented(repository: Path) -> None:
    text = (repository / "docs" / "cli.md").read_text("utf-8")
    for code in (0, 1, 2, 3, 4, 130):
        assert f"| {code} |" in text


def options(command: Any) -> list[str]:
    """The long names of its options."""
    names = [next(opt for opt in parameter.opts if opt.startswith("--")) for parameter in command.params
             if any(opt.startswith("--") for opt in parameter.opts)]  # fmt: skip
    return [name for name in names if name not in EVERYWHERE]
