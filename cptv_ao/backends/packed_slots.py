"""The slot of a weight that is packed, with a bias, into an object of torch's that a kernel is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.kernel_faults import is_right
from cptv_ao.backends.packed_params import PackedParams
from cptv_ao.backends.scale_slots import WeightSlot, quantized_weight
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite


class PackedWeightSlot(WeightSlot):
    """A weight and a bias inside a ScriptObject.

    `restore` puts the very object back that `state` saw, so it costs nothing and is exact.

    Args:
        params: where that is kept.
    """

    packs_bias = True

    def __init__(self, params: PackedParams) -> None:
        self._params = params
        self._tried: tuple[Any, bool] | None = None  # an object, and whether it `is_right`
        self._renewed: tuple[Any, Any] | None = None  # the object that `renew` made, and the one that it stands for
        self._unpacked: tuple[Any, Tensor, Tensor | None] | None = None  # an object, with its weight and its bias

    @property
    def pads(self) -> bool:  # type: ignore[override]
        """As of `WeightSlot`."""
        packed = self._params.get()
        return hasattr(packed, "padding") and any(packed.padding())

    def weight(self) -> Tensor:
        return self._parts()[0]

    def read(self) -> QParams:
        return _scales_of(self._parts()[0])

    def bias(self) -> Tensor | None:
        return self._parts()[1]

    def _parts(self) -> tuple[Tensor, Tensor | None]:
        """Unpacked once of each object, for nothing writes into one; where kernels have used it, that takes longer."""
        packed = self._params.get()
        if self._unpacked is None or self._unpacked[0] is not packed:
            self._unpacked = packed, *self._params.unpack()
        return self._unpacked[1:]

    def state(self) -> Any:
        packed = self._params.get()
        return self._renewed[1] if self._renewed is not None and packed is self._renewed[0] else packed

    def restore(self, state: Any) -> None:
        self._params.put(state)

    def write_weight(self, codes: Tensor, site: ScaleSite, qparams: QParams, bias: Tensor | None = None) -> None:
        self._params.pack(quantized_weight(codes, qparams, site.axis), self.bias() if bias is None else bias)

    @property
    def is_right(self) -> bool:  # type: ignore[override]
        """As of `WeightSlot`."""
        packed = self._params.get()
        if self._tried is None or self._tried[0] is not packed:
            self._tried = packed, is_right(packed)
        return self._tried[1]

    def renew(self) -> None:
        """Pack the same weight once more, for QNNPACK forgets nothing (torch 2.13 to 2.15); `state` is as before.

        It works out its multipliers from the scales of input and output when an object is first used, and again when
        the input's scale is another, never when the output's is. And it fills its buffer of padding when an object is
        first used (or with more images than before) with the zero_point that its input has then.
        """
        kept = self.state()
        self._params.pack(*self._params.unpack())
        self._renewed = self._params.get(), kept


def _scales_of(weight: Tensor) -> QParams:
    """Of a quantized tensor; copies."""
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return QParams(torch.tensor(weight.q_scale(), dtype=torch.float64), torch.tensor(weight.q_zero_point()))
    # An unpacked tensor shares its scales with the packed object.
    scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return QParams(scales.to(torch.float64, copy=True), zero_points.to(torch.int64, copy=True))
