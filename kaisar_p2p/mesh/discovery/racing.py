"""Dialing a peer at several addresses: the next one is begun before the one before has timed out.

As in Happy Eyeballs (RFC 8305): in order of promise, a quarter of a second apart, at once when one fails. Addresses
that lead nowhere, such as private ones of another network, cost a quarter of a second instead of seconds each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio

T = TypeVar("T")
STAGGER_S = 0.25


class Race(Generic[T]):
    """One race. `errors` are those of the attempts that failed, in their order."""

    def __init__(self, attempts: Sequence[Callable[[], Awaitable[T]]], deadline_s: float) -> None:
        self._attempts = attempts
        self._deadline_s = deadline_s
        self._failed: dict[int, Exception] = {}
        self._results: list[T] = []

    @property
    def errors(self) -> list[tuple[int, Exception]]:
        """Which attempts have failed, and why."""
        return sorted(self._failed.items(), key=lambda each: each[0])

    async def winner(self) -> T | None:
        """What the first attempt that succeeds returns, or None when all have failed; the others are cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(len(self._attempts)):
                ended = trio.Event()
                nursery.start_soon(self._run, number, ended, nursery.cancel_scope)
                with trio.move_on_after(STAGGER_S):
                    await ended.wait()
        return self._results[0] if self._results else None

    async def _run(self, number: int, ended: trio.Event, scope: trio.CancelScope) -> None:
        try:
            with trio.fail_after(self._deadline_s):
                self._results.append(await self._attempts[number]())
            scope.cancel()
        except Exception as error:  # noqa: BLE001  (the edge: the handshake of a stranger can raise anything)
            self._failed[number] = error
        finally:
            ended.set()
