"""Rotations of channels that leave what a layer norm subtracts and divides by as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

#: By how many times the largest values of a residual stream must become smaller to be worth a rotation.
WORTH = 1.5
# A channel is spread the further the flatter a rotation is: entries are held to so many times 1 / sqrt(width), in turn
# with what makes the matrix orthogonal again.
_CAP, _ROUNDS, _STEPS, _LAST_STEPS = 1.2, 40, 1, 12


@cache
def rotation(width: int) -> Tensor:
    """An orthogonal matrix (width, width), float64, that gives a vector of ones back and spreads each channel over all;
    always the same one, which is not to be written."""
    generator = torch.Generator().manual_seed(width)
    ones = torch.full((width, width), 1 / width, dtype=torch.float64)
    others = torch.eye(width, dtype=torch.float64) - ones
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    for _ in range(_ROUNDS):
        turn = ones + others @ turn.clamp(-_CAP / math.sqrt(width), _CAP / math.sqrt(width)) @ others
        turn = _orthogonal(turn, _STEPS)
    return _orthogonal(turn, _LAST_STEPS)


def _orthogonal(near: Tensor, steps: int) -> Tensor:
    """The orthogonal matrix nearest to one (N, N) whose singular values are below sqrt(3) (Newton and Schulz)."""
    for _ in range(steps):
        near = 1.5 * near - 0.5 * near @ (near.T @ near)
    return near


def peak_ratio(values: Iterable[Tensor], turn: Tensor) -> float:
    """How many times larger the largest of values (..., width) is than that of the rotated ones, in the geometric mean.

    Args:
        turn: the rotation.
    """
    ratios = []
    for value in values:
        peak, turned = value.abs().max(), (value @ turn.T.to(value)).abs().max()
        ratios.append(math.log(float(peak) / float(turned)) if peak > 0 and turned > 0 else 0.0)
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
