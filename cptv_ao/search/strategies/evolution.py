"""The default search of a block: a (1+1) evolution strategy on log scales, with sparse self-adapting moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cptv_ao.search.strategies.protocol import Group, Individual, Layout, Vector

# The success rule of Rechenberg in the form of Kern et al. (2004): a success widens the step by GROW, a failure
# narrows it by GROW ** -1/4, so that the step stands still at one success in five.
_GROW = 1.5
_SHRINK = _GROW**-0.25
_MIN_SIGMA, _MAX_SIGMA = 1e-3, 0.5


@dataclass
class _Move:
    """A kind of move with its own step size (in log scale)."""

    name: str
    groups: list[Group]
    sigma: float


class EvolutionStrategy:
    """One parent, one child; the child replaces the parent when its loss is lower.

    Three kinds of moves, each with a step size of its own that follows the success rule: whole activation sites
    (scale, and zero_point so that the range keeps its lower end, or by a few codes), whole weight tensors, and a
    few channels of a weight.

    Args:
        layout: what the vector means.
        start: the scales in the model and their loss.
        rng: the only source of randomness.
        evaluations: children of this visit.
        sigma: first step size in log scale.
    """

    def __init__(
        self,
        layout: Layout,
        start: Individual,
        rng: np.random.Generator,
        *,
        evaluations: int = 30,
        sigma: float = 0.05,
        steps: dict[str, float] | None = None,
    ) -> None:
        self._parent = start
        self._rng = rng
        self._left = evaluations
        self._steps = {} if steps is None else steps
        activations = [g for g in layout.groups if g.kind == "activation"]
        weights = [g for g in layout.groups if g.kind == "weight"]
        vectors = [g for g in weights if g.scales.stop - g.scales.start > 1]
        kinds = (("activations", activations, sigma), ("weights", weights, sigma), ("channels", vectors, 2 * sigma))
        self._moves = [_Move(name, groups, self._steps.get(name, s)) for name, groups, s in kinds if groups]
        self._last = self._moves[0]

    @property
    def done(self) -> bool:
        return self._left <= 0

    @property
    def threshold(self) -> float:
        return self._parent.loss

    @property
    def races(self) -> bool:
        return True

    def ask(self) -> Vector:
        self._last = move = self._moves[int(self._rng.integers(len(self._moves)))]
        child = self._parent.vector.copy()
        count = min(len(move.groups), 1 + int(self._rng.geometric(0.5)))
        for index in self._rng.choice(len(move.groups), size=count, replace=False):
            self._mutate(child, move.groups[int(index)], move)
        return child

    def tell(self, vector: Vector, loss: float) -> None:
        self._left -= 1
        success = loss < self._parent.loss  # False for NaN
        if success:
            self._parent = Individual(vector, loss)
        factor = _GROW if success else _SHRINK
        self._last.sigma = min(max(self._last.sigma * factor, _MIN_SIGMA), _MAX_SIGMA)
        self._steps[self._last.name] = self._last.sigma

    def best(self) -> Individual:
        return self._parent

    def _mutate(self, child: Vector, group: Group, move: _Move) -> None:
        scales = child[group.scales]
        if move.name == "channels":
            chosen = self._rng.random(len(scales)) < 0.1
            chosen[int(self._rng.integers(len(scales)))] = True
            factors = np.where(chosen, np.exp(move.sigma * self._rng.standard_normal(len(scales))), 1.0)
        else:
            factors = np.exp(np.full(len(scales), move.sigma * self._rng.standard_normal()))
        child[group.scales] = scales * factors
        if group.zero_points is None:
            return
        zero_points = child[group.zero_points]
        if self._rng.random() < 0.5:  # keep the lower end of the range: (qmin - z) * s stays the same
            zero_points = group.qmin - (group.qmin - zero_points) / factors
        if self._rng.random() < 0.5:
            zero_points = zero_points + self._rng.integers(-2, 3)
        child[group.zero_points] = np.clip(np.rint(zero_points), group.qmin, group.qmax)
