"""Noise transport: libp2p's XX handshake and our own session (https://github.com/libp2p/specs/tree/master/noise).

Why not the library's session: it reads the socket twice and takes several locks for every frame. This one decrypts all
complete frames of a read at once, into memory that is used again.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.ids import id_of
from kaisar_p2p.mesh.transport.negotiation import read_exactly
from kaisar_p2p.mesh.transport.noise_handshake import (
    SIGNED_PREFIX,
    Established,
    Handshake,
    HandshakeFailed,
    Identity,
    nonce_of,
)
from kaisar_p2p.mesh.transport.yamux_frames import ConnectionOver, NotAuthentic, ProtocolViolation

from libp2p.abc import IRawConnection  # isort: skip
from libp2p.connection_types import ConnectionType  # isort: skip
from libp2p.crypto.ed25519 import Ed25519PublicKey  # isort: skip
from libp2p.crypto.keys import KeyPair  # isort: skip
from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.io.exceptions import ConnectionClosedError  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.security.base_session import BaseSession  # isort: skip
from multiaddr import Multiaddr  # isort: skip

PROTOCOL_ID = TProtocol("/noise")
MAX_PLAINTEXT = 65535 - 16  # in one frame
READ_BYTES = 256 * 1024  # asked of the socket at once
WRITE_BYTES = 4 * MAX_PLAINTEXT  # encrypted and sent at once
SEALED_BYTES = WRITE_BYTES + 4 * 18
LAST_NONCE = 2**64 - 2  # 2^64 - 1 is reserved (Noise, chapter 5.1); who gets there has to make a new connection
_HANDSHAKE_BYTES = 4096  # a message of the handshake
_SPARE_BUFFERS = 8

Confirm = Callable[[], Awaitable[None]]


class BufferedRaw:
    """A connection before it is encrypted. What was read too much can be given back.

    What is written leaves when the other side has to answer, or with `flush`: answers in one piece.
    """

    def __init__(self, raw: IRawConnection) -> None:
        self.raw = raw
        self._buffer = self._unsent = b""

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`; b"" at the end."""
        data = self.take()
        if not data:
            await self.flush()
            data = await self.raw.read(n or _HANDSHAKE_BYTES)
        if n is not None and len(data) > n:
            self._buffer = data[n:]
            data = data[:n]
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`, before the next read that has to wait."""
        self._unsent += data

    async def flush(self) -> None:
        """Send what was written."""
        data, self._unsent = self._unsent, b""
        if data:
            await self.raw.write(data)

    def unread(self, data: bytes) -> None:
        """Give back the end of what was read last."""
        self._buffer = data + self._buffer

    def take(self) -> bytes:
        """What was read too much, which is the caller's from now on."""
        data, self._buffer = self._buffer, b""
        return data

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        return self.raw.get_remote_address()


class Decryption:
    """The receiving half of a session, without a socket: bytes in, plaintext out."""

    def __init__(self, established: Established, scratch: bytearray) -> None:
        self.next_nonce = 0
        self._cipher = established.receiving
        self._scratch = memoryview(scratch)
        self._tail = b""  # the beginning of a frame that has not arrived whole

    def feed(self, data: bytes) -> memoryview:
        """The plaintext of all frames that are complete now, valid until any session of the node gets more bytes.

        `data` has up to `READ_BYTES`. Raises ProtocolViolation, and nothing else, when a frame is not the peer's.
        """
        if self._tail:
            data = self._tail + data
        filled, offset, size = 0, 0, len(data)
        scratch, decrypt = self._scratch, self._cipher.decrypt_into
        with memoryview(data) as view:
            while size - offset >= 2:
                end = offset + 2 + (data[offset] << 8 | data[offset + 1])
                if end > size:
                    break
                upto = max(filled, filled + end - offset - 18)
                try:
                    decrypt(self._nonce(), view[offset + 2 : end], None, scratch[filled:upto])
                except (InvalidTag, ValueError):
                    raise NotAuthentic("a Noise frame does not authenticate") from None
                filled, offset = upto, end
        self._tail = data[offset:]
        return scratch[:filled]

    def _nonce(self) -> bytes:
        nonce = self.next_nonce
        if nonce > LAST_NONCE:
            raise ProtocolViolation("the nonces of the connection are used up")
        self.next_nonce = nonce + 1
        return nonce_of(nonce)


class Encryption:
    """The sending half of a session, without a socket."""

    def __init__(self, established: Established) -> None:
        self.next_nonce = 0
        self._cipher = established.sending

    def seal_one(self, data: bytes | memoryview) -> bytes:
        """One frame of up to `MAX_PLAINTEXT` bytes."""
        sealed = self._cipher.encrypt(self._nonce(), data, None)
        return len(sealed).to_bytes(2, "big") + sealed

    def seal_into(self, data: bytes, buffer: bytearray) -> int:
        """Frames of up to `WRITE_BYTES`, into a buffer of `SEALED_BYTES`; the bytes used."""
        used = 0
        with memoryview(data) as plain, memoryview(buffer) as sealed:
            for start in range(0, len(plain), MAX_PLAINTEXT):
                part = plain[start : start + MAX_PLAINTEXT]
                size = len(part) + 16
                sealed[used : used + 2] = size.to_bytes(2, "big")
                used += 2
                self._cipher.encrypt_into(self._nonce(), part, None, sealed[used : used + size])
                used += size
        return used

    def _nonce(self) -> bytes:
        nonce = self.next_nonce
        if nonce > LAST_NONCE:
            raise ConnectionOver("the nonces of the connection are used up")
        self.next_nonce = nonce + 1
        return nonce_of(nonce)


class Buffers:
    """Memory that the sessions of a node use in turns: one buffer to decrypt into, a few to encrypt into."""

    def __init__(self) -> None:
        self.plaintext = bytearray(READ_BYTES + MAX_PLAINTEXT + 18)
        self._sealed: list[bytearray] = []

    def take(self) -> bytearray:
        """A buffer of `SEALED_BYTES`."""
        return self._sealed.pop() if self._sealed else bytearray(SEALED_BYTES)

    def give(self, buffer: bytearray) -> None:
        """Back to the others, unless there are enough of them."""
        if len(self._sealed) < _SPARE_BUFFERS:
            self._sealed.append(buffer)


class NoiseSession(BaseSession):
    """An encrypted connection after the handshake. One task reads, one writes."""

    def __init__(
        self, raw: BufferedRaw, key_pair: KeyPair, outcome: Established, buffers: Buffers, *, initiator: bool
    ) -> None:
        super().__init__(
            local_peer=ID.from_pubkey(key_pair.public_key),
            local_private_key=key_pair.private_key,
            remote_peer=id_of(outcome.peer),
            remote_permanent_pubkey=Ed25519PublicKey.from_bytes(outcome.peer),
            is_initiator=initiator,
        )
        self.remote_muxers = outcome.muxers  # that the peer named in the handshake
        self._raw = raw.raw
        self._unread = raw.take()  # ciphertext that came with the handshake's last message
        self._plaintext = b""  # given back
        self._buffers = buffers
        self._decryption = Decryption(outcome, buffers.plaintext)
        self._encryption = Encryption(outcome)
        self._write_soon: Callable[[bytes], bool] | None = None
        if os.name == "posix":  # elsewhere sockets are no files
            self._write_soon = getattr(getattr(raw.raw, "stream", None), "write_soon", None)  # none over a relay

    async def receive(self, most: int = READ_BYTES) -> memoryview:
        """Wait for more plaintext, reading `most` bytes at once; it is gone at the next checkpoint.

        Raises ConnectionClosedError at the end of the connection, ProtocolViolation for a frame that is not the peer's.
        """
        if self._plaintext:
            data, self._plaintext = self._plaintext, b""
            return memoryview(data)
        while True:
            data = self._unread or await self._raw.read(most)
            self._unread = b""
            if not data:
                raise ConnectionClosedError("connection closed")
            plaintext = self._decryption.feed(data)
            if plaintext:
                return plaintext

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`; for the negotiation before the muxer runs."""
        data = bytes(await self.receive())
        if n is not None and len(data) > n:
            self._plaintext = data[n:]
            data = data[:n]
        return data

    def unread(self, data: bytes) -> None:
        """Give back the end of what was read last."""
        self._plaintext = data + self._plaintext

    async def write(self, data: bytes) -> None:
        """Encrypt and send, up to `WRITE_BYTES` in one system call."""
        if len(data) <= MAX_PLAINTEXT:
            await self._raw.write(self._encryption.seal_one(data))
            return
        for start in range(0, len(data), WRITE_BYTES):
            await self._write_many(data[start : start + WRITE_BYTES])

    def write_soon(self, data: bytes) -> bool:
        """Encrypt and send a few bytes without waiting, while no `write` is under way.

        False: that is not possible here, or part of it leaves with the next `write`, of which there should be one.
        """
        return self._write_soon is not None and self._write_soon(self._encryption.seal_one(data))

    async def _write_many(self, data: bytes) -> None:
        buffer = self._buffers.take()
        try:
            used = self._encryption.seal_into(data, buffer)
            await self._raw.write(memoryview(buffer)[:used])  # type: ignore[arg-type]  # trio takes it as it is
        finally:
            self._buffers.give(buffer)

    async def close(self) -> None:
        """Close the connection below."""
        await self._raw.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The peer's address as a multiaddr."""
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self._raw.get_connection_type()


