"""Everything about a model that must not change behind its owner's back, as values that compare with ==."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def everything(model: nn.Module) -> dict[str, Any]:
    """state_dict, training flags, hooks, instance attributes and meta of a model."""
    return {
        "state_dict": weights(model),
        "training": {path: module.training for path, module in model.named_modules()},
        "hooks": {path: _hooks(module) for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "meta": dict(getattr(model, "meta", {})),
    }


def weights(model: nn.Module) -> dict[str, Any]:
    """The state_dict as plain values: bit for bit, packed weights included."""
    return {key: _plain(value) for key, value in model.state_dict().items()}


@contextmanager
def in_double() -> Iterator[None]:
    """Another default dtype of the user's process."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def generators() -> tuple[Any, ...]:
    """State of the global random generators."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), kind, keys.tobytes(), tuple(rest), random.getstate()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    return _plain(a) == _plain(b)


def _hooks(module: nn.Module) -> list[int]:
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return [len(getattr(module, name)) for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_quantized:
        if "channel" in str(value.qscheme()):
            scales, zeros = value.q_per_channel_scales(), value.q_per_channel_zero_points()
            return _plain(value.int_repr()), _plain(scales), _plain(zeros), value.q_per_channel_axis()
        return _plain(value.int_repr()), value.q_scale(), value.q_zero_point()
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, torch.ScriptObject):
        return tuple(_plain(part) for part in value.unpack())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part) for part in value)
    return value
