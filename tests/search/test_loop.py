"""The loop on scales that no model holds: a loss with a known minimum in the evaluator's place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_store import FakeStore, activation, qparams, weight

from cptv_ao import RefineConfig
from cptv_ao.callbacks import STOP
from cptv_ao.core.events import Event
from cptv_ao.core.outcome import Status
from cptv_ao.core.qparams import same
from cptv_ao.search.budget import Budget
from cptv_ao.search.loop import Loop
from cptv_ao.search.search_space import SearchSpace

Score = Callable[[FakeStore], float]
BLOCKS = {"in": "first", "w": "first", "out": "second"}


def near(scale: float) -> Score:
    """How far all scales are from one, in log2."""

    def loss(store: FakeStore) -> float:
        return sum(float((value.scale / scale).log2().square().sum()) for value in store.values.values())

    return loss


@dataclass
class FakeEvaluator:
    """What a loop asks an evaluator for; `asked` says what it was."""

    store: FakeStore
    loss: Score
    raced: int = 0
    images: int = 10
    kept: int = 0
    asked: list[Any] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)

    def score(self, threshold: float = math.inf, race: bool = False, key: bytes = b"") -> float:
        self.thresholds.append(threshold)
        found = self.loss(self.store)
        return math.inf if found >= threshold else found

    def keep(self) -> None:
        self.kept += 1

    def plan(self, blocks: Iterable[list[str]]) -> None:
        self.asked.append(("plan", list(blocks)))

    def enter(self, nodes: list[str]) -> None:
        self.asked.append(("enter", nodes))

    def leave(self) -> None:
        self.asked.append("leave")

    def go_on_from(self, raced: int) -> None:
        self.raced = raced


def opened(
    scored: Score,
    holdout: Score | None = None,
    budget: Budget | None = None,
    listeners: Any = (),
    idle_images: float = math.inf,
    visit_images: float = math.inf,
    **changes: Any,
) -> tuple[FakeStore, Loop, FakeEvaluator]:
    store = FakeStore.of(activation("in"), weight("w", 3), activation("out"))
    settings: dict[str, Any] = {
        "evaluations": 40,
        "passes": 3,
        "blocks": lambda sites: {s.name: BLOCKS[s.name] for s in sites},
    }
    config = RefineConfig(**(settings | changes))
    evaluator = FakeEvaluator(store, scored)
    held_out = holdout and FakeEvaluator(store, holdout)
    scoring: Any = SimpleNamespace(
        search=evaluator, holdout=held_out, idle_images=idle_images, visit_images=visit_images
    )
    loop = Loop(SearchSpace.of(store, config), scoring, config, budget or Budget(None, None), listeners)
    return store, loop, evaluator


def run(loop: Loop) -> None:
    loop.run(lambda: None)


@pytest.mark.parametrize("search", ["evolution", "paper"])
def test_it_leaves_the_best_scales_it_has_seen(search: Any) -> None:
    seen: list[float] = []
    store, loop, _ = opened(near(0.1), None, None, [lambda event: seen.append(event.loss)], search=search)
    before = near(0.1)(store)
    run(loop)
    assert near(0.1)(store) == loop.best.losses.search == min(seen) < before
    assert loop.best.history[-1].search == pytest.approx(loop.loss)


def test_each_block_is_entered_planned_and_left() -> None:
    _, loop, evaluator = opened(near(0.1), passes=1, block_order="backward")
    run(loop)
    first, second = ["in", "w"], ["out"]
    assert evaluator.asked == [("plan", [first, second]), ("enter", second), "leave", ("enter", first), "leave"]
    assert [(result.name, result.evaluations) for result in loop.results] == [("second", 40), ("first", 40)]
    assert loop.budget.evaluations == 80


def test_a_visit_says_what_it_did() -> None:
    losses: list[float] = []

    def listen(event: Event) -> None:
        if event.kind == "candidate":
            losses.append(event.loss)

    _, loop, evaluator = opened(near(0.1), listeners=[listen], search="paper")  # which is told of losses above the best
    run(loop)
    for number, visit in enumerate(loop.results):
        own = [visit.before, *losses[40 * number : 40 * (number + 1)]]
        lows = [loss for index, loss in enumerate(own) if index and loss < min(own[:index])]
        assert (visit.accepted, visit.after) == (len(lows), min(own))
    assert evaluator.kept == 1 + sum(visit.accepted for visit in loop.results)


def test_what_is_worse_on_the_held_out_images_is_not_kept() -> None:
    store, loop, _ = opened(near(0.1), holdout=near(0.125))
    given = store.snapshot()
    run(loop)
    assert loop.loss < loop.best.start.search
    assert loop.best.rejected and loop.best.losses == loop.best.start
    assert all(same(store.values[name], given[name]) for name in given), "the scales that were given"


def test_it_ends_after_a_pass_that_gained_nothing() -> None:
    _, loop, _ = opened(near(0.125), passes=5)
    run(loop)
    assert len(loop.results) == 2, "both blocks once"
    assert loop.best.losses == loop.best.start and not loop.best.rejected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_number_change_nothing(bad: float) -> None:
    losses = itertools.chain([1.0], itertools.repeat(bad))
    store, loop, _ = opened(lambda _: next(losses), passes=1)
    given = store.snapshot()
    run(loop)
    assert store.values.keys() == given.keys() and all(same(store.values[n], given[n]) for n in given)
    assert loop.best.losses.search == loop.loss == 1.0


def test_of_proposals_the_best_is_gone_on_from() -> None:
    store, loop, evaluator = opened(near(0.1))
    worse, better = ({name: qparams(scale, store.sites[name]) for name in store.sites} for scale in (0.2, 0.11))
    assert loop.propose([("worse", lambda: worse), ("better", lambda: better), ("worse", lambda: worse)])
    assert [stage.split(",")[0] for stage in loop.stages] == [
        "worse: not better",
        "better: accepted",
        "worse: not better",
    ]
    assert float(store.read("in").scale) == pytest.approx(0.11)
    assert loop.loss == evaluator.loss(store)
    assert [point.kept for point in loop.best.history] == [True, False, True, False]


def test_a_proposal_that_the_held_out_images_refuse_is_not_called_accepted() -> None:
    store, loop, _ = opened(near(0.11), holdout=near(0.14))
    proposed = {name: qparams(0.11, store.sites[name]) for name in store.sites}
    loop.propose([("lower", lambda: proposed)])
    assert loop.stages[0].startswith("lower: better on the search images, not on all, loss ")
    assert not loop.best.history[-1].kept
    assert float(store.read("in").scale) == pytest.approx(0.11), "from there it goes on"


def test_a_budget_of_evaluations_ends_it_at_once() -> None:
    _, loop, _ = opened(near(0.1), budget=Budget(7, None))
    assert not loop.propose([("a", dict)] * 8)
    run(loop)
    assert loop.budget.evaluations == 7
    assert loop.results == []


def test_a_listener_that_says_so_ends_it() -> None:
    def stop(event: Event) -> Any:
        return STOP if event.kind == "candidate" and event.evaluations == 5 else None

    store, loop, _ = opened(near(0.1), listeners=[stop])
    run(loop)
    assert loop.budget.stopped is Status.CALLBACK
    assert loop.budget.evaluations == 5
    assert loop.best.losses.search == near(0.1)(store)


def test_it_goes_on_from_its_state_to_the_same_end() -> None:
    """After each block of the first pass and the second."""
    whole_store, whole, _ = opened(near(0.1), holdout=near(0.102))
    states: list[Any] = []
    whole.run(lambda: states.append(whole.state()))
    assert len(states) >= 4
    for state in states[:4]:
        store, loop, _ = opened(near(0.1), holdout=near(0.102))
        loop.resume(state)
        assert loop.score_again() == state.record.losses
        run(loop)
        assert all(same(store.values[name], whole_store.values[name]) for name in store.values)
        assert loop.results == whole.results and loop.best.losses == whole.best.losses
        assert [point.search for point in loop.best.history] == [point.search for point in whole.best.history]


@pytest.mark.parametrize(("loss", "in_full"), [("kl", False), (lambda c, t: (c - t).square().mean(), True)])
def test_a_loss_of_the_users_own_is_always_scored_in_full(loss: Any, in_full: bool) -> None:
    """Nothing says that it is never negative."""
    _, loop, evaluator = opened(near(0.1), passes=1, loss=loss)
    evaluator.thresholds.clear()
    run(loop)
    assert {math.isinf(threshold) for threshold in evaluator.thresholds} == {in_full}


def test_visits_that_gain_nothing_for_long_are_given_up() -> None:
    still = {"passes": 3, "evaluations": 4}  # nothing is better than anything
    _, patient, _ = opened(lambda _: 1.0, **still)
    run(patient)
    assert [result.name for result in patient.results] == ["first", "second"], "a pass without a gain is the last one"
    _, hurried, _ = opened(lambda _: 1.0, idle_images=39, **still)
    run(hurried)
    assert [result.name for result in hurried.results] == ["first"], "4 evaluations of 10 images"
    _, paper, _ = opened(lambda _: 1.0, idle_images=39, search="paper", **still)
    run(paper)
    assert len(paper.results) == 6, "which says how often it visits"


def test_visits_that_gain_end_where_they_have_cost_enough() -> None:
    """A visit is 40 evaluations of 10 images."""
    _, loop, _ = opened(near(0.1), visit_images=799, passes=2)
    run(loop)
    assert len(loop.results) == 1 and loop.results[0].after < loop.results[0].before
    _, dear, _ = opened(near(0.1), visit_images=399, passes=2)
    run(dear)
    assert not dear.results, "gradient steps have made more of it"
    for less in (399, 9):  # than a visit costs, than a score
        _, alone, _ = opened(near(0.1), visit_images=less, passes=2, gradient_steps=0)
        run(alone)
        assert len(alone.results) == 1
    _, paper, _ = opened(near(0.1), visit_images=399, passes=2, search="paper")
    run(paper)
    assert len(paper.results) == 4, "which says how often it visits"


def test_a_gain_begins_the_count_anew() -> None:
    _, loop, _ = opened(near(0.1), idle_images=1, passes=2)
    run(loop)
    assert len(loop.results) > 1 and loop.results[0].after < loop.results[0].before
