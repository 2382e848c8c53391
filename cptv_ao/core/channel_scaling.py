"""By how much channels are scaled when a norm is folded or outliers move: formulas that several rooms share."""

from __future__ import annotations

import torch
from torch import Tensor

# A gain of a batch norm that is smaller beside the largest, or beside its offset, is none: a tenth of a code at most.
_LEAST_GAIN = 1e-4


def fold_factors(var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """The factors of a batch norm, gamma / sqrt(var + eps) (C,); 0 where a channel hardly varies, beside the others or
    beside its own offset: such a scale would leave its bias no room in 32 bits."""
    factor = torch.rsqrt(var + eps)
    if gamma is None:
        return factor
    largest = gamma.abs().max() if beta is None else torch.maximum(gamma.abs().max(), beta.abs())
    return torch.where(gamma.abs() > _LEAST_GAIN * largest, gamma * factor, 0.0)


#: Less is not worth it, and could not be told from roundings.
LEAST_EXPONENT = 2


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
    return torch.where(exponents >= LEAST_EXPONENT, exponents, 0.0)


#: A channel is an outlier where its largest value is this many times that of the median channel.
OUTLIER = 4.0
