"""Ratios against named peers and limits: what the code does over what the best peer or the hardware can."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Figure(TypedDict):
    """One measured number; `ratio` is the value over the peer's, `ok` whether the target is met."""

    figure: str
    value: float
    unit: str
    peer: NotRequired[str | None]
    ratio: NotRequired[float | None]
    target: NotRequired[str | None]
    ok: NotRequired[bool | None]
