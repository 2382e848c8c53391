"""The places inside a lowered model that hold a scale. Each knows how to read, write and restore one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cptv_ao.backends.tensor_slots import Slot
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable


class ActivationHome(Protocol):
    """Holds the scale and zero_point of an activation, per tensor.

    Attributes:
        slots: whose tensors it writes.
    """

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    def read(self) -> QParams: ...
    def write(self, qparams: QParams) -> None: ...
    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


class BufferHome:
    """A scale and zero_point as buffers, of the root (`quantize_per_tensor`, `quantized.add`) or of a module
    (`nnq.LayerNorm`); of a PT2E graph also those of the channels of a weight.

    They are written in place, for a search holds on to them: see `cptv_ao.backends.tensor_slots` for whose they are.
    """

    def __init__(self, scale: Slot, zero_point: Slot, shape: Sequence[int] = ()) -> None:
        self.slots, self._shape = (scale, zero_point), tuple(shape)

    def read(self) -> QParams:
        scale, zero_point = (slot.tensor.detach().reshape(self._shape) for slot in self.slots)
        return QParams(scale.to("cpu", torch.float64, copy=True), zero_point.to("cpu", torch.int64, copy=True))

    def write(self, qparams: QParams) -> None:
        self.restore((qparams.scale, qparams.zero_point))

    def state(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = (slot.copied() for slot in self.slots)
        return scale, zero_point

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            for slot, value in zip(self.slots, state, strict=True):
                slot.tensor.copy_(value.reshape(slot.tensor.shape))


class AttributeHome:
    """A python float and int on a module (`nnq.Linear.scale`): only float32 values survive a state_dict."""

    slots: tuple[Slot, ...] = ()

    def __init__(self, module: nn.Module) -> None:
        self._module = cast(Any, module)

    def read(self) -> QParams:
        return QParams(
            torch.tensor(float(self._module.scale), dtype=torch.float64), torch.tensor(int(self._module.zero_point))
        )

    def write(self, qparams: QParams) -> None:
        self._module.scale = float(qparams.scale)
        self._module.zero_point = int(qparams.zero_point)

    def state(self) -> tuple[float, int]:
        return self._module.scale, self._module.zero_point

    def restore(self, state: tuple[float, int]) -> None:
        self._module.scale, self._module.zero_point = state


class WeightHome:
    """A packed weight; subclasses say where the packed object is kept.

    `restore` puts the very object back that `state` saw, so it costs nothing and is exact.
    """

    slots: tuple[Slot, ...] = ()

    def weight(self) -> Tensor:
        """The weight as a quantized tensor."""
        raise NotImplementedError

    def state(self) -> Any:
        raise NotImplementedError

    def restore(self, state: Any) -> None:
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """What is added to the products, in float; (C,)."""
        raise NotImplementedError

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        raise NotImplementedError

    def read(self) -> QParams:
        weight = self.weight()
        if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return QParams(torch.tensor(weight.q_scale(), dtype=torch.float64), torch.tensor(weight.q_zero_point()))
        # The unpacked tensor shares its scales with the packed object.
        scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        return QParams(scales.to(torch.float64, copy=True), zero_points.to(torch.int64, copy=True))

    def write_weight(self, codes: Tensor, site: ScaleSite, qparams: QParams, bias: Tensor | None = None) -> None:
        """Pack int8 codes with their scales; without a bias the one that is there stays."""
        if site.axis is None:
            scale, zero_point = float(qparams.scale), int(qparams.zero_point)
            weight = torch._make_per_tensor_quantized_tensor(codes, scale, zero_point)
        else:
            weight = torch._make_per_channel_quantized_tensor(codes, qparams.scale, qparams.zero_point, site.axis)
        self._set(weight, self.bias() if bias is None else bias)


class PackedHome(WeightHome):
    """A weight inside a ScriptObject; subclasses say where that is kept."""

    _renewed: tuple[Any, Any] | None = None  # the object that `renew` made, and the one that it stands for

    def _packed(self) -> Any:
        raise NotImplementedError

    def _put(self, packed: Any) -> None:
        raise NotImplementedError

    @property
    def pads(self) -> bool:
        """Whether it is of a convolution that pads its input."""
        packed = self._packed()
        return hasattr(packed, "padding") and any(packed.padding())

    def state(self) -> Any:
        packed = self._packed()
        return self._renewed[1] if self._renewed is not None and packed is self._renewed[0] else packed

    def restore(self, state: Any) -> None:
        self._put(state)

    def renew(self) -> None:
        """Pack the same weight once more, for QNNPACK forgets nothing (torch 2.13 to 2.15); `state` is as before.

        It works out its multipliers from the scales of input and output when an object is first used, and again when
        the input's scale is another, never when the output's is. And it fills its buffer of padding when an object is
        first used (or with more images than before) with the zero_point that its input has then.
        """
        kept = self.state()
        self._set(self.weight(), self.bias())
        self._renewed = self._packed(), kept


class ModuleWeightHome(PackedHome):
    """The packed weight of an `nnq` Linear or Conv module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = cast(Any, module)
        # Linear keeps the packed object one module deeper than Conv does.
        inner = module._modules.get("_packed_params")
        self._owner: Any = module if inner is None else inner

    def weight(self) -> Tensor:
        return cast(Tensor, self._module.weight())

    def _packed(self) -> Any:
        return self._owner._packed_params

    def _put(self, packed: Any) -> None:
        self._owner._packed_params = packed

    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self._module._weight_bias()[1])

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        self._module.set_weight_bias(weight, bias)


class PackedWeightHome(PackedHome):
    """A packed weight on the root (`_packed_weight_0`), used by functional linear and conv."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self._owner, self._attribute = owner, attribute

    def weight(self) -> Tensor:
        return cast(Tensor, self._packed().unpack()[0])

    def _packed(self) -> Any:
        return getattr(self._owner, self._attribute)

    def _put(self, packed: Any) -> None:
        setattr(self._owner, self._attribute, packed)

    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self._packed().unpack()[1])

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
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


Home = ActivationHome | WeightHome


@dataclass(frozen=True)
class ScannedGraph:
    """The sites of a graph and the home of each."""

    sites: SiteTable
    homes: dict[str, Home]
    sums: tuple[tuple[str, str], ...]
    """Sites of the output and of an input of each quantized.add."""
    remembered: tuple[tuple[str, str], ...]
    """Sites of activations of which QNNPACK keeps something in a packed weight, each with the site of that weight."""


def infer_range(weight: Tensor) -> tuple[int, int]:
    """The nominal code range of a quantized weight, from its codes: the smallest bit width that holds them.

    convert_fx does not clamp to quant_min..quant_max, so a symmetric 3-bit weight holds codes -4..4; +4 then
    still means -4..3.
    """
    codes = weight.int_repr()
    largest = max(int(codes.max()), -int(codes.min()))
    if largest == 0:  # a weight that is zero throughout (zero-initialised last layers) says nothing
        return -128, 127
    bits = next(b for b in range(2, 9) if 2 ** (b - 1) >= largest)
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
