"""The lab cleans up after itself, and after runs that were killed."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.netns import namespaces

pytestmark = pytest.mark.netns


def _names() -> list[str]:
    listed = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def test_what_a_killed_run_left_is_removed_and_nothing_else(iptables: str) -> None:
    with subprocess.Popen(("true",)) as gone:
        pass
    left, ours = f"kaisar-{gone.pid}-abcdef-1", namespaces.add()
    namespaces.run("ip", "netns", "add", left)
    with subprocess.Popen(("ip", "netns", "exec", left, "sleep", "60"), start_new_session=True) as process:
        namespaces.run("sh", "-c", f"until ip netns pids {left} | grep -q .; do :; done")
        try:
            namespaces.remove_leftovers()
            assert process.wait(10) == -signal.SIGKILL
            assert left not in _names()
            assert ours in _names()
        finally:
            process.kill()
            namespaces.remove(ours)
