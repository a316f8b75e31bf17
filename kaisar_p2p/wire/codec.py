"""Canonical codec: frozen dataclasses as msgpack arrays.

A message is the array ``[tag, field, …]`` in minimal msgpack: integers, byte strings, text, arrays; no maps, floats,
nil, booleans or extensions. Whatever does not re-encode to itself is refused, so that equal messages have equal bytes
and signatures can be checked on the bytes as received (https://github.com/msgpack/msgpack/blob/master/spec.md).

::

    @message(7)
    @dataclass(frozen=True)
    class Ping:
        value: U32
        peers: Annotated[tuple[Bytes32, ...], Count(8)]
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from kaisar_p2p.errors import DecodeError

Plain = Any  # int | bytes | str | tuple[Plain, ...], as msgpack returns it


@dataclass(frozen=True)
class Bits:
    """An unsigned integer below 2**count (count ≤ 64)."""

    count: int


@dataclass(frozen=True)
class Exactly:
    """Bytes of exactly this length."""

    length: int


@dataclass(frozen=True)
class AtMost:
    """Bytes, or text as UTF-8, of at most this many bytes."""

    length: int


@dataclass(frozen=True)
class Line:
    """Text of at most this many bytes that is shown to people: without control characters (`is_line`)."""

    length: int


@dataclass(frozen=True)
class Count:
    """A tuple of at most this many items."""

    most: int


@dataclass(frozen=True)
class AmountOf:
    """A non-negative integer of up to this many bytes, as minimal big-endian bytes: planck do not fit in 64 bits."""

    length: int = 16


U8 = Annotated[int, Bits(8)]
U16 = Annotated[int, Bits(16)]
U32 = Annotated[int, Bits(32)]
U64 = Annotated[int, Bits(64)]
Planck = Annotated[int, AmountOf(16)]
Bytes12 = Annotated[bytes, Exactly(12)]
Bytes32 = Annotated[bytes, Exactly(32)]
Bytes64 = Annotated[bytes, Exactly(64)]
Bytes80 = Annotated[bytes, Exactly(80)]
Text64 = Annotated[str, Line(64)]
Text256 = Annotated[str, Line(256)]


_STEERING = {*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
"""Code points that steer terminals and pages: C0 and C1 controls, separators of lines, marks of direction. A list of
our own, because what Python calls printable changes with its version, and these rules must not."""


def is_line(text: str) -> bool:
    """Whether a text can be shown as it is: a stranger's words must not rewrite a terminal or forge lines of a log."""
    return _STEERING.isdisjoint(map(ord, text))


class Message(Protocol):
    """Anything decorated with `message`."""

    TAG: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


M = TypeVar("M")
Writer = Callable[[Any], Plain]
Reader = Callable[[Plain], Any]


@dataclass(frozen=True)
class _Layout:
    tag: int
    names: tuple[str, ...]
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]


_TAGS: dict[int, type] = {}
_LAYOUTS: dict[type, _Layout] = {}


def message(tag: int) -> Callable[[type[M]], type[M]]:
    """Register a frozen dataclass as a message; its tag is the first item of its array and unique in the network."""

    def register(cls: type[M]) -> type[M]:
        if not is_dataclass(cls) or tag in _TAGS or not 0 <= tag < 128:
            raise TypeError(f"{cls.__name__}: not a dataclass, or tag {tag} is taken or out of range")
        _TAGS[tag] = cls
        cls.TAG = tag  # type: ignore[attr-defined]
        return cls

    return register


def registered() -> dict[int, type]:
    """Every message that has been imported, by tag: for golden vectors and tests."""
    return dict(sorted(_TAGS.items()))


def encode(value: Any) -> bytes:
    """Canonical bytes of a message; ValueError or TypeError for a field out of its bounds (our own mistake)."""
    packed: bytes = msgpack.packb(_write(value), use_bin_type=True)
    return packed


def decode(cls: type[M], data: bytes) -> M:
    """The message of exactly this class whose canonical encoding is `data`; raises DecodeError, and nothing else."""
    plain = _parse(data)
    return _read(cls, plain)


def decode_any(classes: tuple[type[M], ...], data: bytes) -> M:
    """As `decode`, for one of several classes, told apart by tag."""
    return _read_one_of(classes, _parse(data))


