"""Where a model keeps a weight and a bias that are packed for a kernel, in an object of torch's (a ScriptObject).

Nothing writes into such an object: another one is put in its place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn


class PackedParams(ABC):
    """The place of one packed object."""

    @abstractmethod
    def get(self) -> Any:
        """The object that is there."""

    @abstractmethod
    def put(self, packed: Any) -> None:
        """Put an object there."""

    @abstractmethod
    def unpack(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the object; copies all of the weight."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make an object of these, and put it there."""


class ModuleParams(PackedParams):
    """Those of an `nnq` Linear or Conv module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = cast(Any, module)
        # Linear keeps the packed object one module deeper than Conv does.
        inner = module._modules.get("_packed_params")
        self._owner: Any = module if inner is None else inner

    def get(self) -> Any:
        return self._owner._packed_params

    def put(self, packed: Any) -> None:
        self._owner._packed_params = packed

    def unpack(self) -> tuple[Tensor, Tensor | None]:
        return cast("tuple[Tensor, Tensor | None]", self._module._weight_bias())

    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        self._module.set_weight_bias(weight, bias)


class RootParams(PackedParams):
    """Those on the root (`_packed_weight_0`), used by functional linear and conv."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self._owner, self._attribute = owner, attribute

    def get(self) -> Any:
        return getattr(self._owner, self._attribute)

    def put(self, packed: Any) -> None:
        setattr(self._owner, self._attribute, packed)

    def unpack(self) -> tuple[Tensor, Tensor | None]:
        return cast("tuple[Tensor, Tensor | None]", self.get().unpack())

    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        packed = self.get()
        ops = torch.ops.quantized
        if hasattr(packed, "stride"):
            settings = [packed.stride(), packed.padding(), packed.dilation(), packed.groups()]
            prepack = {3: ops.conv1d_prepack, 4: ops.conv2d_prepack, 5: ops.conv3d_prepack}[weight.dim()]
            if packed.transpose():
                prepack = {4: ops.conv_transpose2d_prepack, 5: ops.conv_transpose3d_prepack}[weight.dim()]
                settings.insert(2, packed.output_padding())
            self.put(prepack(weight, bias, *settings))
        else:
            self.put(ops.linear_prepack(weight, bias))
