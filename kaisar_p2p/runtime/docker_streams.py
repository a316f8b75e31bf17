"""Streams out of a Docker engine: logs, and commands that run inside a container."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from functools import partial
from typing import IO, Any

import trio
from docker.errors import DockerException, NotFound

from kaisar_p2p.errors import ContainerError
from kaisar_p2p.runtime.docker_engine import LOOK_TIMEOUT_S, Engine

log = logging.getLogger(__name__)

TAIL_LINES = 5_000
CHUNK = 1 << 15
EXIT_POLL_S = 0.1
KILL_TIMEOUT_S = 10.0
KILL_SEEN_S = 2.0
EXEC_VARIABLE = "KAISAR_EXEC"
_KILL = """for p in /proc/[0-9]*; do case "$(cat $p/environ)" in *%s*) kill -9 ${p#/proc/};; esac; done 2>/dev/null"""
_HEADER = struct.Struct(">BxxxL")


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def read_logs(engine: Engine, container: Any, *, follow: bool, tail_bytes: int) -> AsyncGenerator[bytes, None]:
    """Output and errors, from at most `tail_bytes` and 5,000 lines back.

    It is one stream of the engine, so that nothing is missing or double between what was and what comes; the time of
    the last line that was there at first says where the one ends and the other begins.
    """
    what = "cannot read the logs"
    newest = b""
    if follow:
        last = await engine.call(partial(container.logs, tail=1, timestamps=True), what)
        newest = bytes(last).partition(b" ")[0]
    open_stream = partial(
        container.logs, stream=True, follow=follow, tail=TAIL_LINES if tail_bytes > 0 else 0, timestamps=True
    )
    stream = await engine.call(open_stream, what)
    try:
        if (newest or not follow) and tail_bytes > 0:
            tail = await engine.read(partial(_tail, stream, newest, tail_bytes), what)
            if tail:
                yield tail
        while follow and (frame := await engine.read(partial(next, stream, None), what)) is not None:
            yield _text(frame)[1]
    finally:
        with contextlib.suppress(OSError, AttributeError, DockerException):  # over already; wakes the thread if not
            stream.close()


def _tail(stream: Iterator[bytes], newest: bytes, tail_bytes: int) -> bytes:
    """The last `tail_bytes` up to the line of the time `newest`, or up to the end."""
    kept: deque[bytes] = deque()
    size = 0
    for frame in stream:
        stamp, text = _text(frame)
        kept.append(text)
        size += len(text)
        while size - len(kept[0]) >= tail_bytes:
            size -= len(kept.popleft())
        if newest and stamp >= newest:
            break
    return b"".join(kept)[-tail_bytes:]


def _text(frame: bytes) -> tuple[bytes, bytes]:
    stamp, _, text = bytes(frame).partition(b" ")
    return stamp, text


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class DockerExec:
    """A command that runs inside a container."""

    def __init__(self, engine: Engine, container_id: str, exec_id: str, mark: str, stream: Any) -> None:
        """`stream` is the socket that the SDK gives; `mark` is in the environment of the command and its children."""
        self._engine = engine
        self._container_id, self._exec_id, self._mark = container_id, exec_id, mark
        self._socket: socket.socket = getattr(stream, "_sock", stream)
        self._reader = _reader(stream)
        self._socket.settimeout(None)  # a command may read and say nothing for long; hanging up ends the waiting
        self._stream = stream

    async def send(self, data: bytes) -> None:
        """Standard input; ContainerError once the command has ended."""
        await self._engine.read(partial(self._socket.sendall, data), "the command has ended")

    async def send_eof(self) -> None:
        """Close standard input."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """(1, stdout bytes) and (2, stderr bytes) until both are closed."""
        frames = _frames(self._reader)
        while (frame := await self._engine.read(partial(next, frames, None), "cannot read the output")) is not None:
            yield frame

    async def exit_code(self) -> int:
        """Wait for the end."""
        while (told := await self._inspect()).get("Running"):  # noqa: ASYNC110  (asks the engine)
            await trio.sleep(EXIT_POLL_S)
        return int(told.get("ExitCode") or 0)

    async def _inspect(self) -> dict[str, Any]:
        inspect = partial(self._engine.client.api.exec_inspect, self._exec_id)
        return dict(await self._engine.call(inspect, "cannot look at the command", LOOK_TIMEOUT_S))

    async def end(self) -> None:
        """Hang up, and kill the command and its children if it still runs.

        The engine has no call for that: a second command in the container finds them by their environment. It needs
        the image's shell; without one, the command goes on until the lease ends.
        """
        with contextlib.suppress(OSError):  # wakes the threads that read and write
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._stream.close()
        try:
            if not (await self._inspect()).get("Running"):
                return
            await self._engine.call(self._kill, "cannot end the command", KILL_TIMEOUT_S)
            with trio.move_on_after(KILL_SEEN_S):  # the engine hears of an end a little later
                await self.exit_code()
                return
            log.warning("a command in container %s goes on until its lease ends", self._container_id[:12])
        except ContainerError as error:
            if isinstance(error.__cause__, NotFound):  # its container is gone
                return
            log.warning("a command in container %s may go on: %s", self._container_id[:12], error.message)

    def _kill(self) -> None:
        api = self._engine.client.api
        killer = api.exec_create(self._container_id, ["sh", "-c", _KILL % self._mark])
        api.exec_start(killer["Id"])


async def start_exec(engine: Engine, container: Any, command: tuple[str, ...]) -> DockerExec:
    """Run a command inside; `end` it when done."""
    api, mark = engine.client.api, f"{EXEC_VARIABLE}={secrets.token_hex(8)}"
    create = partial(api.exec_create, container.id, list(command), stdin=True, environment=[mark])
    exec_id = (await engine.call(create, "cannot run the command"))["Id"]
    stream = await engine.call(partial(api.exec_start, exec_id, socket=True), "cannot run the command")
    return DockerExec(engine, container.id, exec_id, mark, stream)


def _reader(stream: Any) -> IO[bytes]:
    """What reads the answer's body: the SDK's bare socket lacks what came in one piece with the answer's head."""
    response = getattr(stream, "_response", None)
    reader: IO[bytes] = response.raw._fp.fp if response is not None else stream.makefile("rb")
    return reader


def _frames(reader: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Pieces of at most 32 KiB of the multiplexed stream (Engine API, "attach to a container")."""
    try:
        while len(header := reader.read(_HEADER.size)) == _HEADER.size:
            channel, left = _HEADER.unpack(header)
            while left:
                data = reader.read(min(left, CHUNK))
                if not data:
                    return
                left -= len(data)
                yield channel, data
    except ValueError:  # closed by whoever left the command
        return
