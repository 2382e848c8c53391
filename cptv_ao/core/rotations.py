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
# with what makes the matrix orthogonal again, and at the end so many times in float64.
_CAP, _ROUNDS, _LAST_STEPS = 1.2, 40, 4


@cache
def rotation(width: int) -> Tensor:
    """An orthogonal matrix (width, width), float64, that gives a vector of ones back and spreads each channel over all.

    Always the same one, but for how a machine rounds in float32; it is not to be written.
    """
    generator = torch.Generator().manual_seed(width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q.float()
    most = _CAP / math.sqrt(width)
    for _ in range(_ROUNDS):
        turn = _orthogonal(_fixing_ones(turn.clamp(-most, most)))
    turn = _fixing_ones(turn.double())
    for _ in range(_LAST_STEPS):
        turn = _orthogonal(turn)
    return turn


def _fixing_ones(turn: Tensor) -> Tensor:
    """A matrix (N, N) that gives a vector of ones back, and does to all that is at right angles to it what it did."""
    mean = turn.mean(0) + turn.mean(1)[:, None] - turn.mean()
    return turn - mean + 1 / len(turn)


def _orthogonal(near: Tensor) -> Tensor:
    """Nearer to the orthogonal matrix that is nearest to one (N, N) with singular values below sqrt(3) (Newton and
    Schulz)."""
    return 1.5 * near - 0.5 * near @ (near.T @ near)


def peak_ratio(values: Iterable[Tensor], turn: Tensor) -> float:
    """How many times larger the largest of values (..., width) is than that of the rotated ones, in the geometric mean.

    Args:
        values: those of another width are left out.
        turn: the rotation.
    """
    ratios = []
    for value in values:
        if not value.dim() or value.shape[-1] != len(turn):
            continue
        peak, turned = value.abs().max(), (value @ turn.T.to(value)).abs().max()
        ratios.append(math.log(float(peak) / float(turned)) if peak > 0 and turned > 0 else 0.0)
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
