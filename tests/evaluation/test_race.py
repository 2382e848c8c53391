"""When a candidate is given up: waves of batches, and how far behind it may be."""

from __future__ import annotations

import pytest

from cptv_ao.evaluation.race import RACE_MARGIN, WAVES, margin, waves_of


@pytest.mark.parametrize("batches", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("first", [0, 2, 23])
def test_each_batch_is_in_one_wave_and_the_first_comes_first(batches: int, first: int) -> None:
    waves = waves_of(batches, first)
    order = [index for wave in waves for index in wave]
    assert sorted(order) == list(range(batches))
    assert order[0] == first % batches
    assert len(waves) <= WAVES
    assert waves_of(batches, first, most=1) == [order], "nothing is decided on the way"


def test_the_margin_closes_as_images_are_seen() -> None:
    margins = [margin(seen, WAVES) for seen in range(1, WAVES + 1)]
    assert margins[0] == RACE_MARGIN
    assert margins == sorted(margins, reverse=True)
    assert margins[-1] == 0.0
    assert margin(1, 1) == 0.0
