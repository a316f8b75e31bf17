"""Files that only their owner may read: created atomically, never replaced, refused when others could read them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from kaisar_p2p.errors import IdentityError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def prepare_directory(path: Path) -> None:
    """Make the directory with mode 0700 if it is missing, and check it if it is not."""
    try:
        path.mkdir(mode=DIRECTORY_MODE)
        path.chmod(DIRECTORY_MODE)
    except FileExistsError:
        check_directory(path)
    except FileNotFoundError:
        raise IdentityError(f"{path.parent} does not exist", hint="run `kaisar init` first") from None
    except OSError as error:
        raise IdentityError(
            f"{path} cannot be created: {error.strerror}", hint="check the rights of its parent"
        ) from None


def check_directory(path: Path) -> None:
    """IdentityError unless it is a real directory of ours that only we may enter."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise IdentityError(
            f"{path} is not a directory", hint="a symbolic link is not followed; move the keys themselves"
        )
    _check_owner_and_mode(path, status, DIRECTORY_MODE)


def create_private_file(path: Path, data: bytes) -> None:
    """Write `data` so that after a crash the file is whole or absent; FileExistsError when it exists already.

    A hard link, unlike a rename, fails when the name is taken: two processes cannot replace each other's key.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), FILE_MODE)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _sync_directory(path.parent)


def read_private_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of ours with mode 0600 or stricter; FileNotFoundError when there is none."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise IdentityError(f"{path} is a symbolic link", hint="put the key file itself there") from None
        raise IdentityError(f"{path} cannot be read: {error.strerror}", hint="check its owner and rights") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IdentityError(f"{path} is not a file", hint="put the key file itself there")
        _check_owner_and_mode(path, status, FILE_MODE)
        data = os.read(descriptor, max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise IdentityError(f"{path} is larger than a key file can be", hint="restore it from a backup")
    return data


def _check_owner_and_mode(path: Path, status: os.stat_result, mode: int) -> None:
    if status.st_uid != os.geteuid():
        raise IdentityError(f"{path} belongs to another user", hint=f"chown it to the user that runs the node: {path}")
    if status.st_mode & 0o077:
        found = stat.S_IMODE(status.st_mode)
        raise IdentityError(f"{path} is open to other users (mode {found:04o})", hint=f"chmod {mode:o} {path}")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
