"""How long a descent lasts and how fast it goes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cptv_ao.search.proposals.schedule import DescentProgress, Schedule


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    schedule = Schedule(100, 0.5)
    rates = [schedule.rate(schedule.progress(step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.5 / 11)
    peak = rates.index(max(rates))
    assert rates[peak] == 0.5 and peak == 10
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[55] == pytest.approx(0.25), "half-way down the cosine"
    assert rates[100] == pytest.approx(0)
    assert schedule.rate(1.7) == pytest.approx(0), "never up again"


def test_steps_are_the_measure_until_seconds_are() -> None:
    assert Schedule(200, 0.1).progress(50) == 0.25
    late = Schedule(200, 0.1, seconds=100.0, started=time.monotonic() - 80.0)
    assert 0.8 <= late.progress(50) < 0.9
    assert late.progress(198) == 0.99


def test_a_proposal_is_named_after_the_steps_before_it() -> None:
    progress = DescentProgress()
    progress.steps = 7
    assert progress.proposed(1) == "gradient, 7 steps"
    assert (progress.proposals, progress.proposed_at) == (1, 7)


def test_each_batch_comes_once_before_any_comes_again() -> None:
    progress, rng = DescentProgress(), np.random.default_rng(0)
    drawn = [progress.next_batch(rng, 5) for _ in range(15)]
    assert all(sorted(drawn[first : first + 5]) == list(range(5)) for first in (0, 5, 10))
    assert drawn[:5] != drawn[5:10], "in another order"
