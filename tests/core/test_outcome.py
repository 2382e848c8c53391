"""Losses, and the visits of blocks."""

from __future__ import annotations

import math

import pytest

from cptv_ao.core.outcome import BlockResult, Losses, per_block


@pytest.mark.parametrize(
    ("found", "worse"),
    [
        (Losses(1.0, 1.0), False), (Losses(0.9, 1.0), False), (Losses(0.9, 1.1), True), (Losses(1.1, 0.1), True),
        (Losses(0.9, math.nan), True), (Losses(math.inf, 0.9), True), (Losses(0.9, None), False),
    ],
)  # fmt: skip
def test_worse_is_either_of_both_or_no_number(found: Losses, worse: bool) -> None:
    assert found.worse_than(Losses(1.0, 1.0)) == worse


def test_the_mean_is_of_both_where_there_are_both() -> None:
    assert Losses(1.0, 3.0).mean == 2.0
    assert Losses(1.0, None).mean == 1.0


def test_visits_of_a_block_are_one_row() -> None:
    visits = [
        BlockResult("b", 0, 3, 1, 9.0, 8.0),
        BlockResult("a", 0, 4, 2, 8.0, 7.0),
        BlockResult("b", 1, 5, 0, 7.0, 6.0),
    ]
    assert per_block(visits) == [("b", 2, 8, 1, 9.0, 6.0), ("a", 1, 4, 2, 8.0, 7.0)]
