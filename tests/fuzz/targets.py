"""All targets of `just fuzz mesh`, by the names on its command line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.fuzz import targets_messages, targets_transport
from tests.fuzz.engine import Target

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("noise", "handshake", "payload"),
    "yamux": ("yamux",),
    "multistream": ("multistream",),
    "gossip": ("gossip",),
    "request": ("framing", "request", "codec"),
    "address": ("address", "circuit", "record", "private"),
}
"""What each choice of `--target` covers; a single one may be named, too."""


@asynccontextmanager
async def opened_targets(wanted: str) -> AsyncIterator[list[Target]]:
    """The targets of a family, one target, or all; raises ValueError for an unknown name."""
    async with targets_messages.opened_targets() as messages:
        every = [*targets_transport.targets(), *messages]
        names = [target.name for target in every] if wanted == "all" else FAMILIES.get(wanted, (wanted,))
        chosen = [target for target in every if target.name in names]
        if not chosen:
            raise ValueError(f"no target is called {wanted!r}")
        yield chosen
