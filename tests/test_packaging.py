"""What a fresh machine installs is complete, pinned by hash, and names no registry."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETS = ("requirements.txt", "requirements-dev.txt", "requirements-build.txt")
NEEDS_A_COMPILER = {"fastecdsa"}
BUILT_FROM_SOURCE = {"varint", "python-baseconv"}  # pure Python, each one module without a wheel


def pins(name: str) -> dict[str, list[tuple[Requirement, int]]]:
    """Return the requirements of one file by package, each with how many hashes it has."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[tuple[Requirement, int]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=sha256:", line)
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in hashes), line
        found.setdefault(canonicalize_name(Requirement(requirement).name), []).append(
            (Requirement(requirement), len(hashes))
        )
    return found


@pytest.mark.parametrize("name", SETS)
def test_requirements_name_no_registry_and_nothing_but_pins(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    without_hashes = re.sub(r"--hash=sha256:[0-9a-f]{64}", "", text)
    assert not re.search(r"://|(^|\s)-|@|\b[\w-]+\.(org|com|net|io|dev|local)\b|localhost", without_hashes)


@pytest.mark.parametrize("name", SETS)
def test_every_requirement_is_one_version_with_hashes(name: str) -> None:
    for package, found in pins(name).items():
        for requirement, hashes in found:
            assert [specifier.operator for specifier in requirement.specifier] == ["=="], package
            assert hashes > 0, package


def test_nothing_needs_a_compiler() -> None:
    for name in SETS:
        assert not NEEDS_A_COMPILER & pins(name).keys()
    assert set(PROJECT["tool"]["uv"]["exclude-dependencies"]) == NEEDS_A_COMPILER


def test_only_known_packages_are_built_from_source() -> None:
    """One hash is one file: a source package, or the one wheel for every platform."""
    for package in BUILT_FROM_SOURCE:
        [(_, hashes)] = pins("requirements.txt")[package]
        assert hashes == 1


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    project = PROJECT["project"]
    wanted = {
        "requirements.txt": project["dependencies"],
        "requirements-dev.txt": project["dependencies"] + project["optional-dependencies"]["dev"],
        "requirements-build.txt": PROJECT["dependency-groups"]["build"] + PROJECT["build-system"]["requires"],
    }
    for name, requirements in wanted.items():
        pinned = pins(name)
        for text in requirements:
            wish = Requirement(text)
            for requirement, _ in pinned[canonicalize_name(wish.name)]:
                version = next(iter(requirement.specifier)).version
                assert wish.specifier.contains(version, prereleases=True), f"{name}: {text}, but {version} is pinned"


def test_the_sets_agree_with_each_other() -> None:
    developer = pins("requirements-dev.txt")
    for name in ("requirements.txt", "requirements-build.txt"):
        for package, found in pins(name).items():
            if package in developer:
                assert [str(r) for r, _ in found] == [str(r) for r, _ in developer[package]], package
            else:
                assert name == "requirements-build.txt", f"{package} is missing in requirements-dev.txt"


def test_the_installed_libp2p_is_the_pinned_one() -> None:
    assert "libp2p==0.8.1" in PROJECT["project"]["dependencies"]
    assert importlib.metadata.version("libp2p") == "0.8.1"


def test_no_lock_file_with_addresses_is_kept() -> None:
    assert "uv.lock" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_the_console_script_can_be_imported() -> None:
    module, function = PROJECT["project"]["scripts"]["kaisar"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_package_is_shipped() -> None:
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(packages) == {"kaisar_p2p", "protocols", "node", "testnet"}
    for name in packages:
        importlib.import_module(name)


def test_the_readme_and_ci_use_the_same_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line.strip() for line in readme.splitlines() if line.strip().endswith("just test")]
    assert lines, "README.md has no line that ends in `just test`"
    assert all(line in ci for line in lines)
