"""By how much channels are scaled between layers: of a few families of factors those that leave least of the roundings,
as far as these are predicted.

Rounding a value takes from all that is multiplied by it; rounding a weight, from all that it is multiplied by. A factor
s of a channel makes the one smaller beside that channel, by 1 / s, and the other larger, by s, and moves the ends that
all channels share. The families are products of powers of the channels' ranges (alone: range equalization, arXiv
1906.04721, section 4.1, where weights have scales per channel) and of the weights that read them (square roots of both:
SmoothQuant, arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cptv_ao.transforms.channel_ranges import ChannelRange

# Powers of the ranges of values and of columns of weights that factors are made of.
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What is predicted to be left of the roundings, at most, for it to be worth it.
_WORTH = 0.75


@dataclass(frozen=True)
class ReaderColumns:
    """What a reader makes of the channels of what it reads.

    Attributes:
        channel: of each column of each row (O, K).
        square: of its weights (O, K), summed over a kernel.
        largest: of them (O, K).
        kernel: weights that a column has.
        values: mean squares of what each column is multiplied by (O, K).
        steps: half of the codes of a row.
        alone: whether each row has a scale of its own.
    """

    channel: Tensor
    square: Tensor
    largest: Tensor
    kernel: int
    values: Tensor
    steps: float
    alone: bool


def factor_exponents(
    ends: Sequence[ChannelRange], readers: Sequence[ReaderColumns], room: tuple[Tensor, Tensor], codes: int
) -> Tensor | None:
    """By which powers of two channels should be multiplied, for what is left of the roundings to be least.

    Args:
        ends: of the values that are put on one scale each.
        readers: of the weights that are multiplied by them.
        room: the least and the greatest exponent, () or (C,) each.
        codes: steps between the ends of an activation.

    Returns:
        Exponents (C,); None where none are worth it.
    """
    peaks = torch.stack([torch.maximum(-one.low, one.high) for one in ends]).amax(0)
    weighed = torch.stack([_largest(reader, len(peaks)) for reader in readers]).amax(0)
    of_values, of_weights = (_beside_largest(part) for part in (peaks, weighed))
    none = torch.zeros_like(peaks)
    tried = [
        (by_weights * of_weights - by_values * of_values).round().clamp(*room)
        for by_values, by_weights in product(_POWERS, _POWERS)
    ]
    best = min(tried, key=lambda exponents: _noise(ends, readers, torch.exp2(exponents), codes))
    left, given = (_noise(ends, readers, torch.exp2(exponents), codes) for exponents in (best, none))
    return best if left < _WORTH * given else None


def _beside_largest(part: Tensor) -> Tensor:
    """Powers of two; of channels that have nothing, none."""
    return torch.where(part > 0, torch.log2(part / part.max()), 0.0)


def _largest(reader: ReaderColumns, channels: int) -> Tensor:
    """Largest weight of each channel (C,), beside the largest of all."""
    found = reader.largest.new_zeros(channels).scatter_reduce(
        0, reader.channel.flatten(), reader.largest.flatten(), "amax"
    )
    return found / found.max().clamp_min(torch.finfo(found.dtype).tiny)


def _noise(ends: Sequence[ChannelRange], readers: Sequence[ReaderColumns], factors: Tensor, codes: int) -> float:
    """Mean square of what roundings do to the products of the readers, beside that of these."""
    spans = [float((one.high * factors).max().clamp_min(0) - (one.low * factors).min().clamp_max(0)) for one in ends]
    values, found = sum((span / codes) ** 2 for span in spans) / 12, 0.0
    for reader in readers:
        factor = factors[reader.channel]
        of_values = values * (reader.square / factor**2).sum()
        peaks = reader.largest / factor
        steps = (peaks.amax(1, keepdim=True) if reader.alone else peaks.amax()) / reader.steps
        of_weights = (steps**2 / 12 * reader.kernel * reader.values * factor**2).sum()
        found += float((of_values + of_weights) / (reader.square * reader.values).sum().clamp_min(1e-30))
    return found
