"""What of a model's output is compared, and as what: (N, C) in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.output_tree import named_tensors

Select = Callable[[Any], Tensor]


def first_floating(output: Any) -> Tensor:
    """The first floating tensor of an output, whatever holds it; depth first.

    Raises:
        UnsupportedModelError: there is none.
    """
    for value in named_tensors(output).values():
        if value.is_floating_point():
            return value
    raise UnsupportedModelError(
        f"expected an output that holds a floating tensor, got {type(output).__name__}; "
        "say which part the loss compares with RefineConfig(output=...)"
    )


def compared(output: Any, select: Select = first_floating) -> Tensor:
    """The tensor that a loss compares, as (N, C) in float32: (N,) is (N, 1), more dimensions are put one after another.

    Half, bfloat16 and double outputs are compared in float32, too. Differentiable.

    Raises:
        UnsupportedModelError: it has no rows, or no real numbers.
    """
    tensor = select(output)
    if not isinstance(tensor, Tensor):
        raise UnsupportedModelError(f"RefineConfig.output: expected it to pick a tensor, got {type(tensor).__name__}")
    if tensor.is_complex() or tensor.is_quantized or tensor.is_sparse:
        raise UnsupportedModelError(
            f"expected an output of real numbers in a dense tensor, got {tensor.dtype} ({tensor.layout}); "
            "say what the loss compares with RefineConfig(output=...)"
        )
    if tensor.dim() == 0:
        raise UnsupportedModelError(
            "expected an output with one row per image (N, ...), got a single number for the whole batch; "
            "say which part the loss compares with RefineConfig(output=...)"
        )
    rows = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor.flatten(1)
    return rows.float()


def copied(value: Any) -> Any:
    """The same with a copy of each tensor in it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        other = copy.copy(value)  # of its own type
        other.update({key: copied(item) for key, item in value.items()})
        return other
    if not isinstance(value, (list, tuple)):
        return value
    make = getattr(value, "_make", type(value))  # of a named tuple
    return make(copied(item) for item in value)


def moved(value: Any, device: torch.device | str) -> Any:
    """The tensors of a batch's inputs on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if isinstance(value, (list, tuple)) else value


def raw(tensor: Tensor) -> Any:
    """The bytes of a dense tensor on any device, as a buffer."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