def _parse(data: bytes) -> Plain:
    try:
        plain = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True)
        canonical = msgpack.packb(plain, use_bin_type=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise DecodeError(f"not msgpack: {type(error).__name__}") from error
    if canonical != data:
        raise DecodeError("not in canonical form")
    return plain


def _layout(cls: type) -> _Layout:
    layout = _LAYOUTS.get(cls)
    if layout is None:
        hints = get_type_hints(cls, include_extras=True)
        names = tuple(item.name for item in fields(cls))
        pairs = [_field_codec(hints[name], f"{cls.__name__}.{name}") for name in names]
        layout = _Layout(cls.TAG, names, tuple(w for w, _ in pairs), tuple(r for _, r in pairs))  # type: ignore[attr-defined]
        _LAYOUTS[cls] = layout
    return layout


def _write(value: Any) -> Plain:
    layout = _layout(type(value))
    return (
        layout.tag,
        *[write(getattr(value, name)) for name, write in zip(layout.names, layout.writers, strict=True)],
    )


def _read(cls: type[M], plain: Plain) -> M:
    layout = _layout(cls)
    if (
        type(plain) is not tuple
        or len(plain) != len(layout.names) + 1
        or type(plain[0]) is not int
        or plain[0] != layout.tag
    ):
        raise DecodeError(f"not a {cls.__name__}")
    return cls(*[read(item) for read, item in zip(layout.readers, plain[1:], strict=True)])


def _read_one_of(classes: tuple[type[M], ...], plain: Plain) -> M:
    if type(plain) is tuple and plain and type(plain[0]) is int:
        for cls in classes:
            if plain[0] == cls.TAG:  # type: ignore[attr-defined]
                return _read(cls, plain)
    raise DecodeError("not one of " + ", ".join(cls.__name__ for cls in classes))


def _field_codec(hint: Any, where: str) -> tuple[Writer, Reader]:
    if get_origin(hint) is Annotated:
        base, bound = get_args(hint)[:2]
        if isinstance(bound, Bits):
            return _integer(bound.count, where)
        if isinstance(bound, AmountOf):
            return _amount(bound.length, where)
        if isinstance(bound, Exactly) and base is bytes:
            return _sized(bytes, bound.length, bound.length, where)
        if isinstance(bound, AtMost) and base in (bytes, str):
            return _sized(base, 0, bound.length, where)
        if isinstance(bound, Line) and base is str:
            return _checked(lambda value: _fits(str, 0, bound.length, value) and is_line(value), where)
        if isinstance(bound, Count) and get_origin(base) is tuple:
            return _items(_field_codec(get_args(base)[0], where), bound.most, where)
    if get_origin(hint) in (Union, types.UnionType):
        classes = get_args(hint)
        return _write, lambda plain: _read_one_of(classes, plain)
    if isinstance(hint, type) and is_dataclass(hint):
        return _nested(hint, where)
    raise TypeError(f"{where}: {hint!r} has no canonical encoding")


def _checked(check: Callable[[Any], bool], where: str) -> tuple[Writer, Reader]:
    def write(value: Any) -> Plain:
        if not check(value):
            raise ValueError(f"{where}: {value!r:.80} is out of bounds")
        return value

    def read(plain: Plain) -> Any:
        if not check(plain):
            raise DecodeError(f"{where} is out of bounds")
        return plain

    return write, read


def _integer(bits: int, where: str) -> tuple[Writer, Reader]:
    limit = 1 << bits
    return _checked(lambda value: type(value) is int and 0 <= value < limit, where)


def _sized(kind: type, least: int, most: int, where: str) -> tuple[Writer, Reader]:
    return _checked(lambda value: _fits(kind, least, most, value), where)


def _fits(kind: type, least: int, most: int, value: Any) -> bool:
    if type(value) is not kind:
        return False
    length = len(value) if isinstance(value, bytes) else len(str(value).encode("utf-8", "surrogatepass"))
    return least <= length <= most


def _amount(most: int, where: str) -> tuple[Writer, Reader]:
    def write(value: Any) -> Plain:
        if type(value) is not int or value < 0 or value.bit_length() > 8 * most:
            raise ValueError(f"{where}: {value!r:.80} is out of bounds")
        return value.to_bytes((value.bit_length() + 7) // 8, "big")

    def read(plain: Plain) -> int:
        if type(plain) is not bytes or len(plain) > most or plain[:1] == b"\0":
            raise DecodeError(f"{where} is not a minimal amount")
        return int.from_bytes(plain, "big")

    return write, read


def _items(item: tuple[Writer, Reader], most: int, where: str) -> tuple[Writer, Reader]:
    write_item, read_item = item

    def write(value: Any) -> Plain:
        if type(value) is not tuple or len(value) > most:
            raise ValueError(f"{where}: not a tuple of at most {most}")
        return tuple(write_item(each) for each in value)

    def read(plain: Plain) -> Any:
        if type(plain) is not tuple or len(plain) > most:
            raise DecodeError(f"{where} is not an array of at most {most}")
        return tuple(read_item(each) for each in plain)

    return write, read


def _nested(cls: type, where: str) -> tuple[Writer, Reader]:
    def write(value: Any) -> Plain:
        if type(value) is not cls:
            raise ValueError(f"{where}: not a {cls.__name__}")
        return _write(value)

    return write, lambda plain: _read(cls, plain)
