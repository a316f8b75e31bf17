"""Between the lease machine and the container runtime: start, watch health and end, stop, adopt after a restart."""

from __future__ import annotations

import logging

import trio

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.runtime.interface import ContainerRuntime, ContainerSpec, ContainerStatus
from kaisar_p2p.runtime.reach import answers
from node.inbox import Inbox, Lane
from protocols.actions import ContainerReport, Deploy

log = logging.getLogger(__name__)

HEALTH_POLL_S = 0.1
HEALTH_TIMEOUT_S = 120.0
ACCEPT_TIMEOUT_S = 1.0
STOP_GRACE_S = 5.0
STOP_RETRY_S = (1.0, 5.0, 30.0)


class Containers:
    """Reports phases of containers to the inbox; owns one watcher task for each."""

    def __init__(self, runtime: ContainerRuntime, inbox: Inbox) -> None:
        self.runtime = runtime
        self._inbox = inbox
        self._watched: dict[str, trio.CancelScope] = {}
        self._to_watch, self._watch_requests = trio.open_memory_channel[tuple[str, tuple[int, ...]]](256)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Adopt what an earlier run of this node started, then watch; until cancelled."""
        async with trio.open_nursery() as nursery:
            for status in await self.runtime.containers():
                if status.phase == "created":  # the start was cut short: the lease's machine starts it again
                    await self.stop(bytes.fromhex(status.lease))
                    continue
                log.info("found container %s again (%s)", status.lease[:8], status.phase)
                nursery.start_soon(self._watch, status.lease, tuple(port for port, _ in status.ports))
            task_status.started()
            async for lease, ports in self._watch_requests:
                nursery.start_soon(self._watch, lease, ports)

    async def deploy(self, action: Deploy) -> None:
        """Start the container of an order and begin to watch it."""
        work = action.workload
        spec = ContainerSpec(
            lease=action.order_id.hex(),
            image=work.image,
            command=work.command,
            environment=tuple((each.name, each.value) for each in work.environment),
            ports=work.ports,
            cpu_cores=action.cpu_cores,
            memory_mb=action.memory_mb,
            disk_mb=action.disk_mb,
            gpus=action.gpus,
        )
        try:
            await self.runtime.start(spec)
        except KaisarError as error:
            await self._report(spec.lease, "failed", str(error))
            return
        await self._to_watch.send((spec.lease, spec.ports))

    async def stop(self, order_id: bytes) -> None:
        """Stop and remove; tried again for a while when the runtime cannot."""
        lease = order_id.hex()
        scope = self._watched.pop(lease, None)
        if scope is not None:
            scope.cancel()
        for pause_s in (*STOP_RETRY_S, None):
            try:
                await self.runtime.stop(lease, STOP_GRACE_S)
                return
            except KaisarError as error:
                log.error("cannot stop container %s: %s", lease[:8], error)
            if pause_s is not None:
                await trio.sleep(pause_s)

    async def _report(self, lease: str, phase: str, detail: str = "") -> None:
        await self._inbox.put_patiently(Lane.RESULT, ContainerReport(bytes.fromhex(lease), phase, detail))

    async def _watch(self, lease: str, ports: tuple[int, ...]) -> None:
        if lease in self._watched:  # found again, and deployed again before its watcher had said so
            return
        with trio.CancelScope() as scope:
            self._watched[lease] = scope
            try:
                await self._follow(lease, ports)
            except KaisarError as error:
                await self._report(lease, "failed", str(error))
            except Exception as error:  # the edge of the watcher: a runtime's mistake ends this lease, not the node
                log.exception("watching container %s failed", lease[:8])
                await self._report(lease, "failed", repr(error))
            finally:
                if self._watched.get(lease) is scope:
                    del self._watched[lease]

    async def _follow(self, lease: str, ports: tuple[int, ...]) -> None:
        await self._report(lease, "started")
        if await self._becomes_healthy(lease, ports):
            await self._report(lease, "healthy")
        code = await self.runtime.wait(lease)
        await self._report(lease, "exited", str(code))

    async def _becomes_healthy(self, lease: str, ports: tuple[int, ...]) -> bool:
        """True once the first port accepts a connection, or at once when the program has no port."""
        with trio.move_on_after(HEALTH_TIMEOUT_S):
            while True:
                status = await self.runtime.status(lease)
                if status is None or status.phase == "exited":
                    return False
                if not ports or await _accepts(status, ports[0]):
                    return True
                await trio.sleep(HEALTH_POLL_S)
        await self._report(
            lease, "unhealthy", f"port {ports[0]} did not accept a connection in {HEALTH_TIMEOUT_S:.0f} s"
        )
        return False


async def _accepts(status: ContainerStatus, port: int) -> bool:
    address = status.address(port)
    return address is not None and await answers(address, ACCEPT_TIMEOUT_S)
