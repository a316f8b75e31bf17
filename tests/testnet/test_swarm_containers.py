"""A stopped swarm leaves no containers, and asks for no engine where none can be in use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kaisar_p2p.errors import RuntimeUnavailable
from kaisar_p2p.runtime import ContainerStatus
from testnet import containers
from testnet.containers import end_containers
from testnet.manifest import load_manifest, parse_manifest
from testnet.prepare import prepare

MANIFEST = """
name = "mixed"
[[node]]
name = "bootstrap"
roles = ["bootstrap"]
[[node]]
name = "auto"
roles = ["provider"]
[[node]]
name = "process"
roles = ["provider"]
[node.settings.provider]
runtime = "process"
"""


@dataclass
class FakeRuntime:
    """An engine with two containers of each node."""

    node_id: str
    stopped: list[tuple[str, str]] = field(default_factory=list)

    async def containers(self) -> list[ContainerStatus]:
        return [ContainerStatus(lease, "running", None, ()) for lease in ("aa", "bb")]

    async def stop(self, lease: str, grace_s: float) -> None:
        self.stopped.append((self.node_id, lease))


def test_containers_of_providers_that_may_use_docker_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(parse_manifest(MANIFEST), tmp_path / "net", time_ms=1)
    runtimes: list[FakeRuntime] = []

    async def select(preference: str, base: Path, node_id: str) -> FakeRuntime:
        assert preference == "docker"
        runtimes.append(FakeRuntime(node_id))
        return runtimes[-1]

    monkeypatch.setattr(containers, "select_runtime", select)
    assert end_containers(prepared) == 2
    [runtime] = runtimes
    assert runtime.node_id == prepared.members[1].key[:16]
    assert sorted(runtime.stopped) == [(runtime.node_id, "aa"), (runtime.node_id, "bb")]


def test_without_an_engine_there_is_nothing_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(parse_manifest(MANIFEST), tmp_path / "net", time_ms=1)

    async def select(preference: str, base: Path, node_id: str) -> FakeRuntime:
        raise RuntimeUnavailable("no Docker engine answers")

    monkeypatch.setattr(containers, "select_runtime", select)
    assert end_containers(prepared) == 0


def test_shipped_networks_never_look_for_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "select_runtime", None)
    assert end_containers(prepare(load_manifest("demo"), tmp_path / "net", time_ms=1)) == 0
