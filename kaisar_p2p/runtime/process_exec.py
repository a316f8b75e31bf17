"""A command in a lease of the process runtime: its input, its output and its end."""

from __future__ import annotations

from collections.abc import AsyncIterator

import trio

from kaisar_p2p.errors import ContainerError


class ProcessExec:
    """A command that runs beside the program."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._send, self._receive = trio.open_memory_channel[tuple[int, bytes]](16)
        self._readers = 2

    async def read(self, channel: int, stream: trio.abc.ReceiveStream | None) -> None:
        """Pass one of the command's outputs on, until it closes."""
        assert stream is not None
        try:
            async for data in stream:
                await self._send.send((channel, bytes(data)))
        finally:
            self._readers -= 1
            if not self._readers:
                self._send.close()

    async def send(self, data: bytes) -> None:
        """Standard input; ContainerError once the command has ended."""
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ContainerError("the command has ended") from error

    async def send_eof(self) -> None:
        """Close standard input."""
        assert self._process.stdin is not None
        await self._process.stdin.aclose()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """(1, stdout bytes) and (2, stderr bytes) until both are closed."""
        async for item in self._receive:
            yield item

    async def exit_code(self) -> int:
        """Wait for the end; 128 + signal when it was killed."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code
