"""Noise transport: libp2p's XX handshake, then our own session.

Why not the library's session: it reads the socket twice and takes several locks for every frame. This one decrypts
all complete frames of a read at once and hands the muxer a shared buffer
(https://github.com/libp2p/specs/blob/master/noise/README.md).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)

from libp2p.abc import IRawConnection, ISecureConn  # isort: skip
from libp2p.crypto.keys import KeyPair  # isort: skip
from libp2p.crypto.x25519 import X25519PrivateKey  # isort: skip
from libp2p.io.exceptions import ConnectionClosedError  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.security.noise.transport import PROTOCOL_ID, Transport  # isort: skip
from libp2p.security.secure_session import SecureSession  # isort: skip

__all__ = ["PROTOCOL_ID", "NoiseSession", "NoiseTransport", "NotAuthentic"]

_MAX_PLAINTEXT = 65535 - 16
_READ_BYTES = 256 * 1024


class NotAuthentic(ConnectionClosedError):
    """A frame that was not encrypted by the peer: it broke Noise, or somebody on the way changed what it sent."""


class NoiseSession(SecureSession):
    """An encrypted connection after the handshake. One task reads, one writes."""

    plaintext: bytearray  # received and decrypted, not yet consumed; the reader deletes what it used

    def __init__(self, handshaken: SecureSession) -> None:
        super().__init__(
            local_peer=handshaken.local_peer,
            local_private_key=handshaken.local_private_key,
            remote_peer=handshaken.remote_peer,
            remote_permanent_pubkey=handshaken.remote_permanent_pubkey,
            is_initiator=handshaken.is_initiator,
            conn=handshaken.conn,
        )
        state = handshaken.conn.noise_state.noise_protocol  # type: ignore[attr-defined]
        encryption, decryption = state.cipher_state_encrypt, state.cipher_state_decrypt
        self._encryption: ChaCha20Poly1305 = encryption.cipher.cipher
        self._decryption: ChaCha20Poly1305 = decryption.cipher.cipher
        self._sent, self._received = int(encryption.n), int(decryption.n)  # nonces
        self._raw = handshaken.conn.read_writer.read_write_closer  # type: ignore[attr-defined]
        self._ciphertext = bytearray()
        self.plaintext = bytearray()

    async def fill(self) -> bytearray:
        """Wait until there is more plaintext, and return the shared buffer.

        Raises ConnectionClosedError at the end of the connection or when a frame was not encrypted by the peer.
        """
        before = len(self.plaintext)
        while len(self.plaintext) == before:
            data = await self._raw.read(_READ_BYTES)
            if not data:
                raise ConnectionClosedError("connection closed")
            self._ciphertext += data
            self._decrypt_complete_frames()
        return self.plaintext

    def _decrypt_complete_frames(self) -> None:
        buffer, offset, size = self._ciphertext, 0, len(self._ciphertext)
        with memoryview(buffer) as view:
            while size - offset >= 2:
                start = offset + 2
                end = start + (buffer[offset] << 8 | buffer[offset + 1])
                if end > size:
                    break
                nonce = b"\0\0\0\0" + self._received.to_bytes(8, "little")
                try:
                    self.plaintext += self._decryption.decrypt(nonce, view[start:end], None)
                except InvalidTag:
                    raise NotAuthentic("a Noise frame does not authenticate") from None
                self._received += 1
                offset = end
        del buffer[:offset]

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or with None whatever has arrived."""
        if n == 0:
            return b""
        if not self.plaintext:
            await self.fill()
        if n is None:
            n = len(self.plaintext)
        while len(self.plaintext) < n:
            await self.fill()
        data = bytes(self.plaintext[:n])
        del self.plaintext[:n]
        return data

    async def write(self, data: bytes) -> None:
        """Encrypt and send, in as few system calls as possible."""
        frames: list[bytes] = []
        with memoryview(data) as view:
            for start in range(0, len(data), _MAX_PLAINTEXT):
                nonce = b"\0\0\0\0" + self._sent.to_bytes(8, "little")
                sealed = self._encryption.encrypt(nonce, view[start : start + _MAX_PLAINTEXT], None)
                self._sent += 1
                frames.append(len(sealed).to_bytes(2, "big"))
                frames.append(sealed)
        await self._raw.write(b"".join(frames))


class NoiseTransport(Transport):
    """Upgrades a raw connection; the static key is fresh in every process, the machine key signs it."""

    def __init__(self, key_pair: KeyPair) -> None:
        super().__init__(key_pair, noise_privkey=X25519PrivateKey.new())

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """The responder's side of the handshake."""
        return _session(await super().secure_inbound(conn))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """The initiator's side of the handshake; fails when the peer is not `peer_id`."""
        return _session(await super().secure_outbound(conn, peer_id))


def _session(handshaken: ISecureConn) -> NoiseSession:
    assert isinstance(handshaken, SecureSession)
    return NoiseSession(handshaken)
