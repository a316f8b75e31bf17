"""Reading requests: JSON objects and query values, each with a type and bounds, nothing unknown."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.identity import ss58_decode
from kaisar_p2p.wire.money import MAX_PLANCK
from node.settings import closest

ID_HEX = re.compile(r"[0-9a-f]{6,64}")
_DIGITS = re.compile(r"[0-9]{1,39}")


class Fields:
    """The fields of a JSON object, or the values of a query. ConfigError names the field and what it must be."""

    def __init__(self, plain: object, known: Iterable[str], what: str = "the request") -> None:
        known = tuple(known)
        if not isinstance(plain, dict):
            raise ConfigError(f"{what} must be a JSON object", hint=f"with {', '.join(known)}" if known else "")
        for name in plain:
            if name not in known:
                like = closest(str(name), known)
                hint = f"did you mean {like}?" if like else f"known are: {', '.join(known) or 'none'}"
                raise ConfigError(f"{what} has an unknown field {str(name)[:40]!r}", hint=hint)
        self._plain: dict[str, Any] = plain
        self._what = what

    def text(self, name: str, default: str | None = None, *, most: int = 4096) -> str:
        """A text of at most `most` characters."""
        value = self._plain.get(name, default)
        if not isinstance(value, str) or len(value) > most:
            raise self.wrong(name, f"text of at most {most} characters")
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 0, high: int = 2**32 - 1) -> int:
        """A whole number within bounds; in a query, its digits."""
        value = self._plain.get(name, default)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def planck(self, name: str, default: int | None = None) -> int:
        """An amount as text of digits."""
        value = self._plain.get(name, default if default is None else str(default))
        if not isinstance(value, str) or not _DIGITS.fullmatch(value) or int(value) > MAX_PLANCK:
            raise self.wrong(name, 'an amount in planck as text, such as "1000000000000000000"')
        return int(value)

    def flag(self, name: str) -> bool:
        """True, false, or absent for false; in a query 1 or 0."""
        value = self._plain.get(name, False)
        if value in (True, False, "0", "1"):
            return value in (True, "1")
        raise self.wrong(name, "true or false")

    def texts(self, name: str, *, most: int = 64) -> tuple[str, ...]:
        """A list of texts."""
        value = self._plain.get(name, [])
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, f"a list of at most {most} texts")
        return tuple(value)

    def integers(self, name: str, *, low: int, high: int, most: int) -> tuple[int, ...]:
        """A list of distinct whole numbers."""
        value = self._plain.get(name, [])
        whole = isinstance(value, list) and all(type(item) is int and low <= item <= high for item in value)
        if not whole or len(value) > most or len(set(value)) != len(value):
            raise self.wrong(name, f"a list of at most {most} different whole numbers from {low} to {high}")
        return tuple(value)

    def table(self, name: str, known: Iterable[str]) -> Fields:
        """An object within the object."""
        return Fields(self._plain.get(name, {}), known, name)

    def pairs(self, name: str, *, most: int = 64) -> tuple[tuple[str, str], ...]:
        """An object of texts by name, sorted."""
        value = self._plain.get(name, {})
        texts = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        if not texts or len(value) > most:
            raise self.wrong(name, f"an object of at most {most} texts")
        return tuple(sorted(value.items()))

    def data(self, name: str, *, most: int) -> bytes:
        """Bytes in base64, or none."""
        value = self._plain.get(name, "")
        try:
            decoded = base64.b64decode(value, validate=True) if isinstance(value, str) else None
        except ValueError:
            decoded = None
        if decoded is None or len(decoded) > most:
            raise self.wrong(name, f"at most {most} bytes in base64")
        return decoded

    def address(self, name: str) -> bytes:
        """An account by its SS58 address."""
        return ss58_decode(self.text(name, most=64))

    def has(self, name: str) -> bool:
        """Whether it was given."""
        return name in self._plain

    def wrong(self, name: str, expected: str) -> ConfigError:
        """The error that says what a field must be."""
        given = f"it is {str(self._plain[name])[:60]!r}" if name in self._plain else "it is missing"
        return ConfigError(f"{name} must be {expected}", hint=given)


async def body_of(request: Request, *known: str) -> Fields:
    """The JSON object in the body; no body counts as an empty object."""
    raw = await request.body()
    try:
        plain = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        raise ConfigError("the request is not JSON", hint='send a JSON object, such as {"port": 8080}') from None
    return Fields(plain, known)


def query_of(request: Request, *known: str) -> Fields:
    """The values of the query."""
    return Fields(dict(request.query_params), known, "the query")


def id_of(request: Request) -> str:
    """The order's id in the path: 64 hexadecimal digits, or at least the first six of them."""
    text = str(request.path_params["id"]).lower()
    if not ID_HEX.fullmatch(text):
        raise ConfigError(f"{text[:70]!r} is not an order id", hint="`kaisar order list` shows the ids")
    return text
