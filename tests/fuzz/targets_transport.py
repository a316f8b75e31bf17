"""What is below streams: the handshake, encrypted frames, yamux, multistream-select."""

from __future__ import annotations

import os
import struct
from collections.abc import Awaitable, Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from nacl.signing import SigningKey

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal, respond
from kaisar_p2p.mesh.transport.noise import Decryption
from kaisar_p2p.mesh.transport.noise_handshake import (
    SIGNED_PREFIX,
    Established,
    Handshake,
    HandshakeFailed,
    Identity,
    nonce_of,
    read_payload,
)
from kaisar_p2p.mesh.transport.yamux import Muxer
from kaisar_p2p.mesh.transport.yamux_frames import ConnectionOver, ProtocolViolation
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream
from tests.fuzz.engine import Target, chunks
from tests.fuzz.streams import FakeStream

_SCRATCH = bytearray(512 * 1024)


def _identity(seed: bytes) -> Identity:
    key, static = SigningKey(seed), X25519PrivateKey.from_private_bytes(seed)
    signature = key.sign(SIGNED_PREFIX + static.public_key().public_bytes_raw()).signature
    return Identity.of(static, bytes(key.verify_key), signature, ("/yamux/1.0.0",))


_OURS, _THEIRS = _identity(bytes(range(32))), _identity(bytes(range(32, 64)))
_STATIC = _THEIRS.static.public_key().public_bytes_raw()


def _handshake() -> tuple[list[bytes], Established, Established]:
    """The three messages, and both outcomes."""
    initiator, responder = Handshake(_THEIRS), Handshake(_OURS)
    first = initiator.first()
    responder.read_first(first)
    second = responder.second()
    initiator.read_second(second)
    third, theirs = initiator.third()
    return [first, second, third], theirs, responder.read_third(third)


# -- the handshake ----------------------------------------------------------------------------------------------------


async def _as_responder(data: bytes) -> None:
    """Message one is the attacker's; so is the third, which cannot authenticate."""
    responder = Handshake(_OURS)
    responder.read_first(data[:64])
    responder.second()
    responder.read_third(data[64:])


async def _as_initiator(data: bytes) -> None:
    initiator = Handshake(_OURS)
    initiator.first()
    initiator.read_second(data)
    initiator.third()


async def _payload(data: bytes) -> None:
    """What an attacker with correct Noise can say."""
    key, muxers = read_payload(data, _STATIC)
    assert len(key) == 32 and len(muxers) <= 16


# -- frames of the session --------------------------------------------------------------------------------------------


def _encrypted() -> tuple[list[bytes], Established, bytes]:
    _, theirs, ours = _handshake()
    texts = [b"", b"x", os.urandom(12), os.urandom(300), bytes(2000)]
    plain = b"".join(texts) * 2
    sealed = [theirs.sending.encrypt(nonce_of(n), text, None) for n, text in enumerate(texts * 2)]
    frames = [len(s).to_bytes(2, "big") + s for s in sealed]
    return [b"".join(frames[:n]) for n in range(1, len(frames) + 1)], ours, plain


_FRAMES, _SESSION, _PLAIN = _encrypted()


async def _session(data: bytes) -> None:
    decryption, plain = Decryption(_SESSION, _SCRATCH), b""
    try:
        for part in chunks(data):
            plain += decryption.feed(part)
    finally:
        assert _PLAIN.startswith(plain), "plaintext that the peer did not encrypt"


# -- yamux ------------------------------------------------------------------------------------------------------------


class _NoSession:
    """A session that nobody reads: frames are given to the muxer directly."""

    is_initiator = False
    plaintext = bytearray()

    def get_remote_address(self) -> tuple[str, int]:
        return "192.0.2.1", 1


_HEADER = struct.Struct("!BBHII")
_LIMITS = MeshLimits(buffered_bytes=1 << 20)


