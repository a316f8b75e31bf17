"""A machine decides; a shell does. Machines are restored by replaying their stored inputs."""

from __future__ import annotations

from typing import Protocol

from protocols.actions import Action, Event


class Machine(Protocol):
    """One protocol's behaviour on one node.

    `now` is seconds since the Unix epoch on a clock that never runs backwards. A machine ignores events that are not
    its own, never raises on a remote peer's data, and keeps its memory bounded.
    """

    @property
    def deadline(self) -> float | None:
        """When the machine wants a Wake, or None."""

    def step(self, event: Event, now: float) -> list[Action]:
        """React to one event."""
