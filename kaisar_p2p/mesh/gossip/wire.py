"""Gossip messages and RPC frames on the wire, with StrictSign.

Source: https://github.com/libp2p/specs/blob/master/pubsub/README.md

Messages are read by hand, in the one form that every implementation writes (fields ascending, each once, lengths as
short as they can be): that is several times cheaper than protobuf objects, what was signed is a prefix of what was
received, and what we forward is what we received. Everything else in an RPC, which is rare, goes through protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.message import DecodeError as ProtobufError
from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey

from kaisar_p2p.mesh.ids import id_bytes_of

from libp2p.pubsub.pb import rpc_pb2  # isort: skip

_SIGNED_PREFIX = b"libp2p-pubsub:"
_LENGTH_BYTES = 5  # of a varint length
_ID_BYTES = len(id_bytes_of(bytes(32)))
_FROM = b"\x0a" + bytes([_ID_BYTES]) + id_bytes_of(b"")  # field 1 of an ed25519 author, up to the key
_AUTHOR = 2 + _ID_BYTES  # where field 1 ends
_SEQUENCE, _SIGNATURE = b"\x1a\x08", b"\x2a\x40"  # fields 3 of 8 and 5 of 64 bytes
_SHORTEST = _AUTHOR + 10 + 2 + 66  # no data, no topic
_KEY = b"\x32\x24\x08\x01\x12\x20"  # field 6: the author's key as protobuf, which only JavaScript sends


class MalformedGossip(Exception):
    """Bytes that no correct peer sends: its connection ends."""


class Published(NamedTuple):
    """A message as it travels: `raw` is the signed protobuf, forwarded as it is."""

    id: bytes  # author's peer id and sequence number
    topic: str
    data: bytes
    author: bytes  # machine key
    raw: bytes
    signed_bytes: int  # of `raw`, from its start, are what the signature is about

    @property
    def sequence(self) -> int:
        """Unique per author."""
        return int.from_bytes(self.id[_ID_BYTES:], "big")

    @property
    def entry(self) -> bytes:
        """The message as a field of an RPC."""
        return b"\x12" + _varint(len(self.raw)) + self.raw


def sign(key: SigningKey, topic: str, data: bytes, sequence: int) -> Published:
    """A message of our own; `sequence` is unique per author (8 bytes)."""
    author = bytes(key.verify_key)
    count, name = sequence.to_bytes(8, "big"), topic.encode()
    signed = b"".join(
        (_FROM, author, b"\x12", _varint(len(data)), data, _SEQUENCE, count, b"\x22", _varint(len(name)), name)
    )
    raw = signed + _SIGNATURE + key.sign(_SIGNED_PREFIX + signed).signature
    return Published(id_bytes_of(author) + count, topic, data, author, raw, len(signed))


def id_of(raw: bytes) -> bytes:
    """The id that duplicates share, author and sequence number, without looking at the rest; MalformedGossip."""
    if len(raw) >= _SHORTEST and raw[_AUTHOR] == 0x12 and raw[_AUTHOR + 1] > 127 > raw[_AUTHOR + 2] > 0:
        end = _AUTHOR + 3 + (raw[_AUTHOR + 1] & 127 | raw[_AUTHOR + 2] << 7)  # nearly always, and five times a message
        if not raw.startswith(_FROM):
            raise MalformedGossip("the author is not an ed25519 peer id")
    else:
        end = _data_bounds(raw)[1]
    if len(raw) < end + 10:
        raise MalformedGossip("a message that ends early")
    return raw[2:_AUTHOR] + raw[end + 2 : end + 10]


def _data_bounds(raw: bytes) -> tuple[int, int]:
    if not raw.startswith(_FROM) or len(raw) < _SHORTEST:
        raise MalformedGossip("the author is not an ed25519 peer id, or the message ends early")
    if raw[_AUTHOR] != 0x12:  # an empty field may be left out
        return _AUTHOR, _AUTHOR
    length, at = _length(raw, _AUTHOR + 1)
    return at, at + length


def read(raw: bytes, max_bytes: int) -> Published:
    """Check the form of a received message, not yet its signature; raises MalformedGossip."""
    message_id = id_of(raw)
    start, data_end = _data_bounds(raw)
    data = raw[start:data_end]
    if len(data) > max_bytes:
        raise MalformedGossip(f"{len(data)} bytes of data, over the limit of {max_bytes}")
    if not raw.startswith(_SEQUENCE + message_id[_ID_BYTES:] + b"\x22", data_end):
        raise MalformedGossip("sequence number or topic has the wrong form")
    length, at = _length(raw, data_end + 11)
    signed_bytes = at + length
    author = raw[len(_FROM) : _AUTHOR]
    rest = len(raw) - signed_bytes - 66
    if not raw.startswith(_SIGNATURE, signed_bytes) or rest < 0:
        raise MalformedGossip("the signature has the wrong form")
    if rest and raw[signed_bytes + 66 :] != _KEY + author:
        raise MalformedGossip("something else than the author's key follows the signature")
    try:
        topic = raw[at:signed_bytes].decode()
    except UnicodeDecodeError:
        raise MalformedGossip("the topic is not text") from None
    return Published(message_id, topic, data, author, raw, signed_bytes)


def signature_is_valid(message: Published) -> bool:
    """The signature is that of the author named in the message."""
    raw, end = message.raw, message.signed_bytes
    try:
        crypto_sign_open(raw[end + 2 : end + 66] + _SIGNED_PREFIX + raw[:end], message.author)
    except (CryptoError, ValueError):
        return False
    return True


# -- RPCs -------------------------------------------------------------------------------------------------------------


def split(rpc: bytes) -> tuple[list[bytes], bytes]:
    """The messages in an RPC, and its other fields, for `rest_of`; raises MalformedGossip."""
    messages: list[bytes] = []
    rest: list[bytes] = []
    start, size = 0, len(rpc)
    while start < size:
        if rpc[start] & 7 != 2:
            raise MalformedGossip("not an RPC")  # all of its fields have a length
        length, at = _length(rpc, start + 1)
        end = at + length
        if end > size:
            raise MalformedGossip("an RPC that ends early")
        if rpc[start] == 0x12:
            messages.append(rpc[at:end])
        else:
            rest.append(rpc[start:end])
        start = end
    return messages, b"".join(rest)


def rest_of(fields: bytes) -> rpc_pb2.RPC:
    """Subscriptions and control; raises MalformedGossip."""
    rpc = rpc_pb2.RPC()
    try:
        rpc.ParseFromString(fields)
    except (ProtobufError, ValueError):
        raise MalformedGossip("not an RPC") from None
    return rpc


def frame(rpc: bytes) -> bytes:
    """An RPC with its varint length in front."""
    return _varint(len(rpc)) + rpc


def publish_frame(raw: bytes) -> bytes:
    """The frame of an RPC that carries one message."""
    return frame(b"\x12" + _varint(len(raw)) + raw)


def subscriptions_frame(topics: Iterable[str], subscribe: bool) -> bytes:
    """The frame that announces or withdraws subscriptions."""
    rpc = rpc_pb2.RPC()
    for topic in topics:
        rpc.subscriptions.add(subscribe=subscribe, topicid=topic)
    return frame(rpc.SerializeToString())


def _varint(value: int) -> bytes:
    if value < 128:
        return bytes((value,))
    if value < 16384:
        return bytes((value & 127 | 128, value >> 7))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _length(data: bytes, at: int) -> tuple[int, int]:
    """A length, written as short as it can be, and where it ends; MalformedGossip."""
    if len(data) > at + 1 and (data[at] < 128 or 0 < data[at + 1] < 128):  # nearly always
        low = data[at]
        return (low, at + 1) if low < 128 else (low & 127 | data[at + 1] << 7, at + 2)
    length = 0
    for index in range(_LENGTH_BYTES):
        if at + index >= len(data):
            break
        byte = data[at + index]
        length |= (byte & 127) << 7 * index
        if byte < 128:
            if index and not byte:
                break
            return length, at + index + 1
    raise MalformedGossip("a length has the wrong form")


class FrameReader:
    """Cuts a byte stream into RPCs; bounded by `max_bytes` per frame plus one read."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()  # the RPC that is not complete
        self._missing = 0  # bytes before it is worth looking again
        self._data, self._start = b"", 0  # that were fed and not looked at

    @property
    def unfinished_bytes(self) -> int:
        """Of an RPC that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes, most: int | None = None) -> list[bytes]:
        """The first `most` RPCs that `data` completes, and all others from `more`; raises MalformedGossip."""
        if self._missing > len(data):
            self._buffer += data
            self._missing -= len(data)
            return []
        if self._buffer:
            self._buffer += data
            data = bytes(self._buffer)
            self._buffer.clear()
        self._data, self._start = data, 0
        return self.more(most)

    def more(self, most: int | None = None) -> list[bytes]:
        """The next RPCs of what was fed last; none when that is over."""
        rpcs: list[bytes] = []
        data, start = self._data, self._start
        while len(rpcs) != most:
            bounds = self._next_bounds(data, start)
            if bounds is None:
                self._buffer += data[start:]
                self._data, start = b"", 0
                break
            rpcs.append(data[bounds[0] : bounds[1]])
            start = bounds[1]
        self._start = start
        return rpcs

    def _next_bounds(self, data: bytes, offset: int) -> tuple[int, int] | None:
        length = 0
        for index in range(_LENGTH_BYTES):
            if offset + index >= len(data):
                self._missing = 0
                return None
            byte = data[offset + index]
            length |= (byte & 127) << 7 * index
            if byte < 128:
                if length > self._max_bytes:
                    raise MalformedGossip(f"an RPC of {length} bytes, over the limit of {self._max_bytes}")
                start = offset + index + 1
                self._missing = start + length - len(data)
                return (start, start + length) if self._missing <= 0 else None
        raise MalformedGossip("an RPC whose length does not end")
