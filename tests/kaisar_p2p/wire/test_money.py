"""Amounts are exact in both directions."""

from __future__ import annotations

from decimal import Context, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.wire.money import MAX_PLANCK, PLANCK_PER_KAI, kai_to_planck, planck_to_kai

EXACT = Context(prec=80)


@pytest.mark.parametrize(
    ("text", "planck"),
    [
        ("0", 0),
        ("1", PLANCK_PER_KAI),
        ("12.5", 12_500_000_000_000_000_000),
        ("0.000000000000000001", 1),
        ("0.1", 10**17),
        ("1000000000", 10**27),
        ("340282366920938463463.374607431768211455", MAX_PLANCK),
    ],
)
def test_known_amounts(text: str, planck: int) -> None:
    assert kai_to_planck(text) == planck
    assert planck_to_kai(planck) == text


@pytest.mark.parametrize(("text", "planck"), [("007", 7 * PLANCK_PER_KAI), ("1.50", 15 * 10**17), ("0.0", 0)])
def test_other_spellings_are_read(text: str, planck: int) -> None:
    assert kai_to_planck(text) == planck


@given(st.integers(0, MAX_PLANCK))
def test_every_amount_is_read_as_it_is_written(planck: int) -> None:
    assert kai_to_planck(planck_to_kai(planck)) == planck


@given(st.integers(0, MAX_PLANCK))
def test_amounts_equal_decimal_arithmetic(planck: int) -> None:
    assert EXACT.multiply(Decimal(planck_to_kai(planck)), Decimal(PLANCK_PER_KAI)) == planck


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "1.", ".5", "-1", "+1", "1e3", "1,5", "1_000", " 1", "1\n", "inf", "nan", "0x1", "١", "1.5 KAI"),
        *("0." + "0" * 18 + "1", "0." + "0" * 19, "340282366920938463463.374607431768211456", "1" * 30, "9" * 5000),
    ],
)
def test_anything_else_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kai_to_planck(text)
    assert caught.value.hint
    assert len(str(caught.value)) < 200


@given(st.text(max_size=50))
def test_any_text_is_an_amount_or_a_config_error(text: str) -> None:
    try:
        assert 0 <= kai_to_planck(text) <= MAX_PLANCK
    except ConfigError:
        assert not (text.isdigit() and text.isascii() and len(text) < 20)


def test_a_negative_amount_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="negative"):
        planck_to_kai(-1)
