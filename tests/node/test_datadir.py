"""The data directory on a real file system, and its lock against real second processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kaisar_p2p.errors import DataDirectoryError
from node.datadir import (
    LOCK_FILE,
    check_data_directory,
    create_data_directory,
    lock_data_directory,
    resolve_data_directory,
)

HOLDER = """
import pathlib, sys
from node.datadir import lock_data_directory
with lock_data_directory(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create_data_directory(tmp_path / "data")
    return tmp_path / "data"


@contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lock when this yields."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_flag_wins_over_kaisar_home_over_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    environ = {"KAISAR_HOME": "/srv/kaisar", "XDG_DATA_HOME": "/data"}
    assert resolve_data_directory(Path("here"), environ) == tmp_path / "here"
    assert resolve_data_directory(Path("~/there"), environ) == Path("/home/ada/there")
    assert resolve_data_directory(None, environ) == Path("/srv/kaisar")
    assert resolve_data_directory(None, {"XDG_DATA_HOME": "/data"}) == Path("/data/kaisar")
    for empty in ({}, {"KAISAR_HOME": "", "XDG_DATA_HOME": ""}, {"XDG_DATA_HOME": "relative"}):
        assert resolve_data_directory(None, empty) == Path("/home/ada/.local/share/kaisar")
    assert resolve_data_directory(None, {"KAISAR_HOME": "~/k"}) == Path("/home/ada/k")


def test_a_directory_is_made_private_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    create_data_directory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    create_data_directory(path)
    check_data_directory(path)


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match=r"does not exist .*kaisar init"):
        check_data_directory(tmp_path / "none")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryError, match="is not a directory"):
        check_data_directory(tmp_path / "file")
    with pytest.raises(DataDirectoryError, match="is not a directory"):
        create_data_directory(tmp_path / "file")
    with pytest.raises(DataDirectoryError, match="cannot be"):
        create_data_directory(tmp_path / "file" / "under")


def test_a_directory_that_others_may_enter_is_refused(directory: Path) -> None:
    directory.chmod(0o750)
    with pytest.raises(DataDirectoryError, match=f"mode 0750.*chmod 700 {directory}"):
        check_data_directory(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user_is_refused(directory: Path) -> None:
    os.chown(directory, 65534, -1)
    with pytest.raises(DataDirectoryError, match="belongs to another user"):
        check_data_directory(directory)


def test_a_directory_without_rights_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.chmod(0o500)
    if os.geteuid() == 0:  # root may write anywhere, so the kernel's answer is stood in for
        monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    with pytest.raises(DataDirectoryError, match=r"cannot be written .*chmod 700"):
        check_data_directory(directory)


def test_a_second_process_is_refused_with_the_firsts_pid(directory: Path) -> None:
    with other_process(directory) as holder:
        with pytest.raises(DataDirectoryError, match=f"in use by process {holder.pid} .*kill {holder.pid}"):
            with lock_data_directory(directory):
                pytest.fail("two processes hold the directory")
    with lock_data_directory(directory):
        assert (directory / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_this_process_is_refused_a_second_time_too(directory: Path) -> None:
    with lock_data_directory(directory):
        with pytest.raises(DataDirectoryError, match=f"process {os.getpid()}"):
            with lock_data_directory(directory):
                pytest.fail("the directory was locked twice")


def test_a_killed_process_leaves_no_lock(directory: Path) -> None:
    with other_process(directory) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (directory / LOCK_FILE).read_text() == f"{holder.pid}\n"
        with lock_data_directory(directory):
            assert (directory / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_the_lock_ends_with_its_scope_even_by_an_error(directory: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_data_directory(directory):
        raise ZeroDivisionError
    with other_process(directory):
        pass


@pytest.mark.parametrize("content", ["", "garbage", "9" * 100, "-1"])
def test_any_content_of_a_stale_file_is_fine(directory: Path, content: str) -> None:
    (directory / LOCK_FILE).write_text(content)
    with lock_data_directory(directory):
        pass


def test_a_forked_child_does_not_keep_the_lock(directory: Path) -> None:
    """A child that was forked and has not called exec still shares the descriptor."""
    read_end, write_end = os.pipe()
    with lock_data_directory(directory):
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
    os.close(read_end)
    try:
        with lock_data_directory(directory):
            pass
    finally:
        os.close(write_end)
        os.waitpid(child, 0)


def test_children_do_not_inherit_the_lock(directory: Path) -> None:
    with lock_data_directory(directory):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with lock_data_directory(directory):
            pass
    finally:
        child.communicate(b"\n")


def test_a_full_disk_is_told_and_leaves_no_lock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with (
            pytest.raises(DataDirectoryError, match="cannot be written: No space left"),
            lock_data_directory(directory),
        ):
            pass
    with lock_data_directory(directory):
        pass


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "data", tmp_path / "file" / "more" / "data"):
        with pytest.raises(DataDirectoryError, match=r"cannot be created: .*ot a directory"):
            create_data_directory(path)


def test_a_lock_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match="cannot be opened"), lock_data_directory(tmp_path / "none"):
        pytest.fail("nothing was locked")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataDirectoryError, match="cannot be opened"), lock_data_directory(tmp_path):
        pytest.fail("a link was followed")
    assert not (tmp_path / "elsewhere").exists()
