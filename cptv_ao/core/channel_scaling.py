"""By how much channels are scaled when a norm is folded or outliers move: formulas that several rooms share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cptv_ao.core.weight_rounding import HALF_STEP

# A gain of a batch norm that is smaller beside the largest, or beside its offset, is none: a tenth of a code at most.
_LEAST_GAIN = 1e-4
# In which powers of rows and of columns are told apart.
_ROUNDS = 8
# What a step beyond half of one counts beside values that are more than a whole step away, where no rounding leads.
_TIES = 1e-3


def fold_factors(var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """The factors of a batch norm, gamma / sqrt(var + eps) (C,); 0 where a channel hardly varies, beside the others or
    beside its own offset: such a scale would leave its bias no room in 32 bits."""
    factor = torch.rsqrt(var + eps)
    if gamma is None:
        return factor
    largest = gamma.abs().max() if beta is None else torch.maximum(gamma.abs().max(), beta.abs())
    return torch.where(gamma.abs() > _LEAST_GAIN * largest, gamma * factor, 0.0)


# Less is not worth it.
_LEAST_EXPONENT = 2


def outlier_exponents(peaks: Tensor, columns: Tensor) -> Tensor:
    """By which powers of two channels of outliers should be divided; 0 for the others.

    Powers of two, which no float is rounded by and which are found again in the weights.

    Args:
        peaks: largest magnitude of each channel behind a norm (C,).
        columns: largest magnitude of each column of the weights that read it (C,).
    """
    usual = peaks.median()
    wanted, most = torch.log2(peaks / usual).round(), torch.log2(columns.max() / columns).floor()
    outliers = (peaks > OUTLIER * usual) & torch.isfinite(peaks) & (usual > 0)
    exponents = torch.where(outliers, torch.minimum(wanted, most), 0.0)
    return torch.where(exponents >= _LEAST_EXPONENT, exponents, 0.0)


#: A channel is an outlier where its largest value is this many times that of the median channel.
OUTLIER = 4.0
#: More outliers than these are not a few: channels differ, and none of them stands out.
FEW_OUTLIERS = 8


def outlier_ratio(peaks: Tensor) -> tuple[float, int] | None:
    """The largest channel as a multiple of the median one, and how many are outliers; None where the median is 0.

    Args:
        peaks: largest magnitude of each channel (C,).
    """
    usual = peaks.median()
    if not usual:
        return None
    ratios = peaks / usual
    return float(ratios.max()), int((ratios > OUTLIER).sum())


def power_exponents(steps: Tensor, codes: Tensor) -> Tensor:
    """By which powers of two rows and columns of a float weight were scaled before its codes were made (O, K, 1, ...).

    Args:
        steps: the weight in steps of the scale that it was quantized with (O, K, ...).
        codes: integers as floats, less the zero point, of the same shape; those at the ends of a row may be clipped.

    Returns:
        Exponents, of the shape of the weight with ones for all dimensions but two; 0 where all are the same.
    """
    rows, others = (part.flatten(2) if part.dim() > 2 else part.unsqueeze(2) for part in (steps, codes))
    exponents = _estimated(rows, others)
    exponents = _corrected(rows, others, exponents)
    if bool((exponents == exponents[0, 0]).all()):  # another weight: channels are scaled to differ less
        exponents = torch.zeros_like(exponents)
    return exponents.reshape(*exponents.shape, *[1] * (steps.dim() - 2))


def _estimated(steps: Tensor, codes: Tensor) -> Tensor:
    """Exponents (O, K) of rows and columns that fit the ratio of codes to steps (O, K, n) on average."""
    shared, counts = (steps * codes).sum(2), steps.square().sum(2)
    known = (shared > 0) & (counts > 0)
    powers = torch.where(known, torch.log2(shared / counts), 0.0).nan_to_num(0.0)
    trust = torch.where(known, shared, 0.0)
    of_rows, of_columns = torch.zeros_like(powers[:, 0]), torch.zeros_like(powers[0])
    for _ in range(_ROUNDS):
        of_columns = _mean(powers - of_rows[:, None], trust, 0)
        of_rows = _mean(powers - of_columns, trust, 1)
    turns = torch.exp(2j * math.pi * of_rows).mean()  # what both share is a whole number only together
    part = float(turns.angle()) / (2 * math.pi)
    return (of_rows - part).round()[:, None] + (of_columns + part).round()


def _corrected(steps: Tensor, codes: Tensor, exponents: Tensor) -> Tensor:
    """Exponents (O, K), those of columns and rows one more or less for as long as fewer of their values are on another
    scale than their codes (O, K, n): of few codes, or clipped ones, the ratio alone may look like a factor."""
    highest, lowest = (end(dim=(1, 2), keepdim=True) for end in (codes.amax, codes.amin))
    at_end = (codes != 0) & (codes == torch.where(codes > 0, highest, lowest))  # may stand for anything beyond
    choices = torch.tensor([0.0, -1.0, 1.0])
    for _ in range(_ROUNDS):
        before = exponents
        for across in (0, 1):
            wrong = []
            for choice in choices:
                scaled = steps * torch.exp2(exponents + choice).unsqueeze(2)
                off = (scaled - codes).abs().masked_fill_(at_end & (scaled.abs() > codes.abs()), 0.0)
                ties = _TIES * (off - HALF_STEP).clamp_(0.0, 1.0)
                wrong.append(((off > 2 * HALF_STEP) + ties).sum((across, 2)))
            exponents = exponents + choices[torch.stack(wrong).argmin(0)].unsqueeze(across)
        if torch.equal(before, exponents):
            break
    return exponents


def _mean(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    return (values * weights).sum(dim) / weights.sum(dim).clamp_min(torch.finfo(values.dtype).tiny)
