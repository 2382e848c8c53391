"""What any scale and zero_point of an activation would cost the outputs, from one pass over its values.

A value x that becomes q(x) changes a number of the outputs by g (q(x) - x), where g is its gradient. Gradients are
summed in bins of x, 16 to each power of two; what error a bin has at a scale is known without the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite

# A bin is what float32 numbers hold that differ in their last bits alone: 2 to this power for each power of two.
_BITS = 4
_SHIFT = 23 - _BITS
# In powers of two present steps: what is smaller than the first is one bin, what is larger than the second another.
_LEAST, _MOST = -6, 20
_FIRST = (127 + _LEAST) << _BITS
_BINS = ((_MOST - _LEAST) << _BITS) + 1
# First bits of a float32 number: sign, exponent, and the first of the fraction. Of all of them, the bins: those of
# positive numbers, then those of negative ones.
_HEADS = 1 << (32 - _SHIFT)
_BIN_OF = (torch.arange(_HEADS // 2) - _FIRST).clamp(0, _BINS - 1)
_BIN_OF = torch.cat([_BIN_OF, _BIN_OF + _BINS])
# Points of a bin whose errors stand for all of it.
_POINTS = 4
# Ends of a range that are tried: shares of the largest value, then, so often, multiples of what was best.
_SHARES = torch.cat([torch.logspace(0, -1.7, 28), torch.zeros(1)])
_MULTIPLES, _ROUNDS = torch.logspace(0.12, -0.12, 13), 2
_LEAST_SCALE = 1e-6


@dataclass(eq=False)
class ErrorHistogram:
    """Of the values of one site, or of several on one scale.

    Attributes:
        pulls: of each direction that was followed, the sum of the values' gradients in each bin.
        squares: of all directions, the sum of the gradients' squares in each bin.
    """

    pulls: list[Tensor] = field(default_factory=list)
    squares: Tensor = field(default_factory=lambda: torch.zeros(2 * _BINS, dtype=torch.float32))

    def begin(self) -> None:
        """What is added from now on belongs to another direction."""
        self.pulls.append(torch.zeros_like(self.squares))

    def add(self, steps: Tensor, gradient: Tensor) -> None:
        """Values in steps of the present scale, centred at 0, and their gradients, of one shape."""
        heads = (steps.float().contiguous().view(torch.int32) >> _SHIFT).bitwise_and_(_HEADS - 1).flatten()
        weight = gradient.float().flatten().nan_to_num(0.0, 0.0, 0.0)
        for sums, each in ((self.pulls[-1], weight), (self.squares, weight * weight)):
            sums.index_add_(0, _BIN_OF, torch.bincount(heads, each, minlength=_HEADS).to(sums))

    def least_error(self, site: ScaleSite, now: QParams) -> QParams:
        """The scale and zero_point of least error; those that there are where no others are better.

        Args:
            site: with the range of its codes. One that is not `affine` keeps its zero_point.
            now: the scale in whose steps the values are.
        """
        used = self.squares > 0
        if not bool(used.any()):
            return now
        cost = _Cost(torch.stack(self.pulls)[:, used], self.squares[used], _points()[used], site)
        start = _Found(cost, torch.ones_like(cost.squares[:1]), now.zero_point.float().reshape(1))
        best = _best_range(start) if site.affine else _best_scale(start)
        if best is start:
            return now
        scale = now.scale * best.scale.double().reshape(now.scale.shape)
        return QParams(scale.float().double(), best.zero_point.long().reshape(now.zero_point.shape))


def _points() -> Tensor:
    """Of each bin some of its values, evenly spread (2 * _BINS, _POINTS)."""
    edges = ((torch.arange(_BINS + 1) + _FIRST) << _SHIFT).to(torch.int32).view(torch.float32)
    edges[0] = 0.0
    shares = (torch.arange(_POINTS, dtype=torch.float32) + 0.5) / _POINTS
    points = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * shares
    return torch.cat([points, -points])


@dataclass(frozen=True)
class _Cost:
    """Of scales, in present steps, and zero_points (K,): (K,).

    What the errors of all values in a bin have in common costs half what they do together, as far as the directions
    say, and half what they would do if they had nothing to do with one another: the first alone fits the few
    directions, the second does not see values that are clipped together.
    """

    pulls: Tensor
    squares: Tensor
    points: Tensor
    site: ScaleSite

    def __call__(self, scales: Tensor, zero_points: Tensor) -> Tensor:
        scale, zero = scales[:, None, None], zero_points[:, None, None]
        codes = (self.points / scale).round_().add_(zero).clamp_(self.site.qmin, self.site.qmax)
        errors = codes.sub_(zero).mul_(scale).sub_(self.points)
        common = errors.mean(2)
        rest = errors.sub_(common[:, :, None]).square_().mean(2)
        together = (common @ self.pulls.T).square().sum(1)
        return (together + common.square() @ self.squares) / 2 + rest @ self.squares


class _Found:
    """A scale and a zero_point (1,), and what they cost."""

    def __init__(self, cost: _Cost, scale: Tensor, zero_point: Tensor) -> None:
        self.cost, self.scale, self.zero_point = cost, scale, zero_point
        self._least = cost(scale, zero_point)

    @property
    def low(self) -> Tensor:
        """The end of the range, in present steps (1,)."""
        return (self.cost.site.qmin - self.zero_point) * self.scale

    @property
    def high(self) -> Tensor:
        """The other."""
        return (self.cost.site.qmax - self.zero_point) * self.scale

    def or_scale(self, scales: Tensor) -> _Found:
        """The best of these (K,) and itself."""
        return self._or(scales, self.zero_point.expand(len(scales)))

    def or_range(self, low: Tensor, high: Tensor) -> _Found:
        """The best of these (K,), or K of one end and the other (1,), and itself."""
        site = self.cost.site
        scales = ((high - low) / (site.qmax - site.qmin)).clamp_min(_LEAST_SCALE)
        return self._or(scales, (site.qmin - low / scales).round().clamp(site.qmin, site.qmax))

    def _or(self, scales: Tensor, zero_points: Tensor) -> _Found:
        least = self.cost(scales, zero_points).argmin(0, keepdim=True)
        other = _Found(self.cost, scales[least], zero_points[least])
        return other if bool(other._least < self._least) else self


def _best_scale(best: _Found) -> _Found:
    for multiples in (1 / _SHARES[:-1], _SHARES[:-1], _MULTIPLES):
        best = best.or_scale(best.scale * multiples)
    return best


def _best_range(best: _Found) -> _Found:
    """Both ends together, then one after the other."""
    points = best.cost.points
    lows, highs = points.amin().clamp_max(0.0) * _SHARES, points.amax().clamp_min(0.0) * _SHARES
    best = best.or_range(lows, highs)
    best = best.or_range(lows, best.high)
    best = best.or_range(best.low, highs)
    for _ in range(_ROUNDS):
        best = best.or_range(best.low * _MULTIPLES, best.high)
        best = best.or_range(best.low, best.high * _MULTIPLES)
    return best
