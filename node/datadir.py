"""The data directory: where it is, whether it can be used, and the lock that keeps a second node out of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from kaisar_p2p.errors import DataDirectoryError

LOCK_FILE = "node.lock"
DIRECTORY_MODE = 0o700


def resolve_data_directory(option: Path | None, environ: Mapping[str, str]) -> Path:
    """The data directory as an absolute path: `--data-dir`, else `KAISAR_HOME`, else XDG's data home / `kaisar`.

    Nothing is created. An empty variable counts as unset; so does a relative `XDG_DATA_HOME`, as its
    specification asks. Source: XDG Base Directory Specification 0.8.
    """
    if option is not None:
        return Path(os.path.expanduser(option)).absolute()
    if home := environ.get("KAISAR_HOME"):
        return Path(os.path.expanduser(home)).absolute()
    data_home = environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(data_home):
        return Path(data_home) / "kaisar"
    try:
        return Path.home() / ".local" / "share" / "kaisar"
    except RuntimeError:
        raise DataDirectoryError("this user has no home directory", hint="pass --data-dir or set KAISAR_HOME") from None


def create_data_directory(path: Path) -> None:
    """Make the directory (mode 0700) and its parents if they are missing, then check it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=DIRECTORY_MODE)
    except OSError as error:
        cause = f"{path.parent} is not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise DataDirectoryError(
            f"{path} cannot be created: {cause}", hint="check the rights of its parent, or choose another directory"
        ) from None
    check_data_directory(path)


def check_data_directory(path: Path) -> None:
    """DataDirectoryError unless `path` is a directory of ours, with mode 0700, in which files can be made."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataDirectoryError(f"{path} does not exist", hint="run `kaisar init`, or pass --data-dir") from None
    except OSError as error:
        raise DataDirectoryError(
            f"{path} cannot be read: {error.strerror}", hint="check the rights of its parents, or pass --data-dir"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise DataDirectoryError(f"{path} is not a directory", hint="pass a directory with --data-dir")
    if status.st_uid != os.geteuid():
        raise DataDirectoryError(
            f"{path} belongs to another user", hint="run as its owner, or pass a directory of your own with --data-dir"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise DataDirectoryError(f"{path} is open to other users (mode {mode:04o})", hint=f"chmod 700 {path}")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise DataDirectoryError(
            f"{path} cannot be written", hint=f"chmod 700 {path}, or mount its file system for writing"
        )


@contextlib.contextmanager
def lock_data_directory(path: Path) -> Iterator[None]:
    """Hold the directory for this process; DataDirectoryError with the other's process id when it is held.

    The kernel releases the lock with the process, however it dies, so a file left behind locks nothing. The file
    itself stays: removing it would let two processes lock two files of one name.
    """
    descriptor = _open_lock_file(path / LOCK_FILE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path, _read_pid(descriptor)) from None
        _write_pid(descriptor, path)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
            # Closing alone would leave it to a child that was started just now and still has the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _open_lock_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DataDirectoryError(
            f"{path} cannot be opened: {error.strerror}", hint="check that the data directory exists and is yours"
        ) from None


def _write_pid(descriptor: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    except OSError as error:
        raise DataDirectoryError(f"{path} cannot be written: {error.strerror}", hint="free some space") from None


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0).strip()
    return int(text) if text.isdigit() else None


def _in_use(path: Path, pid: int | None) -> DataDirectoryError:
    holder = "another process" if pid is None else f"process {pid}"
    stop = "stop it" if pid is None else f"stop it with `kill {pid}`"
    return DataDirectoryError(f"{path} is in use by {holder}", hint=f"{stop}, or pass another --data-dir")
