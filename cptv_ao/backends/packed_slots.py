"""The slots of weights that are packed, with a bias, into an object of torch's that a kernel is given."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptv_ao.backends.kernel_faults import is_right
from cptv_ao.backends.scale_slots import WeightSlot, quantized_weight
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite


class PackedWeightSlot(WeightSlot):
    """A weight and a bias inside a ScriptObject; subclasses say where that is kept.

    `restore` puts the very object back that `state` saw, so it costs nothing and is exact.
    """

    packs_bias = True
    _tried: tuple[Any, bool] | None = None  # an object, and whether it `is_right`
    _renewed: tuple[Any, Any] | None = None  # the object that `renew` made, and the one that it stands for
    _unpacked: tuple[Any, QParams, Tensor | None] | None = None  # an object, with its scales and its bias

    @abstractmethod
    def _packed(self) -> Any: ...

    @abstractmethod
    def _put(self, packed: Any) -> None: ...

    @abstractmethod
    def _unpack(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the object; copies all of the weight."""

    @abstractmethod
    def _pack(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make an object of these, and put it there."""

    @property
    def pads(self) -> bool:  # type: ignore[override]
        """As of `WeightSlot`."""
        packed = self._packed()
        return hasattr(packed, "padding") and any(packed.padding())

    def weight(self) -> Tensor:
        return self._unpack()[0]

    def read(self) -> QParams:
        qparams = self._beside_codes()[0]
        return QParams(qparams.scale.clone(), qparams.zero_point.clone())

    def bias(self) -> Tensor | None:
        return self._beside_codes()[1]

    def _beside_codes(self) -> tuple[QParams, Tensor | None]:
        """The scales and the bias, unpacked once of each object, for nothing writes into one."""
        packed = self._packed()
        if self._unpacked is None or self._unpacked[0] is not packed:
            weight, bias = self._unpack()
            self._unpacked = packed, _scales_of(weight), bias
        return self._unpacked[1:]

    def state(self) -> Any:
        packed = self._packed()
        return self._renewed[1] if self._renewed is not None and packed is self._renewed[0] else packed

    def restore(self, state: Any) -> None:
        self._put(state)

    def write_weight(self, codes: Tensor, site: ScaleSite, qparams: QParams, bias: Tensor | None = None) -> None:
        self._pack(quantized_weight(codes, qparams, site.axis), self.bias() if bias is None else bias)

    @property
    def is_right(self) -> bool:  # type: ignore[override]
        """As of `WeightSlot`."""
        packed = self._packed()
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
        self._pack(*self._unpack())
        self._renewed = self._packed(), kept


class ModuleWeightSlot(PackedWeightSlot):
    """The packed weight of an `nnq` Linear or Conv module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = cast(Any, module)
        # Linear keeps the packed object one module deeper than Conv does.
        inner = module._modules.get("_packed_params")
        self._owner: Any = module if inner is None else inner

    def _packed(self) -> Any:
        return self._owner._packed_params

    def _put(self, packed: Any) -> None:
        self._owner._packed_params = packed

    def _unpack(self) -> tuple[Tensor, Tensor | None]:
        return cast("tuple[Tensor, Tensor | None]", self._module._weight_bias())

    def _pack(self, weight: Tensor, bias: Tensor | None) -> None:
        self._module.set_weight_bias(weight, bias)


class FunctionalWeightSlot(PackedWeightSlot):
    """A packed weight on the root (`_packed_weight_0`), used by functional linear and conv."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self._owner, self._attribute = owner, attribute

    def _packed(self) -> Any:
        return getattr(self._owner, self._attribute)

    def _put(self, packed: Any) -> None:
        setattr(self._owner, self._attribute, packed)

    def _unpack(self) -> tuple[Tensor, Tensor | None]:
        return cast("tuple[Tensor, Tensor | None]", self._packed().unpack())

    def _pack(self, weight: Tensor, bias: Tensor | None) -> None:
        packed = self._packed()
        ops = torch.ops.quantized
        if hasattr(packed, "stride"):
            settings = [packed.stride(), packed.padding(), packed.dilation(), packed.groups()]
            prepack = {3: ops.conv1d_prepack, 4: ops.conv2d_prepack, 5: ops.conv3d_prepack}[weight.dim()]
            if packed.transpose():
                prepack = {4: ops.conv_transpose2d_prepack, 5: ops.conv_transpose3d_prepack}[weight.dim()]
                settings.insert(2, packed.output_padding())
            new = prepack(weight, bias, *settings)
        else:
            new = ops.linear_prepack(weight, bias)
        setattr(self._owner, self._attribute, new)


def _scales_of(weight: Tensor) -> QParams:
    """Of a quantized tensor; copies."""
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return QParams(torch.tensor(weight.q_scale(), dtype=torch.float64), torch.tensor(weight.q_zero_point()))
    # An unpacked tensor shares its scales with the packed object.
    scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return QParams(scales.to(torch.float64, copy=True), zero_points.to(torch.int64, copy=True))
