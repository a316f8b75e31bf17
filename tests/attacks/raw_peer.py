"""A peer that may say anything: TCP, multistream-select, Noise and yamux frames by hand, without a muxer's manners."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from nacl.signing import SigningKey

from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.ids import id_bytes_of
from kaisar_p2p.mesh.transport.noise_handshake import SIGNED_PREFIX, Established, Handshake, Identity, nonce_of

from libp2p.pubsub.pb import rpc_pb2  # isort: skip

DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")
MULTISTREAM = b"\x13/multistream/1.0.0\n"
GOSSIP = "/meshsub/1.1.0"
_FRAME = 65000
_LARGE_WINDOW = 1 << 30
_WINDOW = 256 * 1024  # that every stream begins with


def line(text: str) -> bytes:
    """One line of multistream-select."""
    data = text.encode() + b"\n"
    size = len(data)
    return (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + data


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    """One frame of yamux."""
    return HEADER.pack(0, kind, flags, stream, length) + body


def topic(name: str) -> str:
    """The subject's full name of a topic."""
    return f"/kaisar/subject/{name}/1"


async def tcp_to(host: str, port: int, source: str) -> trio.SocketStream:
    """A TCP connection from one of this machine's loopback addresses."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        await sock.bind((source, 0))
        await sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


class RawPeer:
    """A connection after its handshakes. `run` reads; without it, nothing is ever read."""

    def __init__(self, tcp: trio.SocketStream, established: Established, key: SigningKey) -> None:
        self.tcp, self.key = tcp, key
        self.public = bytes(key.verify_key)
        self.ended = trio.Event()
        self.received: dict[int, bytearray] = {}  # by stream
        self.opened: dict[int, str] = {}  # by the other side: what it proposed
        self.resets = self.pings = 0
        self.answers_pings = self.agrees = self.opens_windows = True
        self._established = established
        self._sent = self._got = 0
        self._sealed, self._plain = bytearray(), bytearray()
        self._next = 1
        self._allowance: dict[int, int] = {}  # of each stream of ours, what the other side still takes
        self._arrived = trio.Event()
        self._sending = trio.Lock()

    # -- connecting ---------------------------------------------------------------------------------------------------

    @classmethod
    async def connect(
        cls,
        nursery: trio.Nursery,
        address: tuple[str, int],
        source: str,
        seed: bytes | None = None,
        *,
        read: bool = True,
    ) -> RawPeer:
        """Shake hands as a peer with this seed; `read` starts the reading task."""
        tcp = await tcp_to(*address, source)
        key = SigningKey(seed or os.urandom(32))
        try:
            peer = cls(tcp, await _shake_hands(tcp, key), key)
            await peer.seal(MULTISTREAM + line("/yamux/1.0.0"))
            while bytes(peer._plain).count(b"\n") < 2:
                await peer._fill()
        except BaseException:
            await trio.aclose_forcefully(tcp)
            raise
        peer._plain.clear()
        if read:
            nursery.start_soon(peer.run)
        return peer

    # -- bytes --------------------------------------------------------------------------------------------------------

    async def seal(self, data: bytes) -> None:
        """Encrypt and send; raises trio.BrokenResourceError when the other side is gone."""
        async with self._sending:
            out = bytearray()
            for start in range(0, len(data), _FRAME):
                sealed = self._established.sending.encrypt(nonce_of(self._sent), data[start : start + _FRAME], None)
                self._sent += 1
                out += len(sealed).to_bytes(2, "big") + sealed
            await self.tcp.send_all(out)

    async def _fill(self) -> None:
        data = await self.tcp.receive_some(1 << 18)
        if not data:
            raise trio.BrokenResourceError("the other side ended")
        self._sealed += data
        while len(self._sealed) >= 2 and len(self._sealed) >= (end := 2 + int.from_bytes(self._sealed[:2], "big")):
            opened = self._established.receiving.decrypt(nonce_of(self._got), bytes(self._sealed[2:end]), None)
            self._got += 1
            self._plain += opened
            del self._sealed[:end]

    async def run(self) -> None:
        """Read until the connection ends; answers what `answers_pings`, `agrees` and `opens_windows` allow."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await self._fill()
                answers = bytearray()
                while (used := self._read_frame(answers)) is not None:
                    del self._plain[:used]
                if answers:
                    await self.seal(bytes(answers))
                self._arrived.set()
                self._arrived = trio.Event()
        self.ended.set()
        self._arrived.set()

    def _read_frame(self, answers: bytearray) -> int | None:
        if len(self._plain) < 12:
            return None
        _, kind, flags, stream, length = HEADER.unpack_from(self._plain)
        size = 12 + (length if kind == DATA else 0)
        if len(self._plain) < size:
            return None
        if kind == PING and flags & SYN:
            self.pings += 1
            if self.answers_pings:
                answers += frame(PING, ACK, 0, length)
        elif kind in (DATA, WINDOW):
            if kind == WINDOW and stream in self._allowance:
                self._allowance[stream] += length
            self.resets += bool(flags & RST)
            if flags & SYN:
                self.opened[stream] = ""
                answers += frame(WINDOW, ACK, stream, _LARGE_WINDOW if self.opens_windows else 0)
            if kind == DATA:
                self._on_data(stream, bytes(self._plain[12:size]), answers)
        return size

    def _on_data(self, stream: int, data: bytes, answers: bytearray) -> None:
        buffer = self.received.setdefault(stream, bytearray())
        buffer += data
        if self.opened.get(stream) == "" and buffer.count(b"\n") >= 2:
            proposed = bytes(buffer).split(b"\n")[1][1:].decode("utf-8", "replace")
            self.opened[stream] = proposed
            if self.agrees:
                back = MULTISTREAM + line(proposed)
                answers += frame(DATA, 0, stream, len(back), back)
        elif stream not in self.opened and self.opens_windows:
            answers += frame(WINDOW, 0, stream, len(data))

    # -- streams ------------------------------------------------------------------------------------------------------

    async def open(self, protocol: str, data: bytes = b"", *, window: int = 0) -> int:
        """Open a stream, propose, and send; the number of the stream."""
        stream, self._next = self._next, self._next + 2
        body = MULTISTREAM + line(protocol) + data
        self._allowance[stream] = _WINDOW - len(body)
        await self.seal(frame(WINDOW, SYN, stream, window) + self.chunk(stream, body))
        return stream

    @staticmethod
    def chunk(stream: int, data: bytes) -> bytes:
        """Frames of data, as many as it takes."""
        return b"".join(
            frame(DATA, 0, stream, len(part), part)
            for part in (data[at : at + _FRAME] for at in range(0, len(data), _FRAME))
        )

    async def send(self, stream: int, data: bytes) -> None:
        """Data, as much at a time as the other side takes; raises trio.BrokenResourceError at the end."""
        self._allowance.setdefault(stream, _WINDOW)  # of one that the other side opened
        while data:
            while self._allowance[stream] <= 0 and not self.ended.is_set():
                await self._arrived.wait()
            if self.ended.is_set():
                raise trio.BrokenResourceError("the other side ended")
            part = data[: self._allowance[stream]]
            self._allowance[stream] -= len(part)
            await self.seal(self.chunk(stream, part))
            data = data[len(part) :]

    async def wait_for(self, stream: int, size: int) -> bytes:
        """What came on a stream, once it is so much."""
        while len(self.received.get(stream, b"")) < size:
            if self.ended.is_set():
                raise trio.BrokenResourceError("the other side ended")
            await self._arrived.wait()
        return bytes(self.received[stream])

    async def request(self, protocol: str, payload: bytes) -> bytes:
        """One frame there and one back."""
        stream = await self.open(protocol, len(payload).to_bytes(4, "big") + payload)
        await self.seal(frame(WINDOW, FIN, stream, 0))
        preamble = len(MULTISTREAM + line(protocol))
        head = await self.wait_for(stream, preamble + 4)
        size = int.from_bytes(head[preamble : preamble + 4], "big")
        return (await self.wait_for(stream, preamble + 4 + size))[preamble + 4 :]

    # -- gossip -------------------------------------------------------------------------------------------------------

    async def gossip(self, *topics: str) -> int:
        """A gossip stream, subscribed to these (short names)."""
        announcement = wire.subscriptions_frame([topic(name) for name in topics], True) if topics else b""
        stream = await self.open(GOSSIP, announcement)
        await self.wait_for(stream, len(MULTISTREAM + line(GOSSIP)))
        return stream

    def message(self, name: str, data: bytes, sequence: int, key: SigningKey | None = None) -> bytes:
        """The frame of a signed message."""
        return wire.publish_frame(wire.sign(key or self.key, topic(name), data, sequence).raw)

    def reset_tcp(self) -> None:
        """End as a crashed process does, with RST."""
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tcp.socket.close()

    async def is_gone(self, within_s: float) -> bool:
        """The other side ends the connection in time."""
        with trio.move_on_after(within_s):
            await self.ended.wait()
        return self.ended.is_set()


