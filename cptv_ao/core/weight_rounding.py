"""From a float weight to its codes: the one formula, and the shift that rounds to other codes than the nearest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cptv_ao.core.qparams import SHIFT_PARTS, QParams
from cptv_ao.core.sites import ScaleSite

# Half a step, plus what float32 rounding of w / s can add.
HALF_STEP = 0.5 + 2e-3


def round_weight(weight: Tensor, qparams: QParams, site: ScaleSite) -> Tensor:
    """Codes of a float weight at a scale: shifted, rounded half to even, clamped to the nominal range; int8, weight's
    shape."""
    scale, zero_point = _along_axis(qparams, site, weight.dim())
    steps = weight / scale
    if (shift := qparams.shift_steps) is not None:
        steps += shift
    codes = torch.round(steps) + zero_point
    return codes.clamp_(site.qmin, site.qmax).to(torch.int8)


def count_shifted(weight: Tensor, qparams: QParams, site: ScaleSite) -> int:
    """How many codes of a float weight are not the nearest."""
    if qparams.shift is None:
        return 0
    nearest = round_weight(weight, replace(qparams, shift=None), site)
    return int((round_weight(weight, qparams, site) != nearest).sum())


def shift_of(weight: Tensor, codes: Tensor, qparams: QParams, site: ScaleSite) -> Tensor | None:
    """The least shift that rounds a float weight to codes that are at most a step away from it, or None where these
    are the nearest ones (ties may go either way). Codes that are clipped count as what they are clipped from."""
    scale, zero_point = _along_axis(qparams, site, weight.dim())
    steps = weight / scale + zero_point
    missing = codes.clamp(site.qmin, site.qmax) - steps.clamp(site.qmin, site.qmax)
    if not bool((missing.abs() > HALF_STEP).any()):
        return None
    beyond = (missing.abs() - 0.5).clamp_min_(0.0)
    parts = torch.ceil(beyond * SHIFT_PARTS + (beyond > 0)).mul_(missing.sign())
    return parts.clamp_(-SHIFT_PARTS // 2, SHIFT_PARTS // 2).to(torch.int8)


def _along_axis(qparams: QParams, site: ScaleSite, dims: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero_point in a shape that meets a weight of so many dimensions."""
    shape = [1] * dims
    if site.axis is not None:
        shape[site.axis] = -1
    return qparams.scale.to(torch.float32).reshape(shape), qparams.zero_point.reshape(shape)
