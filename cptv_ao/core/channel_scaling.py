"""By how much channels are scaled when a norm is folded or outliers move: formulas that several rooms share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A gain of a batch norm that is smaller beside the largest, or beside its offset, is none: a tenth of a code at most.
_LEAST_GAIN = 1e-4
# In which powers of rows and of columns are told apart.
_ROUNDS = 8


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


def scaled_by_powers(weight: Tensor, made: Tensor) -> Tensor:
    """A float weight (O, K, ...), rows and columns times the powers of two that bring it near to what was made of it.

    Args:
        made: dequantized codes, of the same shape.

    Returns:
        The scaled weight; as it is where all factors are the same.
    """
    rows, others = (part.flatten(2) if part.dim() > 2 else part.unsqueeze(2) for part in (weight, made))
    shared, counts = (rows * others).sum(2), rows.square().sum(2)
    known = (shared > 0) & (counts > 0)
    powers = torch.where(known, torch.log2(shared / counts), 0.0).nan_to_num(0.0)
    trust = torch.where(known, shared, 0.0)
    of_rows, of_columns = torch.zeros(len(powers)), torch.zeros(powers.shape[1])
    for _ in range(_ROUNDS):
        of_columns = _mean(powers - of_rows[:, None], trust, 0)
        of_rows = _mean(powers - of_columns, trust, 1)
    turns = torch.exp(2j * math.pi * of_rows).mean()  # what both share is a whole number only together
    part = float(turns.angle()) / (2 * math.pi)
    exponents = (of_rows - part).round()[:, None] + (of_columns + part).round()
    exponents = _nearest(rows, others, exponents)
    if bool((exponents == exponents[0, 0]).all()):  # another weight: channels are scaled to differ less
        return weight
    return weight * torch.exp2(exponents).reshape(*exponents.shape, *[1] * (weight.dim() - 2))


def _nearest(weight: Tensor, made: Tensor, exponents: Tensor) -> Tensor:
    """Exponents (O, K) of a weight (O, K, n), those of rows, columns and rows again one more or less where that is
    nearer to what was made, at the value that is farthest: of few codes rounding alone may look like a factor."""
    code = made.abs().masked_fill(made == 0, torch.inf).amin((1, 2))  # of each row about one, as rows have steps
    unit = torch.where(code.isfinite(), code, 1.0).reshape(-1, 1, 1)
    choices = torch.tensor([0.0, -1.0, 1.0])
    for across in (1, 0, 1):
        scaled = (weight * torch.exp2(exponents + choice).unsqueeze(2) for choice in choices)
        apart = [((one - made) / unit).abs().amax((across, 2)) for one in scaled]
        exponents = exponents + choices[torch.stack(apart).argmin(0)].unsqueeze(across)
    return exponents


def _mean(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    return (values * weights).sum(dim) / weights.sum(dim).clamp_min(torch.finfo(values.dtype).tiny)
