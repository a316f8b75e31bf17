"""`docs/mesh.md` says what the code does: every limit with its default, every protocol, points, names of files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from kaisar_p2p.mesh import MeshLimits
from kaisar_p2p.mesh.gossip.router import DEGREE, DEGREE_HIGH, DEGREE_LOW, MAX_TOPICS_PER_PEER
from kaisar_p2p.mesh.guard import reputation

ROW = re.compile(r"^\| `(\w+)` \| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
DEFAULTS = {one.name: one.default for one in fields(MeshLimits)}
PROTOCOL = re.compile(r'"(/(?:kaisar|libp2p)/[a-z0-9./-]*[0-9a-z])"')


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "mesh.md").read_text("utf-8")


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next of its kind."""
    return re.split(r"^## ", page.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_limit_is_documented_with_its_default(page: str, name: str) -> None:
    rows = {found[1]: found for found in ROW.finditer(section(page, "Limits"))}
    assert name in rows, f"docs/mesh.md has no row for the limit {name}"
    assert rows[name][2] == repr(DEFAULTS[name]), f"docs/mesh.md: the default of {name} is {DEFAULTS[name]!r}"
    assert rows[name][3].strip() and rows[name][4].strip()


def test_no_limit_is_documented_that_is_none(page: str) -> None:
    names = [found[1] for found in ROW.finditer(section(page, "Limits"))]
    assert set(names) == set(DEFAULTS)
    assert len(names) == len(set(names))


def test_every_protocol_is_listed(page: str, repository: Path) -> None:
    wire = section(page, "Wire protocols")
    sources = [path.read_text("utf-8") for path in sorted((repository / "kaisar_p2p" / "mesh").rglob("*.py"))]
    spoken = {found for source in sources for found in PROTOCOL.findall(source)}
    assert spoken >= {"/kaisar/peers/2", "/libp2p/dcutr"}
    assert not [protocol for protocol in spoken if f"`{protocol}`" not in wire]


def test_points_are_those_of_the_code(page: str) -> None:
    told = {int(points): offences for points, offences in re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)}
    for points, words in {
        reputation.UNAUTHENTIC_POINTS: "does not authenticate",
        reputation.REJECTED_POINTS: "its author sends",
        reputation.BROKEN_STREAM_POINTS: "not multistream-select",
        reputation.FORWARDED_POINTS: "of another author",
        reputation.IMPATIENT_POINTS: "GRAFT during",
        reputation.HANDSHAKE_POINTS: "a handshake that fails",
    }.items():
        assert words in told[int(points)]
    accounts = " ".join(section(page, "Admission, accounts, memory").split())
    assert f"{reputation.BAN_POINTS:.0f} are a ban" in accounts
    assert f"Above {reputation.TOLERATED_POINTS:.0f} a peer" in accounts


def test_the_topic_mesh_is_that_of_the_code(page: str) -> None:
    gossip = " ".join(section(page, "Gossip").split())
    assert f"Degree {DEGREE}, low {DEGREE_LOW}, high {DEGREE_HIGH};" in gossip
    assert f"announce {MAX_TOPICS_PER_PEER} topics" in gossip


def test_files_that_are_named_exist(page: str, repository: Path) -> None:
    named = set(re.findall(r"`((?:tests|kaisar_p2p|protocols|docs|node)/[\w/.-]+)`", page))
    assert len(named) > 15
    assert not sorted(name for name in named if not (repository / name).exists())
    table = section(page, "What is stock and what is not")
    modules = re.findall(r"`(\w+/(?:[\w*]+\.py)?|\w+\.py)`", table)
    assert not [name for name in modules if not any((repository / "kaisar_p2p" / "mesh").glob(name))]


def test_links_within_the_page_lead_somewhere(page: str) -> None:
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not set(re.findall(r"\]\(#([\w-]+)\)", page)) - anchors
