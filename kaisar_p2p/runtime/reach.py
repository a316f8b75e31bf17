"""Whether a program behind a container's port really accepts connections."""

from __future__ import annotations

import socket

import trio

PATIENCE_S = 0.25


async def answers(address: tuple[str, int], timeout_s: float) -> bool:
    """Whether a connection is accepted within `timeout_s`, and still there a moment later."""
    try:
        with trio.fail_after(timeout_s):
            stream = await trio.open_tcp_stream(*address)
    except (OSError, trio.TooSlowError):
        return False
    async with stream:
        return await stays_open(stream)


async def stays_open(stream: trio.SocketStream) -> bool:
    """False if the other end hangs up within a quarter of a second without a word.

    An engine's proxy accepts whether or not the program in the container listens, and hangs up when it does not.
    """
    try:
        with trio.move_on_after(PATIENCE_S):
            return bool(await stream.socket.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
    return True
