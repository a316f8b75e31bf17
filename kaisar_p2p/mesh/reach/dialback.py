"""Asking peers how they see us, and to dial us back.

``/kaisar/reach/1`` is one frame each way. The question carries our clock and, in a dial-back, up to four ports with a
secret each; the answer the address that the peer sees us at, its clock, and what became of each port. A peer dials
only the very address that the question came from: it cannot be used against others. It speaks
``/kaisar/reach/back/1`` in place of a security protocol: agree by multistream-select, hand over the secret, get one
byte back, close. A listener of another kind never receives a byte that the asker chose.

The rules for what the answers mean are in `kaisar_p2p.mesh.reach.reachability`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import trio

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.connection import Connection, TcpStream
from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.limits import PeerBuckets, TokenBucket
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.reach.dialed_back import BACK_PROTOCOL, SECRET_BYTES, TAKEN
from kaisar_p2p.mesh.reach.reachability import host_of, is_public, kind_of, voice_of
from kaisar_p2p.mesh.streams import MeshStream
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream
from kaisar_p2p.wire.codec import U8, U16, U64, AtMost, Count, Exactly, decode, encode, message

from libp2p.io.exceptions import IOException  # isort: skip

log = logging.getLogger(__name__)

PROTOCOL = "/kaisar/reach/1"
FRAME_BYTES = 1024
PORTS = 4
REFUSED, DIALED, FAILED = 0, 1, 2
_QUESTIONS_PER_S, _QUESTIONS_BURST = 0.5, 8.0  # of one peer
_DIALS_PER_S, _DIALS_BURST = 0.1, 8.0  # for one voice


@message(7)
@dataclass(frozen=True)
class Question:
    """How do you see me; and, for each port, hand this secret over there."""

    clock_ms: U64
    ports: Annotated[tuple[U16, ...], Count(PORTS)]
    secrets: Annotated[tuple[Annotated[bytes, Exactly(SECRET_BYTES)], ...], Count(PORTS)]


@message(8)
@dataclass(frozen=True)
class Answer:
    """The IP address and port that I see you at, my clock, and for each port REFUSED, DIALED or FAILED."""

    host: Annotated[str, AtMost(45)]
    port: U16
    clock_ms: U64
    results: Annotated[tuple[U8, ...], Count(PORTS)]


class DialBackServer:
    """Answers questions; dials back within limits."""

    def __init__(self, network: Network, wall_clock: Callable[[], float], *, allow_private: bool) -> None:
        self._network = network
        self._wall_clock = wall_clock
        self._allow_private = allow_private
        limits = network.limits
        self._questions = PeerBuckets(_QUESTIONS_PER_S, _QUESTIONS_BURST)
        self._dials = PeerBuckets(_DIALS_PER_S, _DIALS_BURST)
        self._all_dials: TokenBucket | None = None
        self._slots = trio.CapacityLimiter(max(1, limits.dialbacks))

    async def handle(self, connection: Connection, stream: MuxedStream) -> None:
        """Serve a stream of `PROTOCOL`; raises what `serve` does, and TooSlowError."""
        limits = self._network.limits
        async with MeshStream(stream, connection.key, PROTOCOL, FRAME_BYTES) as frames:
            with trio.fail_after(limits.negotiation_s + limits.dial_s):
                await self.serve(connection, frames)

    async def serve(self, connection: Connection, stream: MeshStream) -> None:
        """Answer one question; RequestFailed when the peer asks too often, DecodeError for garbage."""
        if not self._questions.try_take(connection.key, trio.current_time()):
            self._network.refused[PROTOCOL] += 1
            raise RequestFailed("the peer asks too often how it is seen")
        question = decode(Question, await stream.receive_frame())
        host, port = _seen_at(connection)
        results = await self._dial_back(connection, question, host)
        await stream.send_frame(encode(Answer(host, port, _milliseconds(self._wall_clock), results)))

    async def _dial_back(self, connection: Connection, question: Question, host: str) -> tuple[int, ...]:
        ports = question.ports[: len(question.secrets)]
        results = [REFUSED] * len(ports)
        async with trio.open_nursery() as nursery:
            for i, port in enumerate(ports):
                if port and self._may_dial(connection, host):
                    nursery.start_soon(self._dial, results, i, Address(kind_of(host), host, port), question.secrets[i])
        return tuple(results)

    def _may_dial(self, connection: Connection, host: str) -> bool:
        """Dialing for others is bounded; never through a relay's address, nor into private networks."""
        now, limits = trio.current_time(), self._network.limits
        may_be = bool(host) and (self._allow_private or is_public(host))
        if connection.relayed or not may_be or not limits.dialbacks:
            return False
        if self._all_dials is None:
            self._all_dials = TokenBucket(limits.dialbacks_per_s, 4 * limits.dialbacks_per_s, now)
        if self._slots.available_tokens < 1 or not self._dials.try_take(voice_of(host, connection.key), now):
            return False
        return self._all_dials.try_take(1, now)

    async def _dial(self, results: list[int], i: int, address: Address, secret: bytes) -> None:
        async with self._slots:
            try:
                with trio.fail_after(self._network.limits.dial_s):
                    results[i] = DIALED if await hand_over(self._network, address, secret) else FAILED
            except (OSError, IOException, trio.TooSlowError) as error:
                log.debug("cannot dial back %s: %r", address, error)
                results[i] = FAILED


async def hand_over(network: Network, address: Address, secret: bytes) -> bool:
    """Dial from a fresh port and hand the secret over; whether whoever listens there took it.

    Raises OSError when it cannot be dialed, or IOException when something of another swarm listens there.
    """
    tcp = await network.open_raw(
        address, fresh_port=True
    )  # from the port that we listen on, a NAT would let it pass as known
    try:
        agreement = proposal(BACK_PROTOCOL)  # what we say and what a node echoes are the same bytes
        await tcp.write(agreement)
        if await _read_exactly(tcp, len(agreement)) != agreement:
            return False
        await tcp.write(secret)
        return await _read_exactly(tcp, 1) == TAKEN
    except IOException:  # it broke
        return False
    finally:
        await trio.aclose_forcefully(tcp.stream)


async def _read_exactly(tcp: TcpStream, count: int) -> bytes:
    """Fewer bytes when the other end closes."""
    data = b""
    while len(data) < count and (part := await tcp.read(count - len(data))):
        data += part
    return data


def _seen_at(connection: Connection) -> tuple[str, int]:
    found = connection.muxer.get_remote_address()
    try:
        return (host_of(found[0]), found[1]) if found is not None else ("", 0)
    except ValueError:
        return "", 0


def _milliseconds(wall_clock: Callable[[], float]) -> int:
    return max(0, int(wall_clock() * 1000))
