"""Gossip messages and RPC frames on the wire, with StrictSign.

Source: https://github.com/libp2p/specs/blob/master/pubsub/README.md
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError as ProtobufError
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

from kaisar_p2p.mesh.ids import id_bytes_of, key_of

from libp2p.pubsub.pb import rpc_pb2  # isort: skip

_SIGNED_PREFIX = b"libp2p-pubsub:"
_LENGTH_BYTES = 5  # of a frame's varint length


class MalformedGossip(Exception):
    """Bytes that no correct peer sends: its connection ends."""


@dataclass(frozen=True, slots=True)
class Published:
    """A message as it travels: `raw` is the signed protobuf, forwarded as it is."""

    id: bytes  # author's peer id and sequence number
    topic: str
    data: bytes
    author: bytes  # machine key
    raw: bytes


def sign(key: SigningKey, topic: str, data: bytes, sequence: int) -> Published:
    """A message of our own; `sequence` is unique per author (8 bytes)."""
    author = bytes(key.verify_key)
    message = rpc_pb2.Message(
        from_id=id_bytes_of(author), data=data, seqno=sequence.to_bytes(8, "big"), topicIDs=[topic]
    )
    message.signature = key.sign(_SIGNED_PREFIX + message.SerializeToString()).signature
    return Published(message.from_id + message.seqno, topic, data, author, message.SerializeToString())


def id_of_message(message: rpc_pb2.Message) -> bytes:
    """The id that duplicates share: author and sequence number."""
    return bytes(message.from_id + message.seqno)


def read(message: rpc_pb2.Message, max_bytes: int) -> Published:
    """Check the form of a received message, not yet its signature; raises MalformedGossip."""
    author = key_of(message.from_id)
    if author is None:
        raise MalformedGossip("the author is not an ed25519 peer id")
    if len(message.seqno) != 8 or len(message.signature) != 64 or len(message.topicIDs) != 1:
        raise MalformedGossip("sequence number, signature or topic has the wrong form")
    if len(message.data) > max_bytes:
        raise MalformedGossip(f"{len(message.data)} bytes of data, over the limit of {max_bytes}")
    return Published(
        message.from_id + message.seqno, message.topicIDs[0], message.data, author, message.SerializeToString()
    )


def signature_is_valid(message: rpc_pb2.Message, author: bytes) -> bool:
    """The signature is that of the author named in the message."""
    signed = rpc_pb2.Message(from_id=message.from_id, data=message.data, seqno=message.seqno, topicIDs=message.topicIDs)
    try:
        VerifyKey(author).verify(_SIGNED_PREFIX + signed.SerializeToString(), message.signature)
    except (CryptoError, ValueError):
        return False
    return True


def frame(rpc: bytes) -> bytes:
    """An RPC with its varint length in front."""
    return _varint(len(rpc)) + rpc


def publish_frame(raw: bytes) -> bytes:
    """The frame of an RPC that carries one message, without building the RPC (field 2, length-delimited)."""
    return frame(b"\x12" + _varint(len(raw)) + raw)


def subscriptions_frame(topics: Iterable[str], subscribe: bool) -> bytes:
    """The frame that announces or withdraws subscriptions."""
    rpc = rpc_pb2.RPC()
    for topic in topics:
        rpc.subscriptions.add(subscribe=subscribe, topicid=topic)
    return frame(rpc.SerializeToString())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class FrameReader:
    """Cuts a byte stream into RPCs; bounded by `max_bytes` per frame plus one read."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[rpc_pb2.RPC, int]]:
        """The RPCs that `data` completes, each with its size in bytes; raises MalformedGossip."""
        buffer = self._buffer
        buffer += data
        used = 0
        try:
            while True:
                bounds = self._next_bounds(buffer, used)
                if bounds is None:
                    return
                start, end = bounds
                rpc = rpc_pb2.RPC()
                try:
                    rpc.ParseFromString(bytes(buffer[start:end]))
                except (ProtobufError, ValueError):
                    raise MalformedGossip("not an RPC") from None
                used = end
                yield rpc, end - start
        finally:
            del buffer[:used]

    def _next_bounds(self, buffer: bytearray, offset: int) -> tuple[int, int] | None:
        length = 0
        for index in range(_LENGTH_BYTES):
            if offset + index >= len(buffer):
                return None
            byte = buffer[offset + index]
            length |= (byte & 127) << 7 * index
            if byte < 128:
                if length > self._max_bytes:
                    raise MalformedGossip(f"an RPC of {length} bytes, over the limit of {self._max_bytes}")
                start = offset + index + 1
                return (start, start + length) if start + length <= len(buffer) else None
        raise MalformedGossip("an RPC whose length does not end")
