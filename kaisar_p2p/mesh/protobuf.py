"""Protocol buffers for a few small messages, read within bounds (https://protobuf.dev/programming-guides/encoding/)."""

from __future__ import annotations

from kaisar_p2p.errors import RequestFailed

_FIELDS = 64  # of one message

Fields = dict[int, list[int | bytes]]


class MalformedMessage(RequestFailed):
    """The peer sent something that is not a message of the protocol."""


def parse_fields(data: bytes, most: int = _FIELDS) -> Fields:
    """The fields of a message by their number, `most` at the most; raises MalformedMessage."""
    fields: Fields = {}
    offset = count = 0
    while offset < len(data):
        count += 1
        if count > most:
            raise MalformedMessage("a message has too many fields")
        tag, offset = _read_varint(data, offset)
        value: int | bytes
        if tag & 7 == 0:
            value, offset = _read_varint(data, offset)
        else:
            size, offset = _size(data, offset, tag & 7)
            value = data[offset : offset + size]
            offset += size
            if offset > len(data):
                raise MalformedMessage("a message ends early")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _size(data: bytes, offset: int, wire_type: int) -> tuple[int, int]:
    if wire_type == 2:
        return _read_varint(data, offset)
    if wire_type in (1, 5):
        return (8 if wire_type == 1 else 4), offset
    raise MalformedMessage("a message is not a protocol buffer")


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(data):
            raise MalformedMessage("a message ends early")
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, offset
    raise MalformedMessage("a number is too long")


def varint(value: int) -> bytes:
    """A number of at least 0, seven bits a byte."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def number_field(field: int, value: int) -> bytes:
    """A field with a number."""
    return varint(field << 3) + varint(value)


def bytes_field(field: int, value: bytes) -> bytes:
    """A field with bytes, or with a message inside."""
    return varint(field << 3 | 2) + varint(len(value)) + value


def number_in(fields: Fields, field: int) -> int | None:
    """The number in a field, None without one; raises MalformedMessage for another type."""
    if field not in fields:
        return None
    value = fields[field][-1]
    if not isinstance(value, int):
        raise MalformedMessage(f"field {field} is not a number")
    return value


def all_bytes_in(fields: Fields, field: int) -> tuple[bytes, ...]:
    """All values of a repeated field; raises MalformedMessage for another type."""
    values = fields.get(field, [])
    if not all(isinstance(value, bytes) for value in values):
        raise MalformedMessage(f"field {field} is a number")
    return tuple(value for value in values if isinstance(value, bytes))


def bytes_in(fields: Fields, field: int) -> bytes | None:
    """The value of a field, None without one; raises MalformedMessage for another type."""
    values = all_bytes_in(fields, field)
    return values[-1] if values else None
