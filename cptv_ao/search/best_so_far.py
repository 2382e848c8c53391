"""The best scales that a search has seen, and what they must be for that: no worse than the model that was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.outcome import Losses, Point
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.search.baseline import at_state
from cptv_ao.search.budget import Budget

_Measured = TypeVar("_Measured")


class BestSoFar:
    """The best accepted state of a model, and the history of all that were offered.

    A state is accepted when neither loss is worse than the start's, and the mean of the losses on the search and on
    the held-out images is the lowest so far; the start is the first state.

    Args:
        store: holds the model's scales.
        holdout: scores them on the held-out images; None: there are none.
        budget: of the search, which dates the history.
        start, state: of the model that was given.

    Attributes:
        start: losses of the model that was given.
        losses: of the best state.
        history: a point for each state that was offered, the start first.
        rejected: whether a state was not accepted for what it makes of the held-out images.
    """

    def __init__(
        self, store: ScaleStore, holdout: Evaluator | None, budget: Budget, start: Losses, state: Mapping[str, Any]
    ) -> None:
        self._store, self._holdout, self._budget = store, holdout, budget
        self.start = self.losses = start
        self._given = self._state = state
        self.history = [Point(0, budget.seconds, start.search, start.holdout, True)]
        self.rejected = False

    def offer(self, loss: float) -> bool:
        """Keep the state that is in the model, with this loss on the search images, if it is the best accepted one.

        Returns:
            Whether it is.
        """
        losses = self.losses if loss >= self.losses.search else with_held_out(loss, self._holdout)
        kept = False
        if losses.worse_than(replace(self.start, search=math.inf)):
            self.rejected = True
        elif losses.mean < self.losses.mean:
            self.losses, self._state = losses, self._store.snapshot()
            kept = True
        told = losses.holdout if losses.holdout is None or math.isfinite(losses.holdout) else None
        self.history.append(Point(self._budget.evaluations, self._budget.seconds, loss, told, kept))
        return kept

    def restore(self) -> None:
        """Leave it in the model."""
        self._store.restore_all(self._state)

    def measured(self, measure: Callable[[], _Measured]) -> _Measured | None:
        """What is measured while it is in the model, which is then as it was; None where the best is the start."""
        return None if self._state is self._given else at_state(self._store, self._state, measure)

    def resume(self, state: Mapping[str, Any] | None, history: Sequence[Point], rejected: bool) -> None:
        """Go on from another best state, None for the start; its losses are not known until `score_again`."""
        self._state = self._given if state is None else state
        self.history, self.rejected = list(history), rejected

    def score_again(self, search: Evaluator) -> None:
        """Find its losses; all ranks together."""
        found = self.measured(lambda: with_held_out(search.score(), self._holdout))
        self.losses = self.start if found is None else found


def with_held_out(search: float, holdout: Evaluator | None) -> Losses:
    """A loss on the search images, and that of the same scales, which are in the model, on the held-out ones."""
    return Losses(search, None if holdout is None else holdout.score())
