"""Workloads by name: each TOML file beside this module is one template (`kaisar order templates`)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from kaisar_p2p.errors import ConfigError
from node.settings import closest


@dataclass(frozen=True)
class Template:
    """A workload with sensible resources. `image` is empty for a bare command, which only the process runtime runs.

    In `command`, the worker's runtime puts its Python interpreter for `{python}`, and for `{host}` and `{port:8080}`
    the address and the port on which the program has to listen for its port 8080 to be reached.
    """

    name: str
    title: str
    image: str
    command: tuple[str, ...]
    ports: tuple[int, ...]
    cpu_cores: int
    memory_mb: int
    disk_mb: int
    gpus: int = 0


def templates() -> list[Template]:
    """All templates by name."""
    files = (entry for entry in resources.files(__name__).iterdir() if entry.name.endswith(".toml"))
    return [_parse(file.name, file.read_text("utf-8")) for file in sorted(files, key=lambda entry: entry.name)]


def template(name: str) -> Template:
    """The template of that name; ConfigError names the closest one there is."""
    known = {each.name: each for each in templates()}
    if name not in known:
        like = closest(name, known)
        hint = f"did you mean {like}?" if like else "`kaisar order templates` lists them"
        raise ConfigError(f"there is no template {name[:40]!r}", hint=hint)
    return known[name]


def _parse(file: str, text: str) -> Template:
    plain: dict[str, Any] = tomllib.loads(text)
    command, ports = tuple(plain.pop("command")), tuple(plain.pop("ports"))
    return Template(name=file.removesuffix(".toml"), command=command, ports=ports, **plain)