class NoiseTransport:
    """Runs handshakes; the static key is fresh in every process, the machine key signs it once."""

    def __init__(self, key_pair: KeyPair, muxers: tuple[str, ...]) -> None:
        static = X25519PrivateKey.generate()
        signature = key_pair.private_key.sign(SIGNED_PREFIX + static.public_key().public_bytes_raw())
        self._identity = Identity.of(static, key_pair.public_key.to_bytes(), signature, muxers)
        self._key_pair = key_pair
        self._buffers = Buffers()

    async def secure_outbound(self, raw: BufferedRaw, peer: ID, before: bytes, agreed: Confirm) -> NoiseSession:
        """The initiator's side; fails when the peer is not `peer`.

        `before` leaves with the first message, and `agreed` reads the answer to it: one round trip for both.
        """
        handshake = Handshake(self._identity)
        await raw.write(before + _framed(handshake.first()))
        await agreed()
        handshake.read_second(await _message(raw))
        last, outcome = handshake.third()
        if id_of(outcome.peer) != peer:
            raise HandshakeFailed("another peer answers there")
        await raw.write(_framed(last))
        await raw.flush()
        return NoiseSession(raw, self._key_pair, outcome, self._buffers, initiator=True)

    async def secure_inbound(self, raw: BufferedRaw) -> NoiseSession:
        """The responder's side."""
        handshake = Handshake(self._identity)
        handshake.read_first(await _message(raw))
        await raw.write(_framed(handshake.second()))
        outcome = handshake.read_third(await _message(raw))
        return NoiseSession(raw, self._key_pair, outcome, self._buffers, initiator=False)


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


async def _message(raw: BufferedRaw) -> bytes:
    size = int.from_bytes(await read_exactly(raw, 2), "big")
    if size > _HANDSHAKE_BYTES:
        raise HandshakeFailed(f"a message of the Noise handshake has {size} bytes")
    return await read_exactly(raw, size)
