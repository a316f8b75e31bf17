"""Amounts between people and the ledger: KAI as decimal text, planck as integers. No float is ever involved."""

from __future__ import annotations

import re

from kaisar_p2p.errors import ConfigError

DECIMALS = 18
PLANCK_PER_KAI: int = 10**DECIMALS
MAX_PLANCK = 2**128 - 1
"""The largest amount that a Substrate balance (u128) can hold."""

_AMOUNT = re.compile(r"([0-9]{1,30})(?:\.([0-9]{1,30}))?")


def kai_to_planck(text: str) -> int:
    """Planck of a decimal amount of KAI such as `12.5`; exact.

    ConfigError for anything else: a sign, an exponent, separators, more than 18 decimals, more than a u128 holds.
    """
    matched = _AMOUNT.fullmatch(text)
    if matched is None:
        raise ConfigError(f"{text[:40]!r} is not an amount of KAI", hint='write digits and one point, such as "12.5"')
    whole, fraction = matched[1], matched[2] or ""
    if len(fraction) > DECIMALS:
        raise ConfigError(f"{text} has more than {DECIMALS} decimals", hint="the smallest amount is 10^-18 KAI")
    planck = int(whole) * PLANCK_PER_KAI + int(fraction.ljust(DECIMALS, "0"))
    if planck > MAX_PLANCK:
        raise ConfigError(f"{text} KAI is more than can exist", hint="check the number of digits")
    return planck


def planck_to_kai(planck: int) -> str:
    """The shortest exact decimal text, which `kai_to_planck` reads back; ValueError for a negative amount."""
    if planck < 0:
        raise ValueError("an amount is not negative")
    whole, fraction = divmod(planck, PLANCK_PER_KAI)
    return f"{whole}.{fraction:0{DECIMALS}d}".rstrip("0").rstrip(".")
