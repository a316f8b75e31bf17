"""One machine key in two running processes: a copied data directory, or a stolen key.

Neither connection is closed for the other: which one is right, nobody here can know, and two nodes that throw each
other out would do so for ever. Whoever is connected with both says so in its log and tells both of them over
``/kaisar/key-in-use/1`` (one frame, no answer), because the two never meet: a node does not dial its own key. Gossip
and requests for the key go to the newest connection. What one peer says about our own key is a claim; it is proven by a
handshake with our key, by an address record that was signed with it and not by us, or by peers of two networks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

import trio

from kaisar_p2p.errors import MeshError
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.limits import PeerBuckets
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach.reachability import voice_of
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.wire.codec import AtMost, Exactly, decode, encode, message

log = logging.getLogger(__name__)

PROTOCOL = "/kaisar/key-in-use/1"
FRAME_BYTES = 256
_AGAIN_S = 600.0  # until the same thing is said again
_CONFLICTS = 256
_LOOKED_INTO = 16  # at a time
_TELL_S = 10.0
_VOICES = 2  # networks (/16, /32 of IPv6) that say so; one could lie


@message(9)
@dataclass(frozen=True)
class KeyInUse:
    """Another process is connected with me under your key: its random instance and its IP address."""

    instance: Annotated[bytes, Exactly(8)]
    host: Annotated[str, AtMost(64)]


Tell = Callable[[Connection, str, bytes], Awaitable[None]]


class KeyConflicts:
    """Notices two processes with one key among the peers, and hears when it is our own. `run` is its life."""

    def __init__(self, network: Network, tell: Tell, own_instance: bytes) -> None:
        self._network, self._tell, self._own_instance = network, tell, own_instance
        self._said: OrderedDict[bytes, float] = OrderedDict()  # by key, when
        self._looking: set[bytes] = set()  # keys
        self._heard = PeerBuckets(1 / 60, 2)
        self._heard_at = {False: -_AGAIN_S, True: -_AGAIN_S}
        self._claimed: set[bytes] = set()  # networks whose peers say that our key is in use elsewhere
        self._found, self._to_check = trio.open_memory_channel[tuple[Connection, Connection]](16)
        self.own_key: str | None = None  # who else uses it, in one sentence
        self.own_key_is_proven = False  # not only a claim of peers of one network
        network.on_own_key = self._on_own_key

    def found(self, other: Connection, newest: Connection) -> None:
        """Two connections with one key name different processes."""
        said = trio.current_time() - self._said.get(newest.key, -_AGAIN_S) < _AGAIN_S
        if said or newest.key in self._looking or len(self._looking) >= _LOOKED_INTO:
            return
        with contextlib.suppress(trio.WouldBlock):
            self._found.send_nowait((other, newest))
            self._looking.add(newest.key)

    async def run(self) -> None:
        """Look into what was found, one after the other for each key."""
        async with trio.open_nursery() as nursery:
            async for other, newest in self._to_check:
                nursery.start_soon(self._check, other, newest)

    async def _check(self, other: Connection, newest: Connection) -> None:
        try:
            await self._look_into(other, newest)
        finally:
            self._looking.discard(newest.key)

    async def _look_into(self, other: Connection, newest: Connection) -> None:
        """A process that was killed leaves a connection behind that seems alive until its pings fail: wait for it."""
        with trio.move_on_after(2 * self._network.limits.keepalive_s):
            await other.event_closed.wait()
        now = trio.current_time()
        alive = not other.event_closed.is_set() and other.muxer.last_received > newest.since
        if not alive or newest.event_closed.is_set() or now - self._said.get(newest.key, -_AGAIN_S) < _AGAIN_S:
            return
        self._said[newest.key] = now
        if len(self._said) > _CONFLICTS:
            self._said.popitem(last=False)
        log.warning(
            "two running nodes use the machine key %s, at %s and %s: stop one, or give it a key of its own",
            newest.key.hex(),
            other.remote_host,
            newest.remote_host,
        )
        for informed, about in ((other, newest), (newest, other)):
            notice = encode(KeyInUse(about.instance or bytes(8), about.remote_host[:64]))
            try:
                with trio.fail_after(_TELL_S):
                    await self._tell(informed, PROTOCOL, notice)
            except (MeshError, trio.TooSlowError) as error:
                log.debug("%s does not hear that its key is in use elsewhere: %s", informed.key.hex()[:12], error)

    async def serve(self, connection: Connection, stream: MeshStream) -> None:
        """A peer says that somebody else uses our key; raises DecodeError and RequestFailed."""
        if not self._heard.try_take(connection.key, trio.current_time()):
            await stream.reset()
            return
        notice = decode(KeyInUse, await stream.receive_frame())
        if notice.instance == self._own_instance:
            return
        # At private addresses and over relays anybody has any number of keys: they are one voice.
        if len(self._claimed) < _VOICES:
            self._claimed.add(voice_of(connection.remote_host, b""))
        self._conclude(
            f"peer {connection.key.hex()[:12]} is also connected with it at {notice.host!r}",
            proven=len(self._claimed) >= _VOICES,
        )

    def _on_own_key(self, host: str) -> None:
        self._conclude(f"it dialed this node from {host}", proven=True)

    def on_twin(self) -> None:
        """Peers have an address record that was signed with our key, by somebody else."""
        self._conclude("it tells peers its own addresses, signed with the key", proven=True)

    def _conclude(self, how: str, *, proven: bool) -> None:
        if self.own_key_is_proven and not proven:
            return
        self.own_key_is_proven = proven
        said = "another process uses this node's machine key"
        self.own_key = f"{said}: {how}" if proven else f"a peer claims that {said}: {how}"
        now = trio.current_time()
        if now - self._heard_at[proven] >= _AGAIN_S:
            self._heard_at[proven] = now
            log.log(
                logging.ERROR if proven else logging.WARNING,
                "%s. Each gets a part of what is meant for the other, and both may sign what contradicts:"
                " stop one of them, and give it a data directory with a key of its own",
                self.own_key,
            )
