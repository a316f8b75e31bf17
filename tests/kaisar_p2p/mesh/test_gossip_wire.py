"""Messages and RPCs by hand: what the library reads and writes, and nothing but MalformedGossip for the rest."""

from __future__ import annotations

import contextlib
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import signature_validator
from nacl.signing import SigningKey

from kaisar_p2p.mesh.gossip import wire
from kaisar_p2p.mesh.ids import id_bytes_of

KEY = SigningKey(b"\x07" * 32)
AUTHOR = bytes(KEY.verify_key)


@given(st.binary(max_size=300), st.text(min_size=1, max_size=200), st.integers(0, 2**64 - 1))
def test_our_messages_satisfy_the_library(data: bytes, topic: str, sequence: int) -> None:
    published = wire.sign(KEY, topic, data, sequence)
    message = rpc_pb2.Message()
    message.ParseFromString(published.raw)
    assert signature_validator(message)
    assert (message.from_id, message.data, list(message.topicIDs)) == (id_bytes_of(AUTHOR), data, [topic])
    assert message.SerializeToString() == published.raw
    assert wire.read(published.raw, 1000) == published
    assert wire.id_of(published.raw) == published.id == message.from_id + message.seqno
    assert published.sequence == sequence
    assert wire.signature_is_valid(published)


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_messages_of_the_library_are_read(data: bytes, with_key: bool, leave_out: bool) -> None:
    message = rpc_pb2.Message(from_id=id_bytes_of(AUTHOR), data=data, seqno=bytes(8), topicIDs=["t"])
    if leave_out and not data:
        message.ClearField("data")
    message.signature = KEY.sign(b"libp2p-pubsub:" + message.SerializeToString()).signature
    if with_key:  # as js-libp2p does
        message.key = b"\x08\x01\x12\x20" + AUTHOR
    published = wire.read(message.SerializeToString(), 1000)
    assert (published.data, published.topic, published.author) == (data, "t", AUTHOR)
    assert wire.signature_is_valid(published)


@given(st.integers(0, 200), st.integers(0, 255))
def test_one_changed_byte_is_noticed(at: int, value: int) -> None:
    raw = bytearray(wire.sign(KEY, "topic", bytes(50), 7).raw)
    at %= len(raw)
    changed = raw[at] != value
    raw[at] = value
    try:
        valid = wire.signature_is_valid(wire.read(bytes(raw), 1000))
    except wire.MalformedGossip:
        return
    assert valid is not changed


def _message(**changes: object) -> bytes:
    message = rpc_pb2.Message()
    message.ParseFromString(wire.sign(KEY, "t", b"data", 7).raw)
    for name, value in changes.items():
        message.ClearField(name)
        if name == "topicIDs":
            message.topicIDs.extend(value)  # type: ignore[arg-type]
        else:
            setattr(message, name, value)
    return message.SerializeToString()


GOOD = _message()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        _message(from_id=b""),
        _message(from_id=b"\x12\x20" + bytes(32)),
        _message(seqno=b""),
        _message(seqno=bytes(9)),
        _message(topicIDs=[]),
        _message(topicIDs=["a", "b"]),
        _message(signature=b""),
        _message(signature=bytes(65)),
        _message(key=b"\x08\x01\x12\x20" + bytes(32)),
        _message(data=bytes(1001)),
        GOOD + b"\x12\x01a",
        GOOD + b"\x3a\x01a",
        GOOD[:40] + b"\x12\x84\x00" + GOOD[42:],
        GOOD.replace(b"\x22\x01t", b"\x22\x01\xff"),
        GOOD.replace(b"\x22\x01t", b"\x22\xff\xff\xff\x7ft"),
    ],
)
def test_other_forms_are_malformed(raw: bytes) -> None:
    with pytest.raises(wire.MalformedGossip):
        wire.read(raw, 1000)


@given(st.binary(max_size=300), st.binary(max_size=60))
def test_reading_anything_ends_in_a_message_or_malformed(random_bytes: bytes, tail: bytes) -> None:
    for raw in (random_bytes, GOOD[: len(random_bytes)] + tail):
        with contextlib.suppress(wire.MalformedGossip):
            wire.signature_is_valid(wire.read(raw, 1000))
        with contextlib.suppress(wire.MalformedGossip):
            wire.rest_of(wire.split(raw)[1])


@given(st.lists(st.binary(max_size=60), max_size=5), st.lists(st.text(max_size=20), max_size=5), st.randoms())
def test_an_rpc_is_split_as_protobuf_would(messages: list[bytes], topics: list[str], order: random.Random) -> None:
    sent = [wire.sign(KEY, "t", data, number) for number, data in enumerate(messages)]
    rest = rpc_pb2.RPC()
    for topic in topics:
        rest.subscriptions.add(subscribe=True, topicid=topic)
        rest.control.graft.add(topicID=topic)
    fields = [published.entry for published in sent]
    fields.insert(order.randint(0, len(fields)), rest.SerializeToString())
    got, other = wire.split(b"".join(fields))
    assert got == [published.raw for published in sent]
    assert wire.rest_of(other) == rest
    whole = rpc_pb2.RPC()
    whole.ParseFromString(b"".join(fields))
    assert [message.SerializeToString() for message in whole.publish] == got


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 50))
def test_frames_survive_any_cut(messages: list[bytes], step: int) -> None:
    sent = [wire.sign(KEY, "t", data, number) for number, data in enumerate(messages)]
    stream = b"".join(wire.publish_frame(published.raw) for published in sent)
    reader, got = wire.FrameReader(10_000), []
    for start in range(0, len(stream), step):
        for rpc in reader.feed(stream[start : start + step]):
            got += wire.split(rpc)[0]
    assert got == [published.raw for published in sent]


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_frames_or_malformed(parts: list[bytes]) -> None:
    reader, got = wire.FrameReader(200), b""
    for data in parts:
        try:
            frames = reader.feed(data)
        except wire.MalformedGossip:
            return
        got += b"".join(map(wire.frame, frames))
        assert len(reader._buffer) <= 205
    assert len(got) <= sum(map(len, parts))


@settings(max_examples=30)
@given(st.integers(1, 3000))
def test_a_frame_that_comes_byte_by_byte_costs_its_size(size: int) -> None:
    frame = wire.frame(os.urandom(size))
    reader = wire.FrameReader(4000)
    got = [rpc for at in range(len(frame)) for rpc in reader.feed(frame[at : at + 1])]
    assert [wire.frame(rpc) for rpc in got] == [frame]


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 30), st.integers(1, 5))
def test_rpcs_are_taken_a_few_at_a_time(rpcs: list[bytes], step: int, most: int) -> None:
    reader, stream, got = wire.FrameReader(100), b"".join(map(wire.frame, rpcs)), []
    for start in range(0, len(stream), step):
        few = reader.feed(stream[start : start + step], most)
        while few:
            assert len(few) <= most
            got += few
            few = reader.more(most)
    assert got == rpcs
