"""What comes in streams: frames, messages, addresses, gossip, and every request handler of a running mesh."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from nacl.signing import SigningKey

from kaisar_p2p.errors import ConfigError, DecodeError, MeshError, PeerUnreachable, SignatureError
from kaisar_p2p.mesh import Mesh, MeshConfig, MeshLimits, MeshStream, open_mesh
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery import addresses, exchange, records
from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.ids import id_of
from kaisar_p2p.mesh.reach import circuit_wire
from kaisar_p2p.mesh.transport import pnet
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.mesh.transport.yamux_frames import ProtocolViolation
from kaisar_p2p.wire import codec
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from kaisar_p2p.wire.verdict import Verdict
from tests.fuzz.engine import Target
from tests.fuzz.streams import FakeStream

from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.io.exceptions import ConnectionClosedError  # isort: skip
from libp2p.pubsub.pb import rpc_pb2  # isort: skip
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError  # isort: skip

GOSSIP = "/meshsub/1.1.0"
TOPIC = "/kaisar/fuzz/advert/1"
_SEED = bytes(range(32))
_KEY = SigningKey(_SEED)
_NETWORK = records.network_id("fuzz")
_FRAME_BYTES = 4096


# -- frames and texts --------------------------------------------------------------------------------------------------


async def _frames(data: bytes) -> None:
    """Two frames of a request stream."""
    stream = MeshStream(FakeStream(data), b"peer", "/echo", _FRAME_BYTES)  # type: ignore[arg-type]
    for _ in range(2):
        assert len(await stream.receive_frame()) <= _FRAME_BYTES


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


async def _address(data: bytes) -> None:
    parsed, key = addresses.parse_any(data.decode("utf-8", "replace"))
    assert key is None or len(key) == 32
    assert isinstance(parsed.is_private, bool) and isinstance(parsed.is_wildcard, bool)
    again, _ = addresses.parse_any(str(parsed))
    assert again == parsed


def _address_seeds() -> list[bytes]:
    peer = id_of(bytes(_KEY.verify_key))
    texts = [
        "/ip4/127.0.0.1/tcp/4001",
        f"/ip4/8.8.8.8/tcp/4001/p2p/{peer}",
        "/ip6/2001:db8::1/tcp/1",
        f"/dns4/example.org/tcp/65535/p2p/{peer}",
        f"/ip4/8.8.8.8/tcp/4001/p2p/{peer}/p2p-circuit",
        f"/ip4/8.8.8.8/tcp/4001/p2p/{peer}/p2p-circuit/p2p/{peer}",
        "/ip6/fe80::1%eth0/tcp/80",
        "/ip4/255.255.255.255/udp/1/quic-v1",
    ]
    return [text.encode() for text in texts]


# -- private swarms ---------------------------------------------------------------------------------------------------


_HELLO = b"\x13/multistream/1.0.0\n"
_PRIVATE = [pnet.format_key(bytes(range(32))).encode(), _HELLO, _HELLO + b"\x07/noise\n", _HELLO * 2]


class _Tcp:
    """As much of a socket as the check of a first word needs."""

    def __init__(self, data: bytes) -> None:
        self._stream = FakeStream(data)

    async def receive_some(self, most: int | None = None) -> bytes:
        try:
            return await self._stream.read(most)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError:
            raise trio.BrokenResourceError("reset") from None


async def _private(data: bytes) -> None:
    """A key file, and the first words of a connection."""
    if len(data) % 2:
        assert len(pnet.parse_key(data.decode("utf-8", "replace"))) == 32
    else:
        stream = pnet.CheckedStream(_Tcp(data))  # type: ignore[arg-type]
        assert (await stream.read(100)).startswith(b"\x13/mult"[:1])


# -- relays -----------------------------------------------------------------------------------------------------------


async def _circuit(data: bytes) -> None:
    kinds = (circuit_wire.HopMessage, circuit_wire.StopMessage, circuit_wire.PunchMessage)
    message = kinds[len(data) % 3].decode(data)
    if isinstance(message, circuit_wire.PunchMessage):
        circuit_wire.addresses_of(message.addresses)
    elif isinstance(message, circuit_wire.HopMessage) and message.reservation is not None:
        circuit_wire.addresses_of(message.reservation.addresses)


def _circuit_seeds() -> list[bytes]:
    address = circuit_wire.binary_of("/ip4/8.8.8.8/tcp/4001")
    reservation = circuit_wire.Reservation(1 << 31, (address, address), circuit_wire.voucher(_KEY, bytes(32), 1 << 31))
    limit = circuit_wire.Limit(120, 1 << 17)
    return [
        circuit_wire.HopMessage(0).encode(),
        circuit_wire.HopMessage(2, b"p" * 38, reservation, limit, 100).encode(),
        circuit_wire.StopMessage(0, b"p" * 38, limit).encode(),
        circuit_wire.PunchMessage(100, (address,) * 5).encode(),
        circuit_wire.PunchMessage(300).encode(),
    ]


# -- records and messages of the codec --------------------------------------------------------------------------------


def _record_seeds() -> list[bytes]:
    now, key = int(time.time()), KeyPair.from_seed(_SEED)
    texts = ("/ip4/8.8.8.8/tcp/4001", "/ip4/127.0.0.1/tcp/2")
    return [
        seal(records.AddressRecord(bytes(_KEY.verify_key), n, texts, now, 3600, 3), key, _NETWORK) for n in (1, 1 << 40)
    ]


async def _record(data: bytes) -> None:
    records.open_record(data, _NETWORK, time.time())


def _codec_seeds() -> list[bytes]:
    key, record = bytes(_KEY.verify_key), _record_seeds()[0]
    texts = ("/ip4/8.8.8.8/tcp/4001", "/ip6/::1/tcp/2")
    return [
        codec.encode(records.AddressRecord(key, 7, texts, 1 << 31, 3600, 3)),
        codec.encode(exchange.PeersQuestion(bytes(8), _NETWORK, record, (key, bytes(32)), 1)),
        codec.encode(exchange.PeersAnswer(bytes(8), _NETWORK, record, (record, record))),
        *_record_seeds(),
    ]


def _mesh_messages() -> tuple[type, ...]:
    return tuple(cls for cls in codec.registered().values() if cls.__module__.startswith("kaisar_p2p.mesh"))


async def _codec(data: bytes) -> None:
    codec.decode_any(_mesh_messages(), data)


# -- gossip -----------------------------------------------------------------------------------------------------------


def _gossip_seeds() -> list[bytes]:
    def rpc(**fields: object) -> rpc_pb2.RPC:
        return rpc_pb2.RPC(**fields)

    control = rpc()
    control.control.graft.add(topicID=TOPIC)
    control.control.prune.add(topicID=TOPIC, backoff=60)
    control.control.ihave.add(topicID=TOPIC, messageIDs=[b"m" * 46, b"n" * 46])
    control.control.iwant.add(messageIDs=[b"m" * 46])
    subscription = rpc()
    subscription.subscriptions.add(subscribe=True, topicid=TOPIC)
    subscription.subscriptions.add(subscribe=False, topicid="/kaisar/fuzz/other/1")
    messages = [wire.sign(_KEY, topic, b"data" * 20, n) for n, topic in enumerate((TOPIC, "unknown"))]
    framed = [wire.frame(r.SerializeToString()) for r in (control, subscription)]
    return [*framed, *(wire.publish_frame(message.raw) for message in messages), framed[0] + framed[1]]


class _FakeMuxer:
    """Of a connection that is always there and never carries anything."""

    rtt_s = None
    is_closed = False
    is_established = True
    sent_bytes = received_bytes = stream_count = outbound_count = 0
    violation = None
    last_received = 0.0

    def __init__(self, key: bytes) -> None:
        self.aborted = 0
        self.peer_id = id_of(key)

    def abort(self) -> None:
        self.aborted += 1

    async def wait_without_streams(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def open_stream_nowait(self) -> FakeStream:
        return _Silent(proposal(GOSSIP))

    def get_remote_address(self) -> tuple[str, int]:
        return "192.0.2.1", 4001

    def get_transport_addresses(self) -> list[object]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class _Silent(FakeStream):
    """Takes everything, and says nothing after its agreement."""

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await super().read(n)
        except MuxedStreamError:
            return await trio.sleep_forever()
        except MuxedStreamEOF:
            return await trio.sleep_forever()


def _accept(data: bytes, *_rest: object) -> tuple[Verdict, str]:
    return (Verdict.REJECT, "odd") if len(data) % 7 == 1 else (Verdict.ACCEPT, "")


class _Handlers:
    """A mesh that runs, and one peer of it whose streams are the inputs. Nothing leaves this process."""

    def __init__(self, mesh: Mesh, errors: list[str]) -> None:
        self._mesh, network, self.errors = mesh, mesh._network, errors
        key = bytes(SigningKey(b"p" * 32).verify_key)
        self.connection = Connection(_FakeMuxer(key), network, inbound=True, key=key)  # type: ignore[arg-type]
        network.connection_to = self._connection_to  # type: ignore[method-assign,assignment]
        network.connections_with = lambda _key: [self.connection]  # type: ignore[method-assign,assignment,list-item]
        network.dial = self._no_dial  # type: ignore[method-assign,assignment]
        mesh.subscribe("advert", _accept)
        mesh.serve("/echo", self._echo, max_frame_bytes=_FRAME_BYTES, rate_per_s=1e9)
        self._requests = sorted(set(network.handlers) - {GOSSIP})
        mesh._gossip.on_connected(self.connection)  # type: ignore[arg-type]

    def _connection_to(self, key: bytes) -> Connection | None:
        return self.connection if key == self.connection.key else None

    @staticmethod
    async def _no_dial(*_: object, **__: object) -> None:
        raise PeerUnreachable("nothing is dialed here")

    @staticmethod
    async def _echo(stream: MeshStream) -> None:
        await stream.send_frame(await stream.receive_frame())

    async def gossip(self, data: bytes) -> None:
        """A gossip stream; the handler takes care of everything itself."""
        await self._run(GOSSIP, data)

    async def request(self, data: bytes) -> None:
        """A stream of one of the protocols; its length says which. Slow handlers are cut off, as by a reset."""
        with trio.move_on_after(0.2):
            await self._run(self._requests[len(data) % len(self._requests)], data)

    async def _run(self, protocol: str, data: bytes) -> None:
        stream = FakeStream(data)
        stream.muxed_conn = self.connection.muxer
        await self._mesh._network.handlers[protocol](self.connection, stream)  # type: ignore[arg-type]
        if self.errors:
            raise AssertionError(f"logged as an error: {self.errors.pop()}")


_EDGE = (MeshError, DecodeError, SignatureError, MuxedStreamError, MuxedStreamEOF, ProtocolViolation, trio.TooSlowError)
"""What the task of a stream ends with for a peer's fault; anything else would be a bug of ours, logged with a trace."""


