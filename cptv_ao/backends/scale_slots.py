"""The slots of a lowered model that hold a scale. Each knows how to read, write and restore one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

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
        float_at: where that is held, if nothing else computes with it, or moves it before it is rounded.
        packs_bias: whether the layer has a bias of its own, or takes one, that is written with the weight.
        pads: whether it is of a convolution that pads its input.
        is_right: whether the kernel computes with this weight, not with another one.
        of_layer: whether a layer multiplies its input with it; else it is a constant of another op.
    """

    tensors: tuple[TensorSlot, ...] = ()
    float_weight: Tensor | None = None
    float_at: TensorSlot | None = None
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

    def hold(self, codes: Tensor) -> bool:
        """Let the float weight that the graph rounds itself be one that gives these codes at the scales that are there
        now; whether it could: not without a `float_at`."""
        return False

    def bias(self) -> Tensor | None:
        """What is added to the products, in float (C,), where the bias is written with the weight; None else."""
        return None

    @abstractmethod
    def renew(self) -> None:
        """Let whatever a kernel remembers of this weight's layer be forgotten."""


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
