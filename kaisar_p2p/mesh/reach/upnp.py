"""A port of the router that leads to ours: asked for, renewed, and given back at the end.

Nothing depends on it. Routers without UPnP are the rule in data centres; then `PortMapping.explained` says why, for
`kaisar doctor`, and the log only at level debug. That the router says yes does not make us reachable either: peers
still have to come through (`kaisar_p2p.mesh.reach.reach_check`).
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections.abc import Callable

import trio

from kaisar_p2p.mesh.discovery.addresses import Address, local_addresses
from kaisar_p2p.mesh.limits import MeshConfig
from kaisar_p2p.mesh.reach.igd import ONLY_PERMANENT, SSDP, TAKEN, Gateway, RouterRefused, find_gateway

log = logging.getLogger(__name__)

LEASE_S = 3600
_RETRY_S, _RETRY_MAX_S = 60.0, 3600.0
_PORTS_TRIED = 8
_GIVE_BACK_S = 2.0


def wants_mapping(config: MeshConfig, bound: tuple[Address, ...]) -> bool:
    """Whether to ask a router: as configured, or when we listen on private addresses only, beyond loopback."""
    if config.upnp is not None:
        return config.upnp
    reached_at = [address for address in local_addresses(bound) if address.kind == "ip4"]
    outward = [address for address in reached_at if not address.is_loopback]
    return bool(outward) and all(address.is_private for address in outward)


class PortMapping:
    """One forwarded port. `run` keeps it; `on_change` is called when `external` comes, changes or goes."""

    def __init__(
        self, bound: Callable[[], tuple[Address, ...]], rng: random.Random, *, target: tuple[str, int] | None = None
    ) -> None:
        self.external: Address | None = None
        self.explained = "not asked for"
        self.on_change: Callable[[], None] = lambda: None
        self._bound, self._rng, self._target = bound, rng, target or SSDP
        self._gateway: Gateway | None = None
        self._lease_s = LEASE_S
        self._woken = trio.Event()

    def wake(self) -> None:
        """The network may be another: ask now, whatever router there is."""
        self._woken.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask, renew, ask again; gives the port back when cancelled."""
        self.explained = "being asked for"
        task_status.started()
        failures = 0
        try:
            while True:
                try:
                    await self._renew()
                    failures = 0
                    await self._pause(self._lease_s / 2 if self._lease_s else LEASE_S / 2)
                except RouterRefused as error:
                    self._lost(error.message)
                    failures = min(failures + 1, 16)
                    delay_s = min(_RETRY_S * 2**failures, _RETRY_MAX_S)
                    if await self._pause(delay_s * self._rng.uniform(0.5, 1.0)):
                        failures = 0
        except Exception as error:  # the edge of the task: without it the node goes on
            log.exception("port mapping ends")
            self._lost(f"a mistake in this program: {error}")
        finally:
            await self._give_back()

    async def _pause(self, delay_s: float) -> bool:
        """Sleep; whether it was for less, because we were woken."""
        with trio.move_on_after(delay_s):
            await self._woken.wait()
        woken = self._woken.is_set()
        if woken:
            self._woken, self._gateway = trio.Event(), None
        return woken

    async def _renew(self) -> None:
        port, hosts = self._ours()
        if self._gateway is None:
            self._gateway = await self._find(hosts)
        host = await self._gateway.external_host()
        before = self.external
        taken = await self._map(self._gateway, port, before.port if before is not None else port)
        self._set(Address("ip4", host, taken))

    def _ours(self) -> tuple[int, list[str]]:
        """Our port, and addresses in whose networks a router may be."""
        found = [a for a in local_addresses(self._bound()) if a.kind == "ip4" and a.is_private]
        if not found:
            raise RouterRefused("this node listens on no private IPv4 address: no router stands before it")
        return found[0].port, [address.host for address in found]

    async def _find(self, hosts: list[str]) -> Gateway:
        cause = RouterRefused("no router was asked")
        for host in hosts[:4]:
            try:
                return await find_gateway(host, target=self._target)
            except RouterRefused as error:
                cause = error
            except OSError as error:
                cause = RouterRefused(f"no router can be asked from {host}: {error.strerror or error}")
        raise cause

    async def _map(self, gateway: Gateway, port: int, first: int) -> int:
        """The external port that was granted: ours if it is free, else one at random, for a second node inside."""
        others = (self._rng.randint(20_000, 60_000) for _ in range(_PORTS_TRIED - 1))
        cause = RouterRefused("no port is free at the router")
        for external_port in (first, *others):
            try:
                await self._map_one(gateway, external_port, port)
            except RouterRefused as error:
                cause = error
                if error.code != TAKEN:
                    break
            else:
                return external_port
        raise cause

    async def _map_one(self, gateway: Gateway, external_port: int, port: int) -> None:
        label = f"kaisar {gateway.local_host}:{port}"
        try:
            await gateway.map(external_port, port, self._lease_s, label)
        except RouterRefused as error:
            if error.code != ONLY_PERMANENT or not self._lease_s:
                raise
            self._lease_s = 0
            await gateway.map(external_port, port, 0, label)

    def _set(self, external: Address) -> None:
        behind = "" if ipaddress.ip_address(external.host).is_global else ", which is itself behind another router"
        self.explained = f"the router forwards {external.host} port {external.port}{behind}"
        if external != self.external:
            log.info("%s", self.explained)
            self.external = external
            self.on_change()

    def _lost(self, why: str) -> None:
        log.debug("no port mapping: %s", why)
        self.explained, self._gateway = why, None
        if self.external is not None:
            self.external = None
            self.on_change()

    async def _give_back(self) -> None:
        if self._gateway is None or self.external is None:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(_GIVE_BACK_S):
            try:
                await self._gateway.unmap(self.external.port)
            except RouterRefused as error:
                log.debug("the port stays mapped until its lease ends: %s", error.message)