class _Errors(logging.Handler):
    """What the mesh logs as a bug of its own is one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("kaisar_p2p"), _Errors()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@asynccontextmanager
async def opened_targets() -> AsyncIterator[list[Target]]:
    """Of this module; some of them share a mesh that runs as long as the context."""
    limits = MeshLimits(messages_per_s=1e9, messages_burst=1 << 40, bytes_per_s=1e12, bytes_burst=1 << 60)
    config = MeshConfig(network="fuzz", limits=limits, upnp=False, mdns=False)
    with _logged_errors() as errors:
        async with open_mesh(config, _SEED) as mesh:
            yield _targets(_Handlers(mesh, errors))


def _targets(handlers: _Handlers) -> list[Target]:
    bodies = [*_codec_seeds(), *_circuit_seeds(), b"\x00" * 32, b"abc"]
    requests = [_frame(body) for body in bodies] + [bytes([len(b) & 127]) + b for b in _circuit_seeds()]
    return [
        Target("framing", [_frame(b"abc") * 3, _frame(b""), _frame(bytes(4096))], _frames, (MeshError,), share=1.0),
        Target("address", _address_seeds(), _address, (ValueError,), share=1.0),
        Target("circuit", _circuit_seeds(), _circuit, (MeshError,), share=0.7),
        Target("private", _PRIVATE, _private, (ConfigError, ConnectionClosedError), share=0.3),
        Target("record", _record_seeds(), _record, (DecodeError, SignatureError), share=0.5),
        Target("codec", _codec_seeds(), _codec, (DecodeError,), share=0.5),
        Target("gossip", _gossip_seeds(), handlers.gossip, (), share=1.5),
        Target("request", requests, handlers.request, _EDGE, share=0.4),
    ]
