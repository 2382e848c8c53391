"""Search strategies: they see vectors and losses, never a graph."""

from __future__ import annotations

import numpy as np

from cptv_ao.search.strategies.cma import CmaStrategy
from cptv_ao.search.strategies.evolution import EvolutionStrategy
from cptv_ao.search.strategies.paper import PaperStrategy
from cptv_ao.search.strategies.protocol import Group, Individual, Layout, Strategy, Vector

__all__ = [
    "CmaStrategy",
    "EvolutionStrategy",
    "Group",
    "Individual",
    "Layout",
    "PaperStrategy",
    "Strategy",
    "Vector",
    "make_strategy",
]


def make_strategy(
    name: str,
    layout: Layout,
    start: Individual,
    rng: np.random.Generator,
    *,
    evaluations: int,
    epsilon: float,
    steps: dict[str, float],
) -> Strategy:
    """A strategy by its name in `RefineConfig.search`, for one visit of a block.

    `steps` carries step sizes by kind of move from one visit of the block to the next.
    """
    if name == "paper":
        return PaperStrategy(layout, start, rng, cycles=evaluations, epsilon=epsilon)
    if name == "cma":
        return CmaStrategy(layout, start, rng, evaluations=evaluations)
    return EvolutionStrategy(layout, start, rng, evaluations=evaluations, steps=steps)
