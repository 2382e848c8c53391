"""What all layers of the twin with a weight on a scale have: what the rounding of the weight does to their output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cptv_ao.core.weight_rounding import along_axis, nearest_codes, weight_steps
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.products import Product
from cptv_ao.simulation.quantizers import WeightQuantizer


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

        def error(scale: Tensor) -> Tensor:
            apart = torch.stack(_error_at(scale, weight).flatten(1).chunk(len(rows)))
            squares = (apart @ rows.mT).square_() if gram is None else (apart @ gram).mul_(apart)
            return squares.sum(2).flatten()

        return error

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


def _error_at(scale: Tensor, weight: WeightQuantizer) -> Tensor:
    """How far the float weight, rounded at a scale, is from itself (C, ...)."""
    assert weight.weight is not None
    site, dims = weight.site, weight.weight.dim()
    zero_point = along_axis(weight.zero_point, site.axis, dims)
    codes = nearest_codes(weight_steps(weight.weight, scale, site.axis), zero_point, site.qmin, site.qmax)
    return codes.sub_(zero_point).mul_(along_axis(scale, site.axis, dims)).sub_(weight.weight)
