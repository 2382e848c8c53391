"""What a search is judged by, before it and behind it; that may take seconds of its own."""

from __future__ import annotations

from typing import Protocol

from cptv_ao.core.outcome import Losses
from cptv_ao.evaluation.scoring import Shipped, check_losses
from cptv_ao.search.budget import Budget

# Share of the seconds of a call beyond which it is not asked of what comes between the given model and the refined one.
_DEAR = 0.05


class Judge(Protocol):
    """Scores the scales that are in a model."""

    def losses(self) -> Losses:
        """Of the scales that are in the model now."""


class Verdict:
    """The losses that count: those of what `accept_on` makes of a model, else of its own kernels.

    Args:
        shipped: scores what `accept_on` makes; None: there is none.
        kernels: score the model as it was given; those losses are asked for at once.
        budget: of the whole call.
        seconds: that one run of the kernels takes.

    Attributes:
        shipped: as it was given.
        given: of the model as it was given.
        seconds: that it takes to ask: the most so far.

    Raises:
        NonFiniteError: the losses of the model as it was given are no numbers.
    """

    def __init__(self, shipped: Shipped | None, kernels: Judge, budget: Budget, seconds: float) -> None:
        self.shipped, self._budget, self.seconds = shipped, budget, seconds
        self.given = check_losses(self.losses(kernels))

    def losses(self, kernels: Judge) -> Losses:
        """Of what is in the model now, which these kernels score where nothing else does."""
        before = self._budget.seconds
        losses = (self.shipped or kernels).losses()
        self.seconds = max(self.seconds, self._budget.world.first(self._budget.seconds - before))
        return losses

    @property
    def dear(self) -> bool:
        """Whether what `accept_on` takes is better spent on the search, but for what was given and what was found."""
        limit = self._budget.max_seconds
        return self.shipped is not None and limit is not None and self.seconds > _DEAR * limit

    @property
    def too_late(self) -> bool:
        """Whether no time is left to ask; the ranks must ask together."""
        return self.dear and not self._budget.pays(0.0)
