"""One block visit of the published method (arXiv 2211.09643, section 3 and algorithm 1)."""

from __future__ import annotations

import math

import numpy as np

from cptv_ao.search.strategies.protocol import Individual, Layout, Vector


class PaperStrategy:
    """Steady-state evolution with tournament selection and absolute uniform noise.

    Where we deviate from the authors' code: the start is an individual like any other, so the best can never be
    worse than it; losses are compared alone, never (loss, array) tuples; a NaN is the worst of all.

    Args:
        layout: what the vector means; zero_points are not touched.
        start: the scales in the model and their loss; the population is `population` copies of it, made anew at
            each visit.
        rng: the only source of randomness.
        cycles: children per visit.
        epsilon: half-width of the noise on every scale.
    """

    def __init__(
        self,
        layout: Layout,
        start: Individual,
        rng: np.random.Generator,
        *,
        population: int = 15,
        tournament: int = 10,
        cycles: int = 3,
        epsilon: float = 1e-3,
    ) -> None:
        self._scales = layout.mask()
        self._population = [start] * population
        self._best = start
        self._rng = rng
        self._tournament = tournament
        self._left = cycles
        self._epsilon = epsilon

    @property
    def done(self) -> bool:
        return self._left <= 0

    @property
    def threshold(self) -> float:
        # A child that is not better than the worst is appended and dropped at once.
        return max(member.loss for member in self._population)

    @property
    def races(self) -> bool:
        return False

    def ask(self) -> Vector:
        drawn = self._rng.integers(len(self._population), size=self._tournament)  # with replacement
        parent = min((self._population[i] for i in drawn), key=_loss)
        noise = self._rng.uniform(-self._epsilon, self._epsilon, size=int(self._scales.sum()))
        child: Vector = parent.vector.copy()
        child[self._scales] = np.abs(child[self._scales] + noise)
        return child

    def tell(self, vector: Vector, loss: float) -> None:
        self._left -= 1
        child = Individual(vector, math.inf if math.isnan(loss) else loss)
        if child.loss >= self.threshold:
            return
        worst = max(range(len(self._population)), key=lambda i: self._population[i].loss)
        del self._population[worst]
        self._population.append(child)
        if child.loss < self._best.loss:
            self._best = child

    def best(self) -> Individual:
        return self._best


def _loss(individual: Individual) -> float:
    return individual.loss
