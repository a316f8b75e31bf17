"""Which addresses we tell others, and noticing that they have changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.mesh.discovery.addresses import Address, AnyAddress, local_addresses, parse_any
from kaisar_p2p.mesh.limits import MeshConfig

log = logging.getLogger(__name__)

_JUMP_S = 30.0


class OwnAddresses:
    """Our addresses, the best first: what the operator announces, or else the confirmed public ones, those over
    relays, and those of our interfaces.

    `confirmed` and `circuits` are set by whoever finds them out. `on_changed` is called when the list has changed,
    `on_woken` when the network may have: interfaces came or went, or the machine was suspended.
    """

    def __init__(self, config: MeshConfig, bound: Callable[[], tuple[Address, ...]]) -> None:
        self.on_changed: Callable[[], None] = lambda: None
        self.on_woken: Callable[[], None] = lambda: None
        self._announced = tuple(_announced(text) for text in config.announce)
        self._poll_s = config.limits.interfaces_s
        self._bound = bound
        self._local: tuple[Address, ...] = ()
        self._confirmed: tuple[AnyAddress, ...] = ()
        self._circuits: tuple[AnyAddress, ...] = ()

    def current(self) -> tuple[AnyAddress, ...]:
        """What to tell, without duplicates."""
        if self._announced:
            return self._announced
        if not self._local:  # also before we listen
            self._local = local_addresses(self._bound())
        return tuple(dict.fromkeys((*self._confirmed, *self._circuits, *self._local)))

    def local(self) -> tuple[Address, ...]:
        """Those of our interfaces, for the local network."""
        self.current()
        return self._local

    def set_confirmed(self, addresses: tuple[AnyAddress, ...]) -> None:
        """Public addresses at which others have reached us."""
        self._change(lambda: setattr(self, "_confirmed", addresses))

    def set_circuits(self, addresses: tuple[AnyAddress, ...]) -> None:
        """Addresses over relays that have reserved us a slot."""
        self._change(lambda: setattr(self, "_circuits", addresses))

    def look(self) -> bool:
        """Look at the interfaces now; whether they have changed."""
        before = self._local
        self._change(lambda: setattr(self, "_local", local_addresses(self._bound())))
        return bool(before) and self._local != before

    def _change(self, assign: Callable[[], None]) -> None:
        before = self.current()
        assign()
        if self.current() != before:
            log.info("our addresses are now %s", ", ".join(map(str, self.current())) or "none")
            self.on_changed()

    async def run(self) -> None:
        """Look at the interfaces and at the clocks, again and again."""
        ahead_s = time.time() - trio.current_time()
        self.current()
        while True:
            await trio.sleep(self._poll_s)
            jumped, ahead_s = time.time() - trio.current_time() - ahead_s, time.time() - trio.current_time()
            if self.look() or jumped > _JUMP_S:  # the monotonic clock stands still while the machine is suspended
                self.on_woken()


def _announced(text: str) -> AnyAddress:
    try:
        return parse_any(text)[0]
    except ValueError as error:
        raise ConfigError(f"cannot announce {text!r}: {error}", hint="/ip4/<address>/tcp/<port>") from None
