"""What all layers of the twin with a weight on a scale have: what the rounding of the weight does to their output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cptv_ao.core.weight_rounding import along_axis, nearest_codes, weight_steps
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.products import Product
from cptv_ao.simulation.quantizers import WeightQuantizer

# Numbers of a weight whose errors are looked at together: of a large one a few channels after the others.
_AT_ONCE = 2**22


class WeightedLayer(OutOfPlace):
    """A linear or convolution."""

    def __init__(self, weight: WeightQuantizer, product: Product) -> None:
        super().__init__()
        self.weight, self._product = weight, product

    @property
    def channel_dim(self) -> int:
        """Where the channels of the input, and of the output, are."""
        return self._product.channel_dim

    def weight_error(self, value: Tensor, most: int) -> Callable[[Tensor], Tensor]:
        """Gives the squared error of the output per channel (C,) when a float input meets the weight rounded at a
        scale.

        Args:
            value: the input, of which so many rows at most are looked at.
        """
        rows, weight = self.rows(value, most), self.weight
        if rows is None:
            return lambda scale: self._product.error(value, _error_at(scale, weight))
        gram = rows.mT @ rows if rows.shape[1] > rows.shape[2] else None
        channels = len(weight.codes)
        each = channels if len(rows) > 1 else max(1, _AT_ONCE * channels // weight.codes.numel())

        def squares(scale: Tensor, first: int) -> Tensor:
            apart = torch.stack(_error_at(scale, weight, slice(first, first + each)).flatten(1).chunk(len(rows)))
            found = (apart @ rows.mT).square_() if gram is None else (apart @ gram).mul_(apart)
            return found.sum(2).flatten()

        return lambda scale: torch.cat([squares(scale, first) for first in range(0, channels, each)])

    def weight_shift(self, value: Tensor) -> Tensor | None:
        """What the rounding of the weight, as it is, adds to the output for a float input; None where the float weight
        is not known."""
        weight = self.weight
        if weight.weight is None:
            return None
        steps = along_axis(weight.scale, weight.site.axis, weight.codes.dim())
        return self._product.forward(value, weight.codes * steps - weight.weight)

    def rows(self, value: Tensor, most: int) -> Tensor | None:
        """What the rows of the weight, flattened to (C, K), are multiplied with for a float input, (groups, n, K); None
        where it has none."""
        return self._product.rows(value, self.weight.codes, most)


def _error_at(scale: Tensor, weight: WeightQuantizer, channels: slice = slice(None)) -> Tensor:
    """How far the float weight, rounded at a scale, is from itself (C, ...), of some of its channels."""
    assert weight.weight is not None
    site, value = weight.site, weight.weight[channels]
    scale, zero_point = (part[channels] if part.dim() else part for part in (scale, weight.zero_point))
    zero_point = along_axis(zero_point, site.axis, value.dim())
    codes = nearest_codes(weight_steps(value, scale, site.axis), zero_point, site.qmin, site.qmax)
    return codes.sub_(zero_point).mul_(along_axis(scale, site.axis, value.dim())).sub_(value)
