"""Kinds of settings: each reads a TOML value or an environment variable's text, and writes TOML.

A kind's `parse` takes what TOML gave and returns the setting's value; `from_text` turns a variable's text into what
TOML would have given. Both raise ValueError with a reason that can follow "must be".
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.wire.money import kai_to_planck

MAX_TEXT_CHARS = 4096
MAX_LIST_ITEMS = 64


@dataclass(frozen=True)
class Kind:
    """One kind of value; `expected` completes the sentence "must be …"."""

    expected: str
    parse: Callable[[object], object]
    from_text: Callable[[str], object] = str


@dataclass(frozen=True)
class Table:
    """Names with a number each; what may be in it is checked by whoever uses it."""

    items: tuple[tuple[str, int | float], ...] = ()


def setting(kind: Kind, default: object, doc: str) -> Any:
    """A dataclass field that is a documented setting. `Any`, because the field's own annotation says its type."""
    return field(default=default, metadata={"kind": kind, "doc": doc})


def to_toml(value: object) -> str:
    """A setting's value in TOML; None is written as the word auto."""
    match value:
        case None:
            return '"auto"'
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Table():
            items = (f"{name} = {to_toml(number)}" for name, number in value.items)
            return "{ " + ", ".join(items) + " }" if value.items else "{}"
        case tuple():
            return "[" + ", ".join(to_toml(item) for item in value) + "]"
        case _:
            raise TypeError(f"{type(value).__name__} is no setting's value")


def text(expected: str = "text", accepts: Callable[[str], bool] = lambda _: True) -> Kind:
    """Text that `accepts` is true of."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or not accepts(value):
            raise ValueError(expected)
        return value

    return Kind(expected, parse)


def choice(*options: str) -> Kind:
    """One of a few words."""
    return text("one of " + ", ".join(options), lambda value: value in options)


def text_list(item: Kind, expected: str) -> Kind:
    """A list of distinct texts of one kind; in a variable they are separated by commas."""

    def parse(value: object) -> tuple[object, ...]:
        if not isinstance(value, list | tuple) or len(value) > MAX_LIST_ITEMS:
            raise ValueError(expected)
        items = tuple(item.parse(part) for part in value)
        if len(set(items)) != len(items):
            raise ValueError(f"{expected}, each one once")
        return items

    return Kind(expected, parse, lambda raw: [part.strip() for part in raw.split(",") if part.strip()])


def integer(low: int, high: int) -> Kind:
    """A whole number within bounds, both included."""
    expected = f"a whole number from {low} to {high}"

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(expected)
        return value

    return Kind(expected, parse, lambda raw: _integer_of(raw, expected))


def number(low: float, high: float) -> Kind:
    """A number within bounds, both included."""
    expected = f"a number from {low:g} to {high:g}"

    def parse(value: object) -> float:
        # The comparison also refuses nan.
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(expected)
        return float(value)

    def from_text(raw: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", raw):
            raise ValueError(expected)
        return float(raw)

    return Kind(expected, parse, from_text)


def integer_or_auto(low: int, high: int) -> Kind:
    """A whole number within bounds, or "auto", which is None."""
    whole = integer(low, high)
    expected = f'"auto" or {whole.expected}'

    def parse(value: object) -> object:
        if value is None or value == "auto":
            return None
        try:
            return whole.parse(value)
        except ValueError:
            raise ValueError(expected) from None

    return Kind(expected, parse, lambda raw: raw if raw == "auto" else _integer_of(raw, expected))


def boolean() -> Kind:
    """True or false."""

    def parse(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value

    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return Kind("true or false", parse, lambda raw: words.get(raw.lower(), raw))


def boolean_or_auto() -> Kind:
    """True, false, or "auto", which is None."""
    plain = boolean()
    expected = '"auto", true or false'

    def parse(value: object) -> object:
        if value is None or value == "auto":
            return None
        try:
            return plain.parse(value)
        except ValueError:
            raise ValueError(expected) from None

    return Kind(expected, parse, lambda raw: raw if raw == "auto" else plain.from_text(raw))


def table() -> Kind:
    """Names with a number each; in a variable, `name=number` separated by commas."""
    expected = "a table of names with a number each"

    def parse(value: object) -> Table:
        if isinstance(value, Table):
            return value
        if not isinstance(value, dict) or len(value) > MAX_LIST_ITEMS:
            raise ValueError(expected)
        for name, number in value.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= 1 << 50:
                raise ValueError(f"{expected}; {name:.40} is {number!r:.40}")
        return Table(tuple(sorted(value.items())))

    def from_text(raw: str) -> dict[str, int | float]:
        return dict(_named_number(part.strip(), expected) for part in raw.split(",") if part.strip())

    return Kind(expected, parse, from_text)


def _named_number(text: str, expected: str) -> tuple[str, int | float]:
    found = re.fullmatch(r"([a-z_]{1,60})\s*=\s*(-?[0-9]{1,15})(\.[0-9]{1,9})?", text)
    if found is None:
        raise ValueError(f"{expected}, such as connections=300,dial_s=2.5")
    return found[1], float(found[2] + found[3]) if found[3] else int(found[2])


def kai() -> Kind:
    """An amount of KAI, as decimal text so that no float rounds it."""

    def accepts(value: str) -> bool:
        try:
            kai_to_planck(value)
        except ConfigError:
            return False
        return True

    return text('an amount of KAI in quotes, such as "12.5"', accepts)


def loopback_host() -> Kind:
    """A loopback address, or localhost."""
    return text(
        "a loopback address such as 127.0.0.1: the API is for this machine only; from elsewhere, use an SSH tunnel",
        is_loopback,
    )


def is_loopback(host: str) -> bool:
    """True for localhost and for addresses that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen_multiaddr() -> Kind:
    """An address of ours to listen on."""
    return text('a multiaddr to listen on, such as "/ip4/0.0.0.0/tcp/4001"', _is_listen_multiaddr)


def announced_multiaddr() -> Kind:
    """An address of ours to tell others."""
    return text(
        'a multiaddr to announce, such as "/ip4/203.0.113.7/tcp/4001" or "/dns4/node.example.org/tcp/4001"',
        _is_announced_multiaddr,
    )


def peer_multiaddr() -> Kind:
    """An address of a peer, with its peer id."""
    pattern = re.compile(r"(?:/[a-z0-9-]+(?:/[^/\s]+)?)*/p2p/[1-9A-HJ-NP-Za-km-z]{20,80}")
    return text(
        'a peer\'s multiaddr with its id, such as "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooW…"',
        lambda value: pattern.fullmatch(value) is not None,
    )


def _is_listen_multiaddr(value: str) -> bool:
    matched = re.fullmatch(r"/(ip4|ip6)/([^/\s]+)/(?:tcp/([0-9]{1,5})|udp/([0-9]{1,5})/quic-v1)", value)
    if matched is None or int(matched[3] or matched[4] or "0") > 65535:
        return False
    try:
        return ipaddress.ip_address(matched[2]).version == (4 if matched[1] == "ip4" else 6)
    except ValueError:
        return False


def _is_announced_multiaddr(value: str) -> bool:
    named = re.fullmatch(r"/dns[46]?/[A-Za-z0-9._-]{1,120}/tcp/([0-9]{1,5})", value)
    if named is not None:
        port = int(named[1])
    elif "/tcp/" in value and _is_listen_multiaddr(value):
        port = int(value.rpartition("/")[2])
    else:
        return False
    return 0 < port <= 65535


def _integer_of(raw: str, expected: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", raw):
        raise ValueError(expected)
    return int(raw)


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option most like a mistyped word, None when none is."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return found[0] if found else None
