"""The slots of a lowered model that hold a scale. Each knows how to read, write and restore one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cptv_ao.backends.kernel_faults import is_right
from cptv_ao.backends.tensor_slots import TensorSlot
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite, SiteTable


class ScaleSlot(Protocol):
    """Holds the scale and zero_point of an activation, per tensor.

    Attributes:
        tensors: the slots of the tensors that it writes into.
    """

    @property
    def tensors(self) -> tuple[TensorSlot, ...]: ...

    def read(self) -> QParams: ...
    def write(self, qparams: QParams) -> None: ...
    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


class BufferScaleSlot:
    """A scale and zero_point as buffers, of the root (`quantize_per_tensor`, `quantized.add`) or of a module
    (`nnq.LayerNorm`); of a PT2E graph also those of the channels of a weight.

    They are written in place, for a search holds on to them: see `cptv_ao.backends.tensor_slots` for whose they are.
    """

    def __init__(self, scale: TensorSlot, zero_point: TensorSlot, shape: Sequence[int] = ()) -> None:
        self.tensors, self._shape = (scale, zero_point), tuple(shape)

    def read(self) -> QParams:
        scale, zero_point = (slot.tensor.detach().reshape(self._shape) for slot in self.tensors)
        return QParams(scale.to("cpu", torch.float64, copy=True), zero_point.to("cpu", torch.int64, copy=True))

    def write(self, qparams: QParams) -> None:
        self.restore((qparams.scale, qparams.zero_point))

    def state(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = (slot.copied() for slot in self.tensors)
        return scale, zero_point

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            for slot, value in zip(self.tensors, state, strict=True):
                slot.tensor.copy_(value.reshape(slot.tensor.shape))


class AttributeScaleSlot:
    """A python float and int on a module (`nnq.Linear.scale`): only float32 values survive a state_dict."""

    tensors: tuple[TensorSlot, ...] = ()

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


class WeightSlot(ABC):
    """Holds a quantized weight, its codes and their scales together.

    Attributes:
        tensors: the slots of the tensors that it writes into.
        float_weight: the float weight, where the graph itself holds one and rounds it each time; None else.
        packs_bias: whether the layer has a bias of its own, or takes one, that is written with the weight.
        pads: whether it is of a convolution that pads its input.
        is_right: whether the kernel computes with this weight, not with another one.
        of_layer: whether a layer multiplies its input with it; else it is a constant of another op.
    """

    tensors: tuple[TensorSlot, ...] = ()
    float_weight: Tensor | None = None
    packs_bias = False
    pads = False
    is_right = True
    of_layer = True

    @abstractmethod
    def read(self) -> QParams:
        """The scales and zero_points; copies."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as a quantized tensor."""

    @abstractmethod
    def state(self) -> Any:
        """What is held now, for `restore`."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Put back what `state` saw."""

    @abstractmethod
    def write_weight(self, codes: Tensor, site: ScaleSite, qparams: QParams, bias: Tensor | None = None) -> None:
        """Write codes and their scales; without a bias the one that is there stays."""

    def bias(self) -> Tensor | None:
        """What is added to the products, in float (C,), where the bias is written with the weight; None else."""
        return None

    @abstractmethod
    def renew(self) -> None:
        """Let whatever a kernel remembers of this weight's layer be forgotten."""


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
        self._pack(self.weight(), self.bias())
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


@dataclass(frozen=True)
class ScannedGraph:
    """The sites of a graph, and the slot of each, in graph order."""

    sites: SiteTable
    activations: Mapping[str, ScaleSlot]
    weights: Mapping[str, WeightSlot]
    sums: tuple[tuple[str, str], ...] = ()
    """Sites of the output and of an input of each quantized.add."""
    remembered: tuple[tuple[str, str], ...] = ()
    """Sites of activations of which QNNPACK keeps something in a packed weight, each with the site of that weight."""

    @property
    def tensors(self) -> list[TensorSlot]:
        """The slots of the tensors that writing scales writes into."""
        slots: tuple[ScaleSlot | WeightSlot, ...] = (*self.activations.values(), *self.weights.values())
        return [tensor for slot in slots for tensor in slot.tensors]


def quantized_weight(codes: Tensor, qparams: QParams, axis: int | None) -> Tensor:
    """The quantized tensor of codes, int8 or uint8; `axis` is that of the channels, None where one scale is for all."""
    if axis is None:
        return torch._make_per_tensor_quantized_tensor(codes, float(qparams.scale), int(qparams.zero_point))
    return torch._make_per_channel_quantized_tensor(codes, qparams.scale, qparams.zero_point, axis)


def _scales_of(weight: Tensor) -> QParams:
    """Of a quantized tensor; copies."""
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return QParams(torch.tensor(weight.q_scale(), dtype=torch.float64), torch.tensor(weight.q_zero_point()))
    # An unpacked tensor shares its scales with the packed object.
    scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return QParams(scales.to(torch.float64, copy=True), zero_points.to(torch.int64, copy=True))


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
