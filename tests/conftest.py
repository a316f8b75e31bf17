"""What every test gets: no access to the user's own data, and reproducible examples from hypothesis.

Time is an argument everywhere; where a test drives trio, `autojump_clock` of pytest-trio makes it virtual.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Examples derive from the test itself, so that every machine tries the same ones; `just fuzz` searches.
settings.register_profile(
    "quick", max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "fuzz", max_examples=5_000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests, and the processes they start, out of the data directory of whoever runs them."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KAISAR_")]:
            patch.delenv(name)
        for name in ("CONFIG", "DATA", "STATE", "CACHE"):
            patch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
        yield


@functools.cache
def _why_no_docker() -> str:
    """Return why no Docker engine can be used, or an empty string."""
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=5)
    except DockerException as error:
        return f"no Docker engine answers: {str(error)[:120]}"
    with contextlib.closing(client):
        try:
            return "" if client.ping() else "the Docker engine does not answer"
        except (DockerException, OSError) as error:
            return f"no Docker engine answers: {str(error)[:120]}"


@functools.cache
def _why_no_gpu() -> str:
    """Return why no CUDA device can be used, or an empty string."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver answers: {error}"
    return "" if pynvml.nvmlDeviceGetCount() else "the NVIDIA driver has no device"


def _why_no_browser() -> str:
    """Return why no browser can be used, or an empty string."""
    known = ("chromium", "chromium-browser", "google-chrome")
    return "" if any(map(shutil.which, known)) else f"none of {', '.join(known)} is on PATH"


def _why_no_chain() -> str:
    """Return why no chain can be used, or an empty string; the variable is read before tests lose it."""
    return "" if _CHAIN_URL else "KAISAR_TEST_CHAIN names no node (say, ws://127.0.0.1:9944)"


_CHAIN_URL = os.environ.get("KAISAR_TEST_CHAIN", "")
_NEEDS = {"docker": _why_no_docker, "gpu": _why_no_gpu, "browser": _why_no_browser, "chain": _why_no_chain}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose part of the world is missing here, and say which."""
    for marker, why_not in _NEEDS.items():
        if item.get_closest_marker(marker) and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def chain_url() -> str:
    """Where the chain under test listens (`KAISAR_TEST_CHAIN`)."""
    return _CHAIN_URL


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parent.parent
