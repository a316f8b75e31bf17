"""Turns actions into calls on the adapters, and what comes of them into events.

Every kind of effect has a bounded channel and a fixed number of workers, so that no machine and no peer can make the
node start an unlimited number of tasks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from kaisar_p2p.errors import KaisarError, LimitExceeded, MeshError, RequestFailed
from kaisar_p2p.mesh import Mesh, MeshStream
from node.clock import Clock
from node.compute import Computer
from node.containers import Containers
from node.inbox import Inbox, Lane
from node.store import NodeStore
from node.topics import Switchboard
from protocols import actions as do
from protocols.actions import Action, Event

log = logging.getLogger(__name__)

REQUEST_WORKERS = 48
PROBE_WORKERS = 16
CONTAINER_WORKERS = 8
QUEUE = 1024
OPEN_STREAM_S = 5.0
STORE_RETRY_S = 1.0
CALL_TIMEOUT_S = 60.0
REPLY_FRAMES = 64


class Submitter(Protocol):
    """Hands a call to the ledger."""

    async def submit_once(self, key: str, payload: bytes) -> None:
        """Once for each key while the call is alive."""


class Prober(Protocol):
    """Connects to a lease as a user would."""

    async def probe(self, order_id: bytes, worker: bytes, port: int, deadline_s: float) -> tuple[bool, str, bool]:
        """(up, detail, the worker answered)."""


@dataclass
class ServedCall:
    """An incoming request that machines may answer."""

    frames: trio.MemorySendChannel[tuple[bytes, bool]]
    receive: trio.MemoryReceiveChannel[tuple[bytes, bool]]


@dataclass
class NodeEffects:
    """The one place where decisions become calls."""

    mesh: Mesh
    store: NodeStore
    inbox: Inbox
    clock: Clock
    computer: Computer
    submitter: Submitter
    containers: Containers | None
    prober: Prober
    switchboard: Switchboard
    _served: dict[int, ServedCall] = field(default_factory=dict)
    _next_call: int = 1
    _queues: dict[type, trio.MemorySendChannel[Action]] = field(default_factory=dict)
    _changed: trio.Event = field(default_factory=trio.Event)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the workers; until cancelled."""
        plan: list[tuple[type, int, Callable[[Action], Awaitable[None]]]] = [
            (do.Request, REQUEST_WORKERS, self._request),
            (do.Publish, 1, self._publish),
            (do.Compute, 1, self._compute),
            (do.Submit, 1, self._submit),
            (do.Probe, PROBE_WORKERS, self._probe),
        ]
        if self.containers is not None:
            plan += [(do.Deploy, CONTAINER_WORKERS, self._deploy), (do.Stop, CONTAINER_WORKERS, self._stop)]
        async with trio.open_nursery() as nursery:
            for kind, workers, handle in plan:
                send, receive = trio.open_memory_channel[Action](QUEUE)
                self._queues[kind] = send
                for _ in range(workers):
                    nursery.start_soon(self._worker, receive.clone(), handle)
                receive.close()
            task_status.started()

    async def perform(self, actions: list[Action], now: float) -> None:
        """Journal duties and stores in one transaction, then carry out what is allowed, in order."""
        refused = await self._journal(actions, now)
        for action in actions:
            duty = getattr(action, "duty", None)
            if duty is not None and duty.key in refused:
                log.warning("not done: duty %s was done differently before", duty.key)
            elif isinstance(action, do.Reply):
                self._reply(action)
            elif not isinstance(action, do.Store | do.Note):
                self._enqueue(action)

    async def _journal(self, actions: list[Action], now: float) -> frozenset[str]:
        duties = [duty for action in actions if (duty := getattr(action, "duty", None)) is not None]
        items = [action for action in actions if isinstance(action, do.Store)]
        notes = [action for action in actions if isinstance(action, do.Note)]
        if not (duties or items or notes):
            return frozenset()
        for note in notes:
            log.info("%s %s", note.kind, " ".join(f"{name}={value}" for name, value in note.data))
        while True:
            try:
                refused = await trio.to_thread.run_sync(self.store.commit, duties, items, notes, now)
            except KaisarError as error:  # a full disk: nothing is done until it can be journalled
                log.error("%s", error)
                await trio.sleep(STORE_RETRY_S)
            else:
                if notes:
                    self._changed.set()
                    self._changed = trio.Event()
                return refused

    async def wait_for_note(self) -> None:
        """Until the event list has grown."""
        await self._changed.wait()

    def _enqueue(self, action: Action) -> None:
        queue = self._queues.get(type(action))
        try:
            if queue is None:
                raise trio.WouldBlock
            queue.send_nowait(action)
        except trio.BrokenResourceError:
            log.debug("not done: %s, the node is stopping and its workers have ended", type(action).__name__)
        except trio.WouldBlock:
            log.warning("dropped %s: no room, or this node has no such role", type(action).__name__)
            self.inbox.dropped[f"effect-{type(action).__name__.lower()}"] += 1
            event = _undone(action, "too much at once, or not a role of this node")
            if event is not None:
                self.inbox.put(Lane.RESULT, event, over_limit=True)

    async def _worker(
        self, channel: trio.MemoryReceiveChannel[Action], handle: Callable[[Action], Awaitable[None]]
    ) -> None:
        async with channel:
            async for action in channel:
                try:
                    await handle(action)
                except Exception:  # the edge of the effect: one failed call must not end the node
                    log.exception("%s failed", type(action).__name__)
                    event = _undone(action, "failed here: the log says why")
                    if event is not None:
                        await self.inbox.put_patiently(Lane.RESULT, event)

    # ── gossip and requests ──────────────────────────────────────────────────────────────────────────────────────────

    async def _publish(self, action: Action) -> None:
        assert isinstance(action, do.Publish)
        try:
            await self.mesh.publish(action.topic, action.payload)
        except MeshError as error:  # too large: what others cannot hear is not for our own machines either
            log.error("cannot publish on %s: %s", action.topic, error)
        else:
            self.switchboard.echo(action.topic, action.payload)

    async def _request(self, action: Action) -> None:
        assert isinstance(action, do.Request)
        error, local, began_at = "", False, self.clock.now()
        try:
            with trio.fail_after(action.deadline_s) as deadline:
                if action.peer == self.mesh.key:
                    await self._request_self(action)
                else:
                    await self._request_peer(action, deadline)
        except trio.TooSlowError:
            error = "timed out"
        except MeshError as failure:
            error, local = failure.message, isinstance(failure, LimitExceeded)
        local = local or (bool(error) and self._is_isolated(action.peer))
        await self.inbox.put_patiently(Lane.RESULT, do.RequestEnded(action.request_id, error, local, began_at))

    def _is_isolated(self, peer: bytes) -> bool:
        """Without any connection it is us who cannot be reached, as far as we can tell."""
        return peer != self.mesh.key and not self.mesh.peers()

    async def _request_peer(self, action: do.Request, deadline: trio.CancelScope) -> None:
        stream = await self.mesh.open_stream(
            action.peer,
            action.protocol,
            timeout_s=min(OPEN_STREAM_S, action.deadline_s),
            max_frame_bytes=max(action.max_reply_bytes, len(action.payload)),
        )
        async with stream:
            await stream.send_frame(action.payload)
            sent_at = self.clock.now()
            for _ in range(action.max_frames):
                frame = await stream.receive_frame()
                answer = do.Answer(action.request_id, frame, self.clock.now(), sent_at)
                left_s = deadline.deadline - trio.current_time()
                deadline.deadline = math.inf  # while our own inbox is full, the peer's time stands still
                await self.inbox.put_patiently(Lane.RESULT, answer)
                deadline.deadline = trio.current_time() + left_s

    async def _request_self(self, action: do.Request) -> None:
        """A node with several roles may be drawn to check or serve itself: same path, without a stream."""
        call_id, call = self._open_call()
        try:
            event = do.Incoming(call_id, self.mesh.key, action.protocol, action.payload, self.clock.now())
            await self.inbox.put_patiently(Lane.REQUEST, event)
            for _ in range(action.max_frames):
                payload, last = await call.receive.receive()
                answer = do.Answer(action.request_id, payload, self.clock.now())
                await self.inbox.put_patiently(Lane.RESULT, answer)
                if last:
                    return
        except trio.EndOfChannel:
            raise RequestFailed("more frames than wait for a reader") from None
        finally:
            self._close_call(call_id)

    async def serve(self, protocol: str, stream: MeshStream) -> None:
        """Handler of a stream protocol: one frame in, as many out as the machines reply."""
        call_id, call = self._open_call()
        try:
            with trio.move_on_after(CALL_TIMEOUT_S):
                payload = await stream.receive_frame()
                event = do.Incoming(call_id, stream.peer, protocol, payload, self.clock.now())
                if not self.inbox.put(Lane.REQUEST, event):
                    return
                last = False
                while not last:
                    frame, last = await call.receive.receive()
                    await stream.send_frame(frame)
        except trio.EndOfChannel:
            raise RequestFailed("the peer reads too slowly") from None
        finally:
            self._close_call(call_id)

    def _open_call(self) -> tuple[int, ServedCall]:
        call_id, self._next_call = self._next_call, self._next_call + 1
        call = self._served[call_id] = ServedCall(*trio.open_memory_channel[tuple[bytes, bool]](REPLY_FRAMES))
        return call_id, call

    def _close_call(self, call_id: int) -> None:
        call = self._served.pop(call_id, None)
        if call is not None:
            call.frames.close()
            call.receive.close()

    def _reply(self, action: do.Reply) -> None:
        call = self._served.get(action.call_id)
        if call is None:
            return  # the peer has hung up
        try:
            call.frames.send_nowait((action.payload, action.last))
        except trio.WouldBlock:  # an answer with a gap would be worse than none
            log.warning("call ended: the peer reads too slowly")
            call.frames.close()
            del self._served[action.call_id]

    # ── work, ledger, containers ─────────────────────────────────────────────────────────────────────────────────────

    async def _compute(self, action: Action) -> None:
        assert isinstance(action, do.Compute)
        try:
            done = do.WorkDone(action.work_id, await self.computer.run(action.task))
        except KaisarError as error:
            done = do.WorkDone(action.work_id, None, str(error))
        await self.inbox.put_patiently(Lane.RESULT, done)

    async def _submit(self, action: Action) -> None:
        assert isinstance(action, do.Submit)
        await self.submitter.submit_once(action.key, action.payload)

    async def _probe(self, action: Action) -> None:
        assert isinstance(action, do.Probe)
        up, detail, answered = await self.prober.probe(action.order_id, action.worker, action.port, action.deadline_s)
        local = not answered and self._is_isolated(action.worker)
        await self.inbox.put_patiently(Lane.RESULT, do.ProbeReport(action.probe_id, up, detail, answered, local))

    async def _deploy(self, action: Action) -> None:
        assert isinstance(action, do.Deploy) and self.containers is not None
        await self.containers.deploy(action)

    async def _stop(self, action: Action) -> None:
        assert isinstance(action, do.Stop) and self.containers is not None
        await self.containers.stop(action.order_id)


def _undone(action: Action, reason: str) -> Event | None:
    """What a machine hears of an action that was not carried out, so that it does not wait for its result."""
    match action:
        case do.Request():
            return do.RequestEnded(action.request_id, reason, local=True)
        case do.Probe():
            return do.ProbeReport(action.probe_id, False, reason, answered=False, local=True)
        case do.Compute():
            return do.WorkDone(action.work_id, None, reason)
        case do.Deploy():
            return do.ContainerReport(action.order_id, "failed", reason)
        case _:
            return None
