"""Private swarms: every connection is encrypted with a key that all members share, before anything else.

Each side sends a nonce of 24 bytes, and encrypts what it sends afterwards with XSalsa20 under the shared key and its
own nonce (https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md). There is no authentication:
that is Noise's work inside. Who has another key, or none, is noticed by the first bytes, because every libp2p
connection begins with the same ones.

XSalsa20 is Salsa20 under a subkey that HSalsa20 makes of the key and the first 16 bytes of the nonce
(Bernstein, "Extending the Salsa20 nonce", https://cr.yp.to/snuffle/xsalsa-20110204.pdf).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import trio
from nacl import _sodium

from kaisar_p2p.errors import ConfigError, MeshError
from kaisar_p2p.mesh.connection import TcpStream

from libp2p.io.abc import ReadWriteCloser  # isort: skip
from libp2p.io.exceptions import ConnectionClosedError  # isort: skip

KEY_BYTES = 32
NONCE_BYTES = 24
_LEAVE_S = 0.5
_HELLO = b"\x13/multistream/1.0.0\n"  # the first bytes of either side of every connection
_KEY_FILE = re.compile(r"\s*/key/swarm/psk/1\.0\.0/\s*\n\s*/base16/\s*\n\s*([0-9a-fA-F]{64})\s*")
_HINT = "compare the files with the pre-shared keys of both nodes"


class PreSharedKeyMismatch(MeshError, ConnectionClosedError):
    """The peer has another pre-shared key, or only one of us has one.

    Also the library's error of a broken connection: whoever is prepared for that one is prepared for this one.
    """


def format_key(key: bytes) -> str:
    """The text of a key file, as all libp2p implementations read it; `key` has 32 bytes."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a pre-shared key has {KEY_BYTES} bytes, not {len(key)}")
    return f"/key/swarm/psk/1.0.0/\n/base16/\n{key.hex()}\n"


def parse_key(text: str) -> bytes:
    """The key in the text of a key file; raises ConfigError, which does not quote the text."""
    match = _KEY_FILE.fullmatch(text)
    if match is None:
        raise ConfigError(
            "this is not a pre-shared key of libp2p",
            hint="three lines: /key/swarm/psk/1.0.0/, /base16/, and 64 hexadecimal digits",
        )
    return bytes.fromhex(match[1])


# -- XSalsa20 ---------------------------------------------------------------------------------------------------------

_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
# The quarter rounds of a double round: first the columns of the 4 × 4 state, then its rows.
_QUARTERS = (
    (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14),
)  # fmt: skip


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """32 bytes from a key of 32 and a nonce of 16: 20 rounds of Salsa20 without the final addition."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    x = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _ in range(10):
        for a, b, c, d in _QUARTERS:
            x[b] ^= _rotated(x[a] + x[d], 7)
            x[c] ^= _rotated(x[b] + x[a], 9)
            x[d] ^= _rotated(x[c] + x[b], 13)
            x[a] ^= _rotated(x[d] + x[c], 18)
    return struct.pack("<8I", x[0], x[5], x[10], x[15], *x[6:10])


def _rotated(value: int, bits: int) -> int:
    value &= 0xFFFFFFFF
    return (value << bits | value >> (32 - bits)) & 0xFFFFFFFF


def xsalsa20(key: bytes, nonce: bytes) -> Callable[[bytes], bytes]:
    """A function that encrypts, or decrypts, one part of a stream after the other."""
    subkey, rest = hsalsa20(key, nonce[:16]), nonce[16:]
    if libsodium_salsa20() is not None:
        return FastSalsa20(subkey, rest).encrypt
    from Crypto.Cipher import Salsa20  # only in a private swarm, and not while libp2p is imported with stand-ins

    return Salsa20.new(subkey, rest).encrypt


@cache
def libsodium_salsa20() -> Any:
    """libsodium's Salsa20 that can start at any block: several times as fast as the other one.

    PyNaCl brings it and does not offer it; None where its library does not show it.
    """
    try:
        function = ctypes.CDLL(_sodium.__file__).crypto_stream_salsa20_xor_ic
    except (OSError, AttributeError):
        return None
    buffer = ctypes.c_void_p
    function.argtypes = (buffer, buffer, ctypes.c_ulonglong, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_char_p)
    return function


class FastSalsa20:
    """Salsa20 by libsodium, for a stream that comes in parts."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._key, self._nonce = key, nonce
        self._position = 0

    def encrypt(self, data: bytes) -> bytes:
        """The next part of the stream."""
        block, skipped = divmod(self._position, 64)
        self._position += len(data)
        buffer = bytearray(skipped) + data
        at = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer)) if buffer else 0
        libsodium_salsa20()(at, at, len(buffer), self._nonce, block, self._key)
        return bytes(memoryview(buffer)[skipped:])


# -- connections ------------------------------------------------------------------------------------------------------