async def _shake_hands(tcp: trio.SocketStream, key: SigningKey) -> Established:
    buffer = bytearray()

    async def read(size: int) -> bytes:
        while len(buffer) < size:
            data = await tcp.receive_some(4096)
            if not data:
                raise trio.BrokenResourceError("the other side ended")
            buffer.extend(data)
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken

    async def read_message() -> bytes:
        return await read(int.from_bytes(await read(2), "big"))

    handshake = Handshake(identity_of(key))
    await tcp.send_all(MULTISTREAM + line("/noise"))
    await read(len(MULTISTREAM + line("/noise")))
    first = handshake.first()
    await tcp.send_all(len(first).to_bytes(2, "big") + first)
    handshake.read_second(await read_message())
    third, established = handshake.third()
    await tcp.send_all(len(third).to_bytes(2, "big") + third)
    return established


def identity_of(key: SigningKey) -> Identity:
    """A correct identity that names no muxer, so that one is negotiated."""
    static = X25519PrivateKey.generate()
    signature = key.sign(SIGNED_PREFIX + static.public_key().public_bytes_raw()).signature
    return Identity.of(static, bytes(key.verify_key), signature, ())


def rpc_frame(rpc: rpc_pb2.RPC) -> bytes:
    """An RPC with its length."""
    return wire.frame(rpc.SerializeToString())


def peer_id(key: bytes) -> bytes:
    """Of a public key."""
    return id_bytes_of(key)
