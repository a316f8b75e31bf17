"""Specimens of every message, built from the fields' own bounds; used by the golden vectors and the codec's tests."""

from __future__ import annotations

import importlib
import pkgutil
import types
from dataclasses import fields
from hashlib import sha256
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import kaisar_p2p
import protocols
from kaisar_p2p.wire.codec import AmountOf, AtMost, Bits, Count, Exactly, Line, registered

ITEMS = 2


def message_classes() -> dict[int, type]:
    """Every message of the network, by tag; those that tests define have tags from 120 on in other modules."""
    for package in (kaisar_p2p, protocols):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("shim", "prove_cupy")):
                importlib.import_module(module.name)
    return {tag: cls for tag, cls in registered().items() if cls.__module__.startswith(("kaisar_p2p", "protocols"))}


def specimen(cls: type, index: int) -> Any:
    """The same message for the same arguments, on every machine."""
    hints = get_type_hints(cls, include_extras=True)
    return cls(*[_value(hints[each.name], f"{cls.__name__}.{each.name}", index) for each in fields(cls)])


def _value(hint: Any, where: str, index: int) -> Any:
    noise = sha256(f"{where}/{index}".encode()).digest()
    if get_origin(hint) is Annotated:
        base, bound = get_args(hint)[:2]
        match bound:
            case Bits(count):
                return int.from_bytes(noise, "big") % (1 << count)
            case AmountOf(length):
                return int.from_bytes(noise[: (index * 7) % (length + 1)], "big")
            case Exactly(length):
                return (noise * (length // 32 + 1))[:length]
            case AtMost(length) | Line(length) if base is str:
                return noise.hex()[: min(length, 5 + index)]
            case AtMost(length):
                return noise[: min(length, 9 + index)]
            case Count(most):
                item = get_args(base)[0]
                return tuple(_value(item, f"{where}[{each}]", index) for each in range(min(most, ITEMS)))
    if get_origin(hint) in (Union, types.UnionType):
        choices = get_args(hint)
        return specimen(choices[index % len(choices)], index)
    return specimen(hint, index)
