"""What is what among the arguments of a quantized function: its value, its settings, the qparams of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Node

from cptv_ao.fx.inplace import parameters
from cptv_ao.fx.paths import fetch, is_scalar


def bound(node: Node, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The value that a quantized function is given, and its other arguments but the output's qparams, by name."""
    names = parameters(node.target)
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    scales = scale_places(given, model)
    return given.pop(names[0]), {name: value for name, value in given.items() if name not in scales}


def scale_places(given: Mapping[Any, Any], model: nn.Module) -> list[Any]:
    """Where among the arguments of a quantized function the scale and the zero_point of its output are."""
    held = {place: _constant(value, model) for place, value in given.items()}
    kinds = (True, False)
    return [place for kind in kinds for place, value in held.items() if is_scalar(value, floating=kind)]


def _constant(value: Any, model: nn.Module) -> Any:
    """What a node of the model itself stands for; None of others."""
    return fetch(model, str(value.target)) if isinstance(value, Node) and value.op == "get_attr" else None
