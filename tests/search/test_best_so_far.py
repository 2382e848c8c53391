"""What a search keeps: losses and states that no model holds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from helpers.fake_store import FakeStore, activation, qparams

from cptv_ao.core.outcome import Losses, Point
from cptv_ao.search.best_so_far import BestSoFar
from cptv_ao.search.budget import Budget


def opened(start: float, *held_out: float) -> tuple[FakeStore, BestSoFar]:
    """The start, with a held-out loss where there are any, and those of what is offered next."""
    store, losses = FakeStore.of(activation("in")), list(held_out)
    holdout: Any = SimpleNamespace(score=lambda: losses.pop(0)) if held_out else None
    first = Losses(start, holdout.score() if holdout else None)
    return store, BestSoFar(store, holdout, Budget(), first, store.snapshot())


def put(store: FakeStore, scale: float) -> None:
    store.write("in", qparams(scale, store.sites["in"]))


def scale_of(store: FakeStore) -> float:
    return float(store.read("in").scale)


def test_the_lowest_mean_comes_back() -> None:
    store, best = opened(1.0, 1.0, 0.9, 0.4, 1.0)
    kept = []
    for scale, loss in ((2.0, 0.8), (3.0, 0.7), (4.0, 0.3)):
        put(store, scale)
        kept.append(best.offer(loss))
    assert kept == [True, True, False], "the last is as low on the search images as it is high on the others"
    best.restore()
    assert scale_of(store) == 3.0
    assert best.losses == Losses(0.7, 0.4) and not best.rejected
    assert [point.search for point in best.history] == [1.0, 0.8, 0.7, 0.3]
    assert [point.kept for point in best.history] == [True, True, True, False]


def test_what_is_worse_than_the_start_on_one_set_is_rejected() -> None:
    store, best = opened(1.0, 0.5, 0.6, math.nan)
    for scale in (2.0, 3.0):
        put(store, scale)
        assert not best.offer(0.1)
    assert best.rejected and best.losses == best.start
    assert best.history[-1].holdout is None, "no number is told"


def test_where_it_is_no_better_on_the_search_images_the_others_are_not_asked() -> None:
    store, best = opened(1.0, 0.5)
    put(store, 2.0)
    assert not best.offer(1.0)


def test_it_is_measured_in_the_model_which_is_then_as_it_was() -> None:
    store, best = opened(1.0)
    assert best.measured(lambda: scale_of(store)) is None, "it is the model that was given"
    put(store, 2.0)
    best.offer(0.5)
    put(store, 3.0)
    assert best.measured(lambda: scale_of(store)) == 2.0
    assert scale_of(store) == 3.0


def test_it_goes_on_from_a_state_whose_losses_are_found_again() -> None:
    store, best = opened(1.0)
    put(store, 2.0)
    state, history = store.snapshot(), [Point(0, 0.0, 1.0, None, True), Point(5, 1.0, 0.25, None, True)]
    put(store, 3.0)
    search: Any = SimpleNamespace(score=lambda: 1 / scale_of(store) ** 2)
    best.resume(state, history, rejected=True)
    best.score_again(search)
    assert best.losses == Losses(0.25, None) and best.history == history and best.rejected
    assert scale_of(store) == 3.0
    best.resume(None, history[:1], rejected=False)
    best.score_again(search)
    assert best.losses == best.start
