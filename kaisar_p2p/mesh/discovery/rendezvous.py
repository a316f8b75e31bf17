"""How a peer is found by its key, and how others find us.

Why no distributed hash table. The ledger lists the bootstrap nodes and every worker advertises itself, so that the
only questions left are "who else is there" and "where is this key now". Swarms have tens to some thousands of nodes:
4,096 signed records, of which each node keeps as many as it hears of, are eight megabytes, where a table of buckets
would need as many look-ups, keep-alives and republications to hold a fraction. And a DHT decides by the distance of
freely chosen keys who answers for whom, which is what makes it easy to surround a key; here everybody may answer for
everybody, answers carry the signature of whom they are about (`records`), and liars can only be silent.

Rendezvous instead: a node leaves its record with everybody that it connects to, and with at least three that are
reachable from everywhere or were named by the ledger or a person; those have heard of nearly all. A key is looked for
at those first, then in a few hops at peers that they name.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import trio

from kaisar_p2p.errors import PeerUnreachable
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.exchange import PeerExchange
from kaisar_p2p.mesh.discovery.records import RENDEZVOUS
from kaisar_p2p.mesh.network import Network

log = logging.getLogger(__name__)

_HOPS, _ASKED_PER_HOP = 3, 3
_LOOK_S = 10.0
_PUBLISHED_TO = 3
_PUBLISH_S = 900.0


class Dialer(Protocol):
    """What of `Discovery` is used here."""

    async def dial(self, key: bytes) -> Connection:
        """The connection with a peer whose addresses are known; PeerUnreachable."""
        ...

    async def pause(self, delay_s: float) -> None:
        """Sleep, but not when the network may have changed."""
        ...

    def is_kept(self, key: bytes) -> bool:
        """A person or the ledger named it."""
        ...

    def is_foreign(self, key: bytes) -> bool:
        """It is of another network."""
        ...


class Rendezvous:
    """Looks for keys and leaves our record where others look. `run` is its life."""

    def __init__(
        self, network: Network, book: AddressBook, exchange: PeerExchange, dialer: Dialer, rng: random.Random
    ) -> None:
        self._network, self._book, self._exchange, self._dialer, self._rng = network, book, exchange, dialer, rng
        self._own = bytes(network.get_peer_id().to_bytes()[6:])
        self._looking: dict[bytes, trio.Event] = {}

    async def look_for(self, key: bytes) -> None:
        """Bring the addresses of a peer into the book, if anybody knows them; who want the same share a search."""
        ongoing = self._looking.get(key)
        if ongoing is not None:
            await ongoing.wait()
            return
        self._looking[key] = done = trio.Event()
        try:
            await self._ask_around(key)
        finally:
            del self._looking[key]
            done.set()

    async def _ask_around(self, key: bytes) -> None:
        """Ask those who know many, then peers that they name: a few hops, a few peers each, some seconds in all."""
        asked: set[bytes] = {self._own, key}
        named: list[bytes] = []
        with trio.move_on_after(_LOOK_S):
            for _ in range(_HOPS):
                to_ask = self._whom_to_ask(named, asked)
                async with trio.open_nursery() as nursery:
                    for peer in to_ask:
                        asked.add(peer)
                        nursery.start_soon(self._ask_about, peer, key, named)
                if self._book.of(key) or not to_ask:
                    return

    def _whom_to_ask(self, named: Iterable[bytes], asked: set[bytes]) -> list[bytes]:
        """Kept and public peers, on later hops those that were named, then the others that we are connected with."""
        connected = self._network.connected_keys()
        self._rng.shuffle(connected)
        kept = [peer for peer in connected if self._dialer.is_kept(peer)]
        public = self._book.offering(RENDEZVOUS, trio.current_time())
        known, public_too = set(connected), set(public)
        ranked = [*kept, *(peer for peer in connected if peer in public_too), *named, *connected, *public]
        fresh = (peer for peer in dict.fromkeys(ranked) if peer not in asked)
        return list(islice((peer for peer in fresh if peer in known or self._can_dial(peer)), _ASKED_PER_HOP))

    def _can_dial(self, peer: bytes) -> bool:
        return bool(self._book.of(peer)) and not self._dialer.is_foreign(peer)

    async def _ask_about(self, peer: bytes, key: bytes, named: list[bytes]) -> None:
        was_connected = self._network.connection_to(peer) is not None
        try:
            connection = await self._dialer.dial(peer)
        except PeerUnreachable as error:
            log.debug("cannot ask about %s: %s", key.hex()[:12], error.message)
            return
        told = await self._exchange.ask(connection, (key,), RENDEZVOUS)
        named += told or ()
        surplus = not was_connected and len(self._network.connected_keys()) > self._network.limits.target_peers
        if surplus and not connection.busy:  # somebody else may have begun to use it
            await connection.close()

    async def run(self) -> None:
        """Leave our record with a few that everybody finds, before the one that they have is over."""
        while True:
            await self._dialer.pause(min(_PUBLISH_S, self._network.limits.record_s / 4) * self._rng.uniform(0.5, 1.0))
            public = self._book.offering(RENDEZVOUS, trio.current_time())
            kept = [key for key in self._book.peers() if self._dialer.is_kept(key)]
            known = [*kept, *self._rng.sample(public, len(public))]
            connected_first = sorted(dict.fromkeys(known), key=lambda key: self._network.connection_to(key) is None)
            for key in connected_first[:_PUBLISHED_TO]:
                with trio.move_on_after(_LOOK_S):
                    await self._ask_about(key, self._own, [])
