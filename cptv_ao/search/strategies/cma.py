"""Adapter to `cmaes.SepCMA` (CyberAgent) on log scales and zero_points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cptv_ao.search.strategies.protocol import Individual, Layout, Vector

_WORST = 1e12  # told for a rejected or non-finite candidate: cmaes wants finite numbers


class CmaStrategy:
    """Separable CMA-ES (Ros & Hansen 2008) around the start.

    Args:
        layout, start, rng: as for the other strategies.
        evaluations: candidates of this visit.
        sigma: first step size in log scale; zero_points move by `sigma * 20` codes.

    Raises:
        ImportError: the package `cmaes` is not installed.
    """

    def __init__(
        self,
        layout: Layout,
        start: Individual,
        rng: np.random.Generator,
        *,
        evaluations: int = 30,
        sigma: float = 0.02,
    ) -> None:
        try:
            from cmaes import SepCMA
        except ImportError as error:
            raise ImportError("search='cma' needs the package cmaes: pip install 'cptv_ao[cma]'") from error
        self._scales = layout.mask()
        self._best = start
        self._left = evaluations
        self._unit = 1 / 20  # of a zero_point step
        seed = int(rng.integers(2**31))
        self._cma: Any = SepCMA(mean=self._encode(start.vector), sigma=sigma, seed=seed)
        self._asked: list[tuple[Vector, float]] = []
        self._pending: Vector | None = None

    @property
    def done(self) -> bool:
        return self._left <= 0

    @property
    def threshold(self) -> float:
        return math.inf  # every loss ranks the generation

    @property
    def races(self) -> bool:
        return False

    def ask(self) -> Vector:
        self._pending = self._cma.ask()
        return self._decode(self._pending)

    def tell(self, vector: Vector, loss: float) -> None:
        self._left -= 1
        if loss < self._best.loss:
            self._best = Individual(vector, loss)
        assert self._pending is not None
        self._asked.append((self._pending, loss if math.isfinite(loss) else _WORST))
        if len(self._asked) == self._cma.population_size:
            self._cma.tell(self._asked)
            self._asked = []

    def best(self) -> Individual:
        return self._best

    def _encode(self, vector: Vector) -> Vector:
        encoded = vector * self._unit
        encoded[self._scales] = np.log(vector[self._scales])
        return encoded

    def _decode(self, encoded: Vector) -> Vector:
        vector = np.rint(encoded / self._unit)
        vector[self._scales] = np.exp(encoded[self._scales])
        return vector
