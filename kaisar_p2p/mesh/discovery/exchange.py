"""Peer exchange, ``/kaisar/peers/2``: one frame each way, on every new connection, when our addresses change, and now
and then on a random connection.

The question carries the asker's own signed record and whom it looks for; the answer the other's, and up to 16 more.
Both name the process (`instance`) and the network: peers of another network part at once. Every record is checked
(`records`), so that what a liar can do is to leave out.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Protocol

import trio

from kaisar_p2p.errors import DecodeError, MeshError, SignatureError
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.address_book import AddressBook
from kaisar_p2p.mesh.discovery.addresses import CircuitAddress
from kaisar_p2p.mesh.discovery.records import RECORD_BYTES, OwnRecord, Record, open_record
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.wire.codec import U8, AtMost, Bytes32, Count, Exactly, decode, encode, message

log = logging.getLogger(__name__)

PROTOCOL = "/kaisar/peers/2"
FRAME_BYTES = 48 * 1024
MAX_WANTED = 4
SHARED_RECORDS = 16
DEADLINE_S = 5.0

_Instance = Annotated[bytes, Exactly(8)]
_Envelope = Annotated[bytes, AtMost(RECORD_BYTES)]


@message(5)
@dataclass(frozen=True)
class PeersQuestion:
    """The asker's own record, the keys that it looks for, and the services that it would like to find."""

    instance: _Instance  # random per process: two processes with one key differ
    network: Bytes32
    record: _Envelope
    wanted: Annotated[tuple[Bytes32, ...], Count(MAX_WANTED)]
    services: U8


@message(6)
@dataclass(frozen=True)
class PeersAnswer:
    """The answerer's own record, and those of others: wanted ones first."""

    instance: _Instance
    network: Bytes32
    record: _Envelope
    records: Annotated[tuple[_Envelope, ...], Count(SHARED_RECORDS)]


class Requester(Protocol):
    """`Mesh.request` on one given connection."""

    def __call__(self, connection: Connection, payload: bytes) -> Awaitable[bytes]: ...


def source_of(host: str) -> str:
    """What counts as one source of records: an IPv4 address, or the /64 that one IPv6 customer has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "?"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _source(connection: Connection) -> str:
    """Of what a peer brings; all that come over one relay are one."""
    if not connection.relayed:
        return source_of(connection.remote_host)
    relay = (
        connection.address.relay.hex() if isinstance(connection.address, CircuitAddress) else connection.origin.subnet
    )
    return f"relay {relay[:16]}"


class PeerExchange:
    """Asks, answers and learns; it decides nothing about connections, but tells `on_met` and `on_foreign`."""

    def __init__(
        self,
        network: bytes,
        own: OwnRecord,
        book: AddressBook,
        request: Requester,
        connected: Callable[[], list[bytes]],
        rng: random.Random,
        own_key: bytes,
    ) -> None:
        self.instance = secrets.token_bytes(8)
        self.on_met: Callable[[Connection], None] = lambda _connection: None
        self.on_foreign: Callable[[Connection], None] = lambda _connection: None
        self.on_twin: Callable[[], None] = lambda: None  # another process signs with our key
        self._network = network
        self._own, self._own_key = own, own_key
        self._book = book
        self._request = request
        self._connected = connected
        self._rng = rng

    async def ask(self, connection: Connection, wanted: Iterable[bytes] = (), services: int = 0) -> list[bytes] | None:
        """Tell a peer about us and learn from it; the keys of the records that it told, None when it did not answer."""
        keys = tuple(wanted)[:MAX_WANTED]
        question = PeersQuestion(self.instance, self._network, self._own.envelope(), keys, services)
        try:
            with trio.fail_after(DEADLINE_S):
                answer = decode(PeersAnswer, await self._request(connection, encode(question)))
        except (MeshError, DecodeError, trio.TooSlowError) as error:
            log.debug("no peer exchange with %s: %s", connection.key.hex()[:12], error)
            return None
        if not self._meet(connection, answer):
            return None
        return [key for envelope in answer.records if (key := self._learn(connection, envelope)) is not None]

    async def serve(self, connection: Connection, stream: MeshStream) -> None:
        """Answer a peer's question."""
        question = decode(PeersQuestion, await stream.receive_frame())
        if self._meet(connection, question):
            own, records = self._own.envelope(), self._choose(connection.key, question)
        else:
            own, records = b"", ()
        await stream.send_frame(encode(PeersAnswer(self.instance, self._network, own, records)))

    # -- learning -----------------------------------------------------------------------------------------------------

    def _meet(self, connection: Connection, told: PeersQuestion | PeersAnswer) -> bool:
        """What a peer says about itself; False when it is of another network."""
        if told.network != self._network:
            self.on_foreign(connection)
            return False
        if told.record:
            record = self._checked(connection, told.record)
            if record is not None and record.signer == connection.key:
                self._book.take(record, _source(connection), trio.current_time(), itself=True)
                self._note_observed(connection, record)
        connection.instance = told.instance
        self.on_met(connection)
        return True

    def _learn(self, connection: Connection, envelope: bytes) -> bytes | None:
        record = self._checked(connection, envelope)
        if record is None:
            return None
        if record.signer == self._own_key:
            if self._own.proves_twin(record.message):
                self.on_twin()
            self._own.surpass(record.message.sequence)
            return None
        self._book.take(record, _source(connection), trio.current_time())
        return record.signer

    def _checked(self, connection: Connection, envelope: bytes) -> Record | None:
        try:
            return open_record(envelope, self._network, time.time())
        except (DecodeError, SignatureError) as error:
            log.debug("a record from %s is not taken: %s", connection.key.hex()[:12], error)
            return None

    def _note_observed(self, connection: Connection, record: Record) -> None:
        """A peer behind a translated address may answer on its port at the address that we see."""
        host = connection.remote_host
        if not connection.inbound or not host or getattr(connection, "relayed", False):
            return
        ports = {parts[4] for text in record.message.addresses if len(parts := text.split("/")) == 5}
        if len(ports) == 1:
            kind = "ip6" if ":" in host else "ip4"
            self._book.add(connection.key, [f"/{kind}/{host}/tcp/{ports.pop()}"], source=source_of(host))

    # -- answering ----------------------------------------------------------------------------------------------------

    def _choose(self, asker: bytes, question: PeersQuestion) -> tuple[bytes, ...]:
        """Its own if ours is newer, the wanted, those with the services, connected peers, then any."""
        now, book, rng = trio.current_time(), self._book, self._rng
        chosen: dict[bytes, Record] = {}

        def choose(keys: Iterable[bytes], most: int) -> None:
            for key in keys:
                record = book.record_of(key, now)
                if record is not None and key not in chosen and key != asker and len(chosen) < most:
                    chosen[key] = record

        choose(question.wanted, SHARED_RECORDS)
        if question.services:
            choose(_some(book.offering(question.services, now), rng), SHARED_RECORDS // 2)
        choose(_some(self._connected(), rng), SHARED_RECORDS * 3 // 4)
        for record in book.sample(SHARED_RECORDS, rng, now, without=(asker, *chosen)):
            chosen.setdefault(record.signer, record)
        told = [record.envelope for record in chosen.values()]
        known = book.record_of(asker, now)
        if known is not None and known.envelope != question.record:
            told.insert(0, known.envelope)
        return tuple(told[:SHARED_RECORDS])


def _some(keys: list[bytes], rng: random.Random) -> list[bytes]:
    """In random order, as many as could be told: thousands may be known, and a question is to cost little."""
    return rng.sample(keys, min(len(keys), 4 * SHARED_RECORDS))
