"""Gossip on its way out: one link, one stream and one writing task for each connected peer, one timer for all.

What a packet costs (system calls, tasks that wake up, a frame of yamux and one of Noise, at both ends) is many times
what a message in it costs. So messages of the same moment leave together: a node writes at once when it has been
quiet, and otherwise lets messages gather for `flush_s`. Somebody else's message waits for a moment even then: when
the peer that we would send it to sends it to us meanwhile, ours is withdrawn, and of the two copies that would cross
only one travels. And a message that has reached us twice has reached most others too: it is no reason to write before
`spread_s` is over. By then it has left with something else, or the peer has sent it, or several leave together.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from math import inf

import trio

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.gossip.link import Link, QueuedBytes
from kaisar_p2p.mesh.gossip.seen import SeenMessages
from kaisar_p2p.mesh.gossip.turns import STEP_S
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError  # isort: skip

log = logging.getLogger(__name__)

PROTOCOL = "/meshsub/1.1.0"
_REOPEN_S, _REOPEN_MAX_S = 0.25, 30.0
_PARTED, _PARTED_S, _PARTED_BYTES = 32, 10.0, 256 * 1024  # links kept for peers that come back


class Outbox:
    """Links to all peers. `announce` gives the frame that a new stream begins with, `on_gone` hears of lost peers."""

    def __init__(
        self,
        network: Network,
        rng: random.Random,
        announce: Callable[[], bytes | None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        self.links: dict[bytes, Link] = {}
        self.dropped: Counter[tuple[str, int]] = Counter()  # by topic and priority
        self._network = network
        self._limits = limits = network.limits
        self._rng = rng
        self._announce, self._on_gone = announce, on_gone
        self._nursery: trio.Nursery | None = None
        self._queued = QueuedBytes(limits.outbound_all_bytes)
        self._waiting: dict[Link, None] = {}  # links with something to send
        self._spread = SeenMessages(limits.seen_messages, 2 * limits.spread_s)  # messages that reached us twice
        self._parted: OrderedDict[bytes, tuple[Link, float]] = OrderedDict()  # of peers that have just left
        self._next = 0.0  # earliest time of the next flush
        self._due = inf  # time of the flush that is planned
        self._timer = trio.CancelScope()

    async def run(self, nursery: trio.Nursery) -> None:
        """Flush when it is due; tasks of peers live in `nursery`."""
        self._nursery = nursery
        while True:
            with trio.CancelScope(deadline=self._due) as self._timer:
                await trio.sleep_forever()
            self._flush(trio.current_time())

    def _set_due(self, due: float) -> None:
        if due != self._due:
            self._due = self._timer.deadline = due

    # -- what to send -------------------------------------------------------------------------------------------------

    def send(
        self, message_id: bytes, topic: str, entry: bytes, peers: Iterable[bytes], priority: int, *, own: bool
    ) -> None:
        """Queue a message, given as the field of an RPC, for peers; our own does not wait for others to send it."""
        for peer in peers:
            if (link := self.links.get(peer)) is not None:
                link.push(message_id, topic, entry, priority)
                self._waiting[link] = None
        self._plan(own)

    def control(self, peer: bytes, frame: bytes) -> None:
        """Queue a control frame."""
        if (link := self.links.get(peer)) is not None:
            link.push_control(frame)
            self._waiting[link] = None
            self._plan(True)

    def control_to_all(self, frame: bytes) -> None:
        """Queue a control frame for everybody."""
        for peer in self.links:
            self.control(peer, frame)

    def on_copy(self, link: Link, message_id: bytes, now: float) -> None:
        """A peer sent a message that we have."""
        link.withdraw(message_id)
        self._spread.add(message_id, now)

    def _plan(self, at_once: bool) -> None:
        if self._due <= self._next:
            return
        now = trio.current_time()
        due = max(self._next, now if at_once else now + self._limits.flush_s * self._rng.uniform(0.1, 1.0))
        if due <= now:
            self._flush(now)
        elif due < self._due:
            self._set_due(due)

    def _flush(self, now: float) -> None:
        waiting, self._waiting, due = iter(self._waiting), {}, inf
        until = time.perf_counter() + STEP_S
        for link in waiting:
            if not len(link):
                link.flush_at = None
            elif (link.flush_at is not None and link.flush_at <= now) or link.has_news(self._spread):
                link.flush()
            else:
                due = min(due, self._postpone(link, now))
            if time.perf_counter() >= until:  # the others follow when other tasks have had their turn
                self._waiting.update(dict.fromkeys(waiting))
                due = now
        self._set_due(due)
        self._spread.expire(now)
        self._next = now + self._limits.flush_s * self._rng.uniform(0.75, 1.25)

    def _postpone(self, link: Link, now: float) -> float:
        if link.flush_at is None:
            link.flush_at = now + self._limits.spread_s * self._rng.uniform(0.5, 1.0)
        self._waiting[link] = None
        return link.flush_at

    # -- peers --------------------------------------------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> bool:
        """Start writing to a peer; False when that has started before."""
        key = connection.key
        if key in self.links:
            self.reroute(connection)  # the newest connection is the one that is surely alive
            return False
        assert self._nursery is not None
        link = self.links[key] = self._link_for(key, trio.current_time())
        self._nursery.start_soon(self._send_to, key, link)
        return True

    def _link_for(self, key: bytes, now: float) -> Link:
        """A peer that is back at once goes on with the link it had: what waits for it, and its rates."""
        link, parted = self._parted.pop(key, (None, 0.0))
        if link is not None and now - parted < _PARTED_S:
            return link
        if link is not None:
            link.drop_down_to(0)
        return Link(self._limits, now, self.dropped, self._queued)

    def _part(self, key: bytes, link: Link) -> None:
        self._waiting.pop(link, None)
        link.shrink(_PARTED_BYTES)
        self._parted[key] = (link, trio.current_time())
        if len(self._parted) > _PARTED:
            _, (oldest, _) = self._parted.popitem(last=False)
            oldest.drop_down_to(0)

    def reroute(self, connection: Connection) -> None:
        """Another connection with the peer of this one is to be written to."""
        link = self.links.get(connection.key)
        if link is not None and link.sending is not None:
            link.sending.cancel()

    async def _send_to(self, key: bytes, link: Link) -> None:
        """Write to a peer for as long as there is a connection, over its newest one."""
        failures = 0
        try:
            while (connection := self._network.connection_to(key)) is not None:
                try:
                    await self._send_over(connection, link)
                    failures = 0
                except (RequestFailed, MuxedStreamError, MuxedConnUnavailable, trio.TooSlowError) as error:
                    log.debug("no gossip stream to %s: %r", key.hex()[:12], error)
                    failures += 1
                if self._network.connection_to(key) is connection:
                    with trio.move_on_after(min(_REOPEN_S * 2**failures, _REOPEN_MAX_S)):
                        await connection.event_closed.wait()
        finally:
            del self.links[key]
            self._part(key, link)
            self._on_gone(key)

    async def _send_over(self, connection: Connection, link: Link) -> None:
        """Open the gossip stream and write to it, until it ends or a newer connection is there."""
        stream = connection.muxer.open_stream_nowait()
        try:
            with trio.fail_after(self._limits.negotiation_s):
                await stream.write(proposal(PROTOCOL))
                await confirm(stream, PROTOCOL)
            if self._network.connection_to(connection.key) is not connection:
                stream.reset_nowait()  # a better one came meanwhile
                return
            async with trio.open_nursery() as nursery:
                link.sending, link.stream = nursery.cancel_scope, stream  # what is unsent are whole frames
                self.announce_to(link)
                link.flush()
                nursery.start_soon(self._cancel_at_end, stream, nursery.cancel_scope)
                await self._write_unsent(connection, stream, link)
                nursery.cancel_scope.cancel()
            link.sending = link.stream = None
            await stream.close()  # a reset would take back what has not left yet
        except BaseException:
            stream.reset_nowait()
            raise
        finally:
            link.sending = link.stream = None

    def announce_to(self, link: Link) -> None:
        """Tell a peer what we subscribe to."""
        if (frame := self._announce()) is not None:
            link.push_control(frame)
            link.flush()

    async def _write_unsent(self, connection: Connection, stream: MuxedStream, link: Link) -> None:
        """What could not leave at once because the peer, or the way to it, is slow."""
        while True:
            batch = await link.next_unsent()
            try:
                with trio.fail_after(self._limits.send_stall_s):
                    await stream.write(batch)
            except trio.TooSlowError:
                log.warning("peer %s does not read its gossip: disconnecting", connection.key.hex()[:12])
                connection.muxer.abort()
                return
            except MuxedStreamError:
                return
            link.unsent = b""
            link.flush()

    @staticmethod
    async def _cancel_at_end(stream: MuxedStream, scope: trio.CancelScope) -> None:
        """Nothing comes back on this stream but its end; without noticing that we would write into the void."""
        try:
            while True:
                await stream.read()
        except (MuxedStreamEOF, MuxedStreamError):
            scope.cancel()
