"""By how much the channels of what linear layers read on one scale are multiplied, and divided in the weights that read
them: of a few families of factors those whose roundings, tried on some of the values, cost the products least.

The families are products of powers of the sizes of the channels and of the columns of the weights, by their largest or
their root mean squares (square roots of the largest: SmoothQuant, arXiv 2211.10438; other powers, found by the error of
the products: AWQ, arXiv 2306.00978, and Outlier Suppression+, arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.transforms.channel_ranges import spread

# Powers of the sizes of channels and of columns that factors are made of.
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Shares of the range that are tried, the last ones where there are so few codes that clipping is worth it.
_CLIPPED, _CLIPPED_FURTHER, _FEW_CODES = (1.0, 0.7), (0.5, 0.35), 100
# What roundings of weights cost beside those to the nearest code: they are chosen for the least error later.
_CHOSEN = 0.4
# What is left of the roundings, at most, for factors to be worth it.
_WORTH = 0.9
# Powers of two that a factor is, at most; rows of a weight that stand for all of them.
_FURTHEST, _ROWS = 8.0, 128


@dataclass(frozen=True)
class ReadWeights:
    """The weights of the linear layers that read an input.

    Attributes:
        square: sums over each column (C,).
        rows: magnitudes of some of their rows (R, C).
        of: how many rows each of these stands for.
        steps: half of the codes of a weight.
        alone: whether each row has a scale of its own.
    """

    square: Tensor
    rows: Tensor
    of: float
    steps: float
    alone: bool

    @classmethod
    def read(cls, backend: Backend, names: Sequence[str]) -> ReadWeights:
        """Of weight sites whose float weights are known."""
        whole, site = torch.cat([backend.float_weights[name] for name in names]), backend.sites[names[0]]
        some = spread(len(whole), _ROWS)
        steps, alone = (site.qmax - site.qmin) / 2, site.axis == 0
        return cls(whole.square().sum(0), whole[some].abs(), len(whole) / len(some), steps, alone)

    def divided(self, factors: Tensor) -> ReadWeights:
        """Their columns divided by factors (C,)."""
        return replace(self, square=self.square / factors.square(), rows=self.rows / factors)

    def cost(self, square: Tensor, factors: Tensor) -> float:
        """What rounding them costs, divided by factors (C,), where they are multiplied by values of mean squares
        (C,)."""
        rows = self.rows / factors
        steps = (rows.amax(1) if self.alone else rows.amax().expand(len(rows))) / self.steps
        return _CHOSEN * self.of / 12 * float(steps.square().sum() * (square * factors.square()).sum())


def input_exponents(values: Tensor, weights: ReadWeights, codes: int) -> Tensor | None:
    """By which powers of two channels should be multiplied, for what is left of the roundings to be least.

    Args:
        values: some of them (N, C), on one scale.
        weights: that read them.
        codes: steps between the ends of the scale.

    Returns:
        Exponents (C,); None where none are worth it.
    """
    found = torch.zeros_like(values[0])
    while True:
        factors = torch.exp2(found)
        further = _further(values * factors, weights.divided(factors), codes)
        if further is None:
            return found if bool(found.any()) else None
        found += further


def _further(values: Tensor, weights: ReadWeights, codes: int) -> Tensor | None:
    """The best of those that are tried around what is given, where it is worth it."""
    square, none = values.square().mean(0), torch.zeros_like(values[0])

    def cost(exponents: Tensor) -> float:
        factors = torch.exp2(exponents)
        counts = weights.square / factors.square()
        return _rounded(values * factors, counts, codes) + weights.cost(square, factors)

    best = min(_tried(values, weights), key=cost)
    return best if bool(best.any()) and cost(best) < _WORTH * cost(none) else None


def _rounded(values: Tensor, counts: Tensor, codes: int) -> float:
    """What rounding values (N, C) costs, where a squared error of a channel counts so much."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    found = []
    for clipped in _CLIPPED + (_CLIPPED_FURTHER if codes < _FEW_CODES else ()):
        scale = max(clipped * (high - low) / codes, torch.finfo(values.dtype).tiny)
        first = max(-codes, round(clipped * low / scale))
        made = (values / scale).round_().clamp_(first, first + codes).mul_(scale)
        found.append(float(made.sub_(values).square_().mean(0) @ counts))
    return min(found)


def _tried(values: Tensor, weights: ReadWeights) -> Iterator[Tensor]:
    """Exponents (C,), around 0, each once."""
    sizes = [values.abs().amax(0), values.square().mean(0).sqrt()]
    columns = [weights.rows.amax(0), weights.square.sqrt()]
    seen = set[bytes]()
    for size, column, of_size, of_column in product(_logs(sizes), _logs(columns), _POWERS, _POWERS):
        exponents = of_column * column - of_size * size
        exponents = (exponents - exponents.median()).round().clamp(-_FURTHEST, _FURTHEST)
        if (key := exponents.numpy().tobytes()) not in seen:
            seen.add(key)
            yield exponents


def _logs(sizes: Sequence[Tensor]) -> list[Tensor]:
    """Powers of two; of channels that have nothing, that of the others' median."""
    found = []
    for size in sizes:
        log = torch.log2(size)
        known = torch.isfinite(log)
        usual = log[known].median() if bool(known.any()) else torch.zeros(())
        found.append(torch.where(known, log, usual))
    return found