def _yamux_seeds() -> list[bytes]:
    def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
        return _HEADER.pack(0, kind, flags, stream, length) + body

    opened = frame(1, 1, 1, 0) + frame(0, 0, 1, 5, b"hello")
    return [
        opened + frame(0, 4, 1, 0),
        opened + frame(1, 8, 1, 0),
        opened + frame(1, 0, 1, 1 << 20),
        frame(0, 1, 3, 100, bytes(100)) + frame(0, 0, 3, 200, bytes(200)) + frame(1, 4, 3, 0),
        frame(2, 1, 0, 7) + frame(2, 2, 0, 1),
        frame(3, 0, 0, 0),
        b"".join(frame(1, 1, n, 0) for n in range(1, 60, 2)),
        frame(1, 1, 1, 0) + frame(0, 0, 1, 60000, bytes(60000)) * 5,
        frame(1, 2, 2, 0) + frame(0, 0, 2, 3, b"abc") + frame(1, 8, 2, 0),
    ]


async def _yamux(data: bytes) -> None:
    muxer = Muxer(_NoSession(), b"peer", limits=_LIMITS)  # type: ignore[arg-type]
    muxer.event_started.set()
    streams: list[MuxedStream] = []
    muxer.on_stream = streams.append
    ours = muxer.open_stream_nowait()  # id 2
    try:
        for part in chunks(data):
            muxer.feed(memoryview(part))
    finally:
        assert len(streams) <= muxer.stream_count + len(data) // 12
        assert muxer.stream_count <= _LIMITS.streams_per_connection + 1
        assert 0 <= muxer.received.held <= len(data)
        answered = sum(map(len, muxer._outbox._control))
        assert answered <= 12 * (len(data) // 12 + 2), "more is answered than was sent"
    ours.reset_nowait()


# -- multistream-select -----------------------------------------------------------------------------------------------

_NAMES = frozenset({"/echo", "/meshsub/1.1.0", "/ipfs/ping/1.0.0"})


def _lines(*texts: bytes) -> bytes:
    return b"".join(bytes([len(text) + 1]) + text + b"\n" for text in texts)


_NEGOTIATIONS = [
    proposal("/echo"),
    proposal("/nobody/speaks/this"),
    _lines(b"/multistream/1.0.0"),
    _lines(b"/multistream/1.0.0", b"na"),
    _lines(b"/multistream/1.0.0", b"/a", b"/b", b"/c", b"/echo"),
    _lines(b"/multistream/1.0.0", b"ls"),
    b"\xff\x01" + bytes(300),
    b"\x81\x00\n",
]


async def _responds(data: bytes) -> None:
    assert await respond(FakeStream(data), _NAMES.__contains__) in _NAMES  # type: ignore[arg-type]


async def _confirms(data: bytes) -> None:
    await confirm(FakeStream(data), "/echo")  # type: ignore[arg-type]


def _both(*runs: Callable[[bytes], Awaitable[None]]) -> Callable[[bytes], Awaitable[None]]:
    """Each input goes to one of several, which one says its length."""

    async def run(data: bytes) -> None:
        await runs[len(data) % len(runs)](data)

    return run


def targets() -> list[Target]:
    """Of this module, made anew."""
    messages, _, _ = _handshake()
    first, second, third = messages
    seeds = [first + bytes(32) + third, second, first, _OURS.payload]
    return [
        Target("noise", _FRAMES, _session, (ProtocolViolation,), share=1.5),
        Target("handshake", seeds, _both(_as_responder, _as_initiator), (HandshakeFailed,), share=0.2),
        Target("payload", [_THEIRS.payload, _OURS.payload], _payload, (HandshakeFailed,), share=0.5),
        Target("yamux", _yamux_seeds(), _yamux, (ProtocolViolation, ConnectionOver), share=2.0),
        Target("multistream", _NEGOTIATIONS, _both(_responds, _confirms), (RequestFailed,), share=1.5),
    ]
