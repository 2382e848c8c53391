"""From a float weight to its codes: the one formula, and the shift that rounds to other codes than the nearest.

    code = clamp(round(weight / scale + shift) + zero_point, qmin, qmax), rounded half to even

Whatever puts a weight on a scale, or asks how far it is from one, does so with the functions of this room; what differs
is the dtype that it computes in, which is that of what they are given.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cptv_ao.core.qparams import SHIFT_PARTS, QParams
from cptv_ao.core.sites import ScaleSite

# Half a step, plus what float32 rounding of w / s can add.
HALF_STEP = 0.5 + 2e-3
# How near a tie the steps of a weight are one, for float32 rounding of w / s decides there: a share of the steps.
_TIE = 8 * torch.finfo(torch.float32).eps


def along_axis(values: Tensor, axis: int | None, dims: int) -> Tensor:
    """What each channel of a weight has (C,), or all of it (), in a shape that meets its so many dimensions."""
    return values.reshape([-1 if d == axis else 1 for d in range(dims)])


def weight_steps(weight: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """How many steps of its scale, () or (C,) along an axis, a weight is; not rounded."""
    return weight / along_axis(scale, axis, weight.dim())


def nearest_codes(steps: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The codes that are nearest to so many steps, as floats; `zero_point` in a shape that meets theirs."""
    return (torch.round(steps) + zero_point).clamp_(qmin, qmax)


def round_weight(weight: Tensor, qparams: QParams, site: ScaleSite) -> Tensor:
    """Codes of a float weight at a scale: shifted, rounded half to even, clamped to the nominal range; int8, or uint8
    where these end above 127; weight's shape."""
    steps = weight_steps(weight, qparams.scale.to(torch.float32), site.axis)
    if (shift := qparams.shift_steps) is not None:
        steps += shift
    zero_point = along_axis(qparams.zero_point, site.axis, weight.dim())
    return nearest_codes(steps, zero_point, site.qmin, site.qmax).to(torch.int8 if site.qmax <= 127 else torch.uint8)


def round_by_reciprocal(weight: Tensor, qparams: QParams, axis: int | None, limits: tuple[int, int]) -> Tensor:
    """Codes as the quantize nodes of PT2E graphs make them, as floats: these multiply with 1 / scale, which rounds ties
    to another code here and there than a division does."""
    dims = weight.dim()
    steps = weight * along_axis(1 / qparams.scale.float(), axis, dims)
    return nearest_codes(steps, along_axis(qparams.zero_point, axis, dims), *limits)


def rounding_to(
    weight: Tensor, rounded: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> Tensor:
    """A float weight that is rounded to these codes: itself where it is (`rounded`), the values of codes elsewhere."""
    scale, zero_point = (along_axis(part, axis, weight.dim()) for part in (scale, zero_point))
    values = (codes.to(weight.dtype) - zero_point) * scale
    return torch.where(rounded == codes, weight, values.to(weight.dtype))


def count_shifted(weight: Tensor, qparams: QParams, site: ScaleSite) -> int:
    """How many codes of a float weight are not the nearest."""
    if qparams.shift is None:
        return 0
    nearest = round_weight(weight, replace(qparams, shift=None), site)
    return int((round_weight(weight, qparams, site) != nearest).sum())


def shift_of(weight: Tensor, codes: Tensor, qparams: QParams, site: ScaleSite) -> Tensor | None:
    """The least shift that rounds a float weight to codes that are at most a step away from it, or None where these
    are the nearest ones (ties may go either way). Codes that are clipped count as what they are clipped from."""
    zero_point = along_axis(qparams.zero_point, site.axis, weight.dim())
    steps = weight_steps(weight, qparams.scale.to(torch.float32), site.axis)
    missing = (steps + zero_point).clamp_(site.qmin, site.qmax).neg_().add_(codes.clamp(site.qmin, site.qmax))
    beyond = missing.abs().sub_(0.5)
    wrong = beyond > steps.abs_().clamp_min_(1.0).mul_(_TIE)
    if not bool(wrong.any()):
        return None
    parts = beyond.mul_(SHIFT_PARTS).add_(1).ceil_().mul_(missing.sign_().mul_(wrong))
    return parts.clamp_(-SHIFT_PARTS // 2, SHIFT_PARTS // 2).to(torch.int8)