class CheckedStream(TcpStream):
    """A TCP stream that must begin as every libp2p connection does: read raises PreSharedKeyMismatch if it does not.

    `patience_s` is for the first bytes of a peer that we dialed, None for one that dialed us.
    """

    def __init__(self, stream: trio.SocketStream, patience_s: float | None = None) -> None:
        super().__init__(stream)
        self._patience_s = patience_s
        self._early: bytes | None = None  # received and not consumed yet; None before the check

    async def _receive(self, most: int | None) -> bytes:
        return await super().read(most)

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, b"" at the end; raises ConnectionClosedError, and PreSharedKeyMismatch at the first call."""
        if self._early is None:
            self._early = await self._checked()
        if self._early:
            data = self._early if n is None else self._early[:n]
            self._early = self._early[len(data) :]
            return data
        return await self._receive(n)

    async def _checked(self) -> bytes:
        data = b""
        with trio.move_on_after(self._patience_s or float("inf")):
            while len(data) < len(_HELLO):
                part = await self._receive(len(_HELLO) - len(data))
                data += part
                if not part or not _HELLO.startswith(data):
                    break
            else:
                return data
        raise self._suspicion(data)

    def _suspicion(self, data: bytes) -> ConnectionClosedError:
        if _HELLO.startswith(data):
            return ConnectionClosedError("the peer hung up")
        return PreSharedKeyMismatch(
            "the peer does not talk as libp2p does, perhaps because its network has a pre-shared key and ours has none",
            hint=_HINT,
        )


class PrivateStream(CheckedStream):
    """A TCP stream inside a private swarm, made by `protect`."""

    def __init__(
        self, stream: trio.SocketStream, key: bytes, ours: bytes, theirs: bytes, patience_s: float | None
    ) -> None:
        super().__init__(stream, patience_s)
        self._encrypt, self._decrypt = xsalsa20(key, ours), xsalsa20(key, theirs)

    async def _receive(self, most: int | None) -> bytes:
        return self._decrypt(await super()._receive(most))

    async def write(self, data: bytes) -> None:
        """Encrypt and send all of `data`; raises ConnectionClosedError."""
        try:
            await super().write(self._encrypt(data))
        except ConnectionClosedError:
            if self._early is None:
                raise self._suspicion(b"") from None
            raise

    def write_soon(self, data: bytes) -> bool:
        """Encrypt and send; see `TcpStream.write_soon`."""
        return super().write_soon(self._encrypt(data))

    async def _checked(self) -> bytes:
        try:
            return await super()._checked()
        except PreSharedKeyMismatch:
            raise
        except ConnectionClosedError:
            raise self._suspicion(b"") from None

    def _suspicion(self, data: bytes) -> PreSharedKeyMismatch:
        if _HELLO.startswith(data):
            message = "the peer went silent or hung up, perhaps because it has another pre-shared key"
        else:
            message = "the peer has another pre-shared key"
        return PreSharedKeyMismatch(message, hint=_HINT)


async def protect(tcp: TcpStream, key: bytes, patience_s: float | None = None) -> PrivateStream:
    """Exchange nonces, on either side of a connection; what follows is encrypted.

    `patience_s` is for the nonce and then for the first bytes of a peer that we dialed, None for one that dialed us.
    Raises PreSharedKeyMismatch, here or at the first use of the stream.
    """
    ours, theirs = os.urandom(NONCE_BYTES), b""
    with trio.move_on_after(patience_s or float("inf")), contextlib.suppress(ConnectionClosedError):
        await tcp.write(ours)
        while len(theirs) < NONCE_BYTES:
            part = await tcp.read(NONCE_BYTES - len(theirs))
            theirs += part
            if not part or theirs.startswith(_HELLO):
                break
        else:
            return PrivateStream(tcp.stream, key, ours, theirs, patience_s)
    if patience_s is None:
        await _let_it_leave(tcp)
    raise PreSharedKeyMismatch("the peer behaves as if it had no pre-shared key, and this network has one", hint=_HINT)


async def _let_it_leave(tcp: TcpStream) -> None:
    """Wait until the peer hangs up: closing with bytes that nobody has read destroys our nonce on its way, by which
    the peer sees what is wrong."""
    with trio.move_on_after(_LEAVE_S), contextlib.suppress(trio.BrokenResourceError):
        while await tcp.stream.receive_some():
            pass


class PrivateCircuit(ReadWriteCloser):
    """A connection over a relay, inside a private swarm; made by `protect_circuit`."""

    def __init__(self, raw: ReadWriteCloser, key: bytes, ours: bytes, theirs: bytes) -> None:
        self._raw = raw
        self._encrypt, self._decrypt = xsalsa20(key, ours), xsalsa20(key, theirs)

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, b"" at the end; raises ConnectionClosedError."""
        return self._decrypt(await self._raw.read(n))

    async def write(self, data: bytes) -> None:
        """Encrypt and send all of `data`; raises ConnectionClosedError."""
        await self._raw.write(self._encrypt(data))

    async def close(self) -> None:
        """Finish."""
        await self._raw.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """As the connection below."""
        return self._raw.get_remote_address()


async def protect_circuit(raw: ReadWriteCloser, key: bytes) -> PrivateCircuit:
    """As `protect`, for a connection over a relay: go-libp2p and js-libp2p encrypt these like any other, though those
    with the relay are encrypted already. Raises ConnectionClosedError.
    """
    ours, theirs = os.urandom(NONCE_BYTES), b""
    await raw.write(ours)
    while len(theirs) < NONCE_BYTES:
        part = await raw.read(NONCE_BYTES - len(theirs))
        if not part:
            raise ConnectionClosedError("the peer hung up")
        theirs += part
    return PrivateCircuit(raw, key, ours, theirs)
