"""Whom an attack is aimed at, and from where it comes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import trio

from tests.attacks.raw_peer import RawPeer, tcp_to

SECONDS = 2.0
"""How long most attacks last."""

_NETWORK = f"127.{1 + os.getpid() % 250}"
_hosts = itertools.count(1)


def another_address() -> str:
    """An address of this machine that nothing has come from yet: attackers have many."""
    number = next(_hosts)
    return f"{_NETWORK}.{number // 250 % 250}.{1 + number % 250}"


async def until(condition: Callable[[], bool], within_s: float) -> bool:
    """Wait for something that the other side brings about; whether it did."""
    with trio.move_on_after(within_s):
        while not condition():  # noqa: ASYNC110  (many conditions have no event)
            await trio.sleep(0.02)
        return True
    return False


@dataclass(frozen=True)
class Target:
    """The victim."""

    address: tuple[str, int]
    key: bytes

    async def peer(
        self, nursery: trio.Nursery, *, source: str = "", seed: bytes | None = None, read: bool = True
    ) -> RawPeer:
        """A connection with it, by default from a new address with a new key."""
        with trio.fail_after(15):
            return await RawPeer.connect(nursery, self.address, source or another_address(), seed, read=read)

    async def tcp(self, source: str = "") -> trio.SocketStream:
        """Only TCP."""
        return await tcp_to(*self.address, source or another_address())
