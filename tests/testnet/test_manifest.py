"""Manifests are read strictly: what is unknown or cannot work is named, and the rest is exactly what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import ConfigError
from node.config import ROLES
from protocols.params import PRESETS
from testnet.manifest import load_manifest, networks, parse_manifest, total_points_planck

SMALL = """
name = "a"
[[node]]
name = "b"
roles = ["bootstrap"]
"""


@pytest.mark.parametrize("name", networks())
def test_shipped_networks_can_be_read(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.name == name
    assert next(manifest.members())[1].roles[0] == "bootstrap"


def test_the_demo_is_the_swarm_that_was_promised() -> None:
    roles = [entry.roles for _, entry in load_manifest("demo").members()]
    count = {role: sum(role in each for each in roles) for role in ROLES}
    assert len(roles) == 12
    assert count == {"bootstrap": 1, "provider": 3, "checker": 7, "client": 1, "explorer": 0}


def test_defaults_and_own_settings() -> None:
    manifest = parse_manifest(
        SMALL
        + """
count = 2
[node.settings.provider]
price_kai_per_hour = "2"
[node.faults]
wrong_tiles = 3
[[allocation]]
account = "00000000000000000000000000000000000000000000000000000000000000aa"
balance_kai = "5"
points_kai = "1.5"
[settings.ledger]
poll_s = 0.3
[params]
epoch_slots = 9
"""
    )
    [entry] = manifest.nodes
    assert entry.names == ("b-1", "b-2")
    assert entry.faults == (("wrong_tiles", 3),)
    assert manifest.settings_of(entry) == {"ledger.poll_s": 0.3, "provider.price_kai_per_hour": "2"}
    assert manifest.network_params.epoch_slots == 9
    assert total_points_planck(manifest) == 15 * 10**17


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam = 'a'\n" + SMALL, r"unknown key 'nam' \(did you mean name\?\)"),
        (SMALL + "rolls = []", "did you mean roles"),
        (SMALL + "[node.faults]\nwrong_tile = 1", "unknown fault 'wrong_tile' .did you mean wrong_tiles"),
        (SMALL + "[node.settings.provider]\nprize_kai_per_hour = '1'", "did you mean price_kai_per_hour"),
        (SMALL + "[node.settings.porvider]\nprice_kai_per_hour = '1'", "did you mean provider"),
        (SMALL + "[node.settings]\nprovider = 1", "settings.provider must be a table"),
        (SMALL + "[node.settings.node]\nname = 'x'", "node.name is the swarm's own"),
        (SMALL + "[params]\nepoch_slot = 4", "unknown parameter 'epoch_slot'"),
        (SMALL + "[params]\nepoch_slots = 0", "epoch_slots must be at least 1"),
        (SMALL + "[params]\nepoch_slots = 'x'", "params must be a whole number"),
        (SMALL + "count = 0", "count must be a whole number from 1"),
        (SMALL + "count = true", "count must be a whole number from 1"),
        (SMALL + "balance_kai = 1000", "balance_kai must be an amount"),
        (SMALL + "start = false", "no node is a bootstrap"),
        (SMALL.replace("bootstrap", "checker"), "no node is a bootstrap"),
        (SMALL.replace("bootstrap", "boss"), "roles must be"),
        (SMALL.replace('"b"', '"B b"'), "name must be"),
        (SMALL.replace('"b"', '"../b"'), "name must be"),
        (SMALL + SMALL.split("\n", 2)[2], "two nodes are called b"),
        (SMALL + "[[allocation]]\naccount = 'zz'", "account must be 64 hex digits"),
        (SMALL + "[allocation]\naccount = 'zz'", "allocation must be a list"),
        ("preset = 'dem'\n" + SMALL, "preset must be one of"),
        ("name = 'a'", "every network has nodes"),
        ("node = 3", "node must be a list"),
        ("seed = -1\n" + SMALL, "seed must be"),
        ("name = ", "not valid TOML"),
        (SMALL + "count = 256\n" + SMALL.split("\n", 2)[2].replace('"b"', '"c"'), "257 nodes"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_manifest(text, "here")
    assert str(caught.value).startswith("here") or "parameter" in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_a_manifest_or_an_error_with_a_hint(text: str) -> None:
    try:
        parse_manifest(text)
    except ConfigError as error:
        assert error.message and error.hint


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    preset=st.sampled_from(sorted(PRESETS)),
    slots=st.integers(1, 1000),
)
def test_what_is_written_is_read(counts: list[int], preset: str, slots: int) -> None:
    nodes = "".join(
        f'[[node]]\nname = "n{i}"\nroles = ["{"bootstrap" if i == len(counts) - 1 else "checker"}"]\ncount = {count}\n'
        for i, count in enumerate(counts)
    )
    manifest = parse_manifest(f'name = "net"\npreset = "{preset}"\n[params]\nepoch_slots = {slots}\n{nodes}')
    members = list(manifest.members())
    assert len(members) == sum(counts)
    assert len({name for name, _ in members}) == sum(counts)
    bootstraps = [index for index, (_, entry) in enumerate(members) if "bootstrap" in entry.roles]
    assert bootstraps == list(range(counts[-1]))
    assert manifest.network_params == PRESETS[preset].with_overrides({"epoch_slots": slots})


def test_a_network_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no network 'nowhere'") as caught:
        load_manifest("nowhere")
    assert "small" in caught.value.hint
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    assert load_manifest(str(path)).name == "a"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_manifest(str(path))
    path.write_text("#" * 300_000)
    with pytest.raises(ConfigError, match="is over"):
        load_manifest(str(path))
