"""How tables, numbers, shares and decibels are written."""

from __future__ import annotations

import math

import pytest

from cptv_ao.core.formatting import change, decibels, number, percent, table


def test_a_table_is_aligned_under_a_rule() -> None:
    assert table([("site", "loss"), ("a", "1"), ("longer", "12.5")]) == [
        "site    loss",
        "------------",
        "a          1",
        "longer  12.5",
    ]


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0123456, "0.012346"), (123456.0, "1.2346e+05"), (0.0, "0"), (math.inf, "inf"), (math.nan, "-"), (None, "-")],
)
def test_a_number_has_five_digits(value: float | None, written: str) -> None:
    assert number(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0994, "9.9 %"), (0.0996, "10 %"), (1.0, "100 %"), (-0.021, "-2.1 %"), (-0.5, "-50 %"), (math.nan, "-")],
)
def test_a_share_below_ten_per_cent_has_a_decimal(value: float, written: str) -> None:
    assert percent(value) == written


def test_a_change_has_its_sign() -> None:
    assert change(2.0, 1.0) == "-50.0 %"
    assert change(2.0, 2.5) == "+25.0 %"
    assert change(0.0, 1.0) == "-", "of nothing"


def test_no_noise_is_exact() -> None:
    assert decibels(12.345) == "12.3 dB"
    assert decibels(math.inf) == "exact"
    assert decibels(None) == decibels(math.nan) == "-"
