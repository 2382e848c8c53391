"""How long a search may go on."""

from __future__ import annotations

import math
import time

import pytest

from cptv_ao.core.outcome import Status
from cptv_ao.search.budget import Budget


def test_without_limits_it_goes_on() -> None:
    budget = Budget(None, None)
    budget.evaluations = 10**9
    assert budget.left and budget.may_score and budget.stopped is None


def test_evaluations_end_it() -> None:
    budget = Budget(2, None)
    assert budget.left
    budget.evaluations = 2
    assert not budget.left
    assert not budget.may_score
    assert budget.stopped is None, "nobody asked"


def test_seconds_end_it_but_what_took_them_is_scored() -> None:
    budget = Budget(None, 60.0, started=time.monotonic() - 61.0)
    assert budget.seconds >= 61
    assert not budget.left
    assert budget.may_score


def test_a_stage_ends_with_its_share_or_with_the_search() -> None:
    budget = Budget(None, 100.0, started=time.monotonic() - 60.0)
    end = budget.end_of(0.1)
    assert 70.0 <= end < 71.0
    assert budget.left_until(end)
    budget.started -= 11.0
    assert budget.left and not budget.left_until(end)
    assert not Budget(None, 100.0, started=time.monotonic() - 101.0).left_until(1e3)
    unlimited = Budget(None, None, started=time.monotonic() - 1e6)
    assert unlimited.end_of(0.1) == math.inf and unlimited.left_until(math.inf)


@pytest.mark.parametrize("by", [Status.STOPPED, Status.CALLBACK])
def test_who_says_so_first_is_told(by: Status) -> None:
    budget = Budget(None, math.inf)
    budget.stop(by)
    budget.stop(Status.BUDGET)
    assert budget.stopped is by
    assert not budget.left
    assert not budget.may_score


def test_late_is_what_this_call_took() -> None:
    assert not Budget(None, 10.0, started=time.monotonic() - 11.5).pays(0.0)
    assert Budget(None, 10.0, started=time.monotonic() - 10.5).pays(0.0), "a tenth is not late"
    assert not Budget(None, 10.0, started=time.monotonic() - 10.5).pays(1.0)
    assert Budget(None, None, started=time.monotonic() - 1e6).pays(1e6)
    resumed = Budget(None, 10.0, started=time.monotonic() - 5.0)
    resumed.go_on_from(3, seconds=60.0)
    assert resumed.seconds >= 65 and resumed.pays(0.0), "what an earlier call took is not of this one"


def test_what_follows_the_search_is_kept_for_it() -> None:
    budget = Budget(None, 100.0, started=time.monotonic() - 60.0)
    assert budget.left and budget.search_seconds == 100.0
    budget.reserve(30.0)
    assert budget.left and budget.search_seconds == 70.0
    budget.reserve(80.0)
    assert not budget.left and budget.search_seconds == 0.0
    assert budget.may_score, "what was found may still be scored"
    assert Budget().search_seconds is None
