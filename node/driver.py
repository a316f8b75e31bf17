"""The driver owns the inbox, the only timer, and the order of things: event → machines → journal → effects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from node.clock import Clock
from node.inbox import Inbox
from protocols.actions import Action, Event, Wake
from protocols.machine import Machine

log = logging.getLogger(__name__)


class Effects(Protocol):
    """Carries out what machines decided."""

    async def perform(self, actions: list[Action], now: float) -> None:
        """Journal, then do."""


class Driver:
    """Runs any set of machines."""

    def __init__(self, machines: Sequence[Machine], inbox: Inbox, effects: Effects, clock: Clock) -> None:
        self._machines = machines
        self._inbox = inbox
        self._effects = effects
        self._clock = clock

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            event = await self._next_event()
            now = self._clock.now()
            actions: list[Action] = []
            if event is not None:
                for machine in self._machines:
                    actions += _step(machine, event, now)
            for machine in self._machines:
                if machine.deadline is not None and machine.deadline <= now:
                    actions += _step(machine, Wake(), now)
            if actions:
                await self._effects.perform(actions, now)

    async def _next_event(self) -> Event | None:
        event = self._inbox.get_nowait()
        if event is not None:
            await trio.lowlevel.checkpoint()
            return event
        due = min((m.deadline for m in self._machines if m.deadline is not None), default=None)
        wait_s = max(0.0, due - self._clock.now()) if due is not None else float("inf")
        with trio.move_on_after(wait_s):
            return await self._inbox.get()
        return None


def _step(machine: Machine, event: Event, now: float) -> list[Action]:
    try:
        return machine.step(event, now)
    except Exception:  # the edge of the machine: a mistake of ours in one machine must not end the node
        log.exception("%s failed on %s", type(machine).__name__, type(event).__name__)
        return []
