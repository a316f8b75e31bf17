"""The little of protobuf that control of foreign peers needs: fields by number, varints and bytes
(https://protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Value = int | bytes | str


def varint(value: int) -> bytes:
    """An unsigned varint."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def encode(*fields: tuple[int, Value]) -> bytes:
    """A message from (field number, value): integers as varints, all else with a length."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """A varint and the offset after it; raises IndexError when it is incomplete."""
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 127) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 128:
            return value, offset


def decode(data: bytes) -> dict[int, list[Any]]:
    """All values by field number; an absent field is an empty list."""
    fields: dict[int, list[Any]] = defaultdict(list)
    offset = 0
    while offset < len(data):
        tag, offset = read_varint(data, offset)
        value, offset = read_varint(data, offset)
        if tag & 7 == 0:
            fields[tag >> 3].append(value)
        elif tag & 7 == 2:
            fields[tag >> 3].append(data[offset : offset + value])
            offset += value
        else:
            raise ValueError(f"wire type {tag & 7} is not used here")
    return fields


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The complete messages, each behind its length, and what is left."""
    messages, start = [], 0
    while start < len(data):
        try:
            size, offset = read_varint(data, start)
        except IndexError:
            break
        if offset + size > len(data):
            break
        messages.append(data[offset : offset + size])
        start = offset + size
    return messages, data[start:]


def undelimited(data: bytes) -> bytes:
    """The message behind its length; raises ValueError when there are more or fewer bytes."""
    size, offset = read_varint(data, 0)
    if len(data) - offset != size:
        raise ValueError(f"a message of {size} bytes has {len(data) - offset}")
    return data[offset:]


def identified(told: dict[int, list[Any]]) -> dict[str, Any]:
    """An identify message, for people; its addresses as text."""
    from multiaddr import Multiaddr

    return {
        "agent": (told[6] or [b""])[0].decode(),
        "protocol_version": (told[5] or [b""])[0].decode(),
        "protocols": [protocol.decode() for protocol in told[3]],
        "addresses": [str(Multiaddr(address)) for address in told[2]],
        "observed": str(Multiaddr(told[4][0])) if told[4] and told[4][0] else "",
    }
