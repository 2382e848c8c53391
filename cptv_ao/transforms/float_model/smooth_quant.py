"""Outliers of norms moved into the weights that read them, before a model is quantized; its function stays the same.

A few channels behind a norm of a large transformer carry values tens of times larger than the others, and one scale
for all of them leaves the others few codes. Dividing such a channel's weight and bias of the norm, and multiplying the
columns of the linear layers that read it, is the equivalent transformation of SmoothQuant (arXiv 2211.10438). Here a
column never becomes larger than the largest one of its layer, so that weights lose nothing, whatever their bits.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional

from cptv_ao.core.channel_scaling import outlier_exponents
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.readers import is_shared, own_path, read_once


def smooth(model: nn.Module, graph: Graph, values: Mapping[Node, Any]) -> int:
    """Divide the outlier channels of every norm that only linear layers read; returns how many there were.

    Args:
        model: a float model; the weights of its norms and linear layers are written.
        graph: as traced from it; norms may be modules or functions, linear layers are modules.
        values: what the nodes of the graph gave on example images.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    once = read_once(graph.nodes)
    found = 0
    with torch.no_grad():
        for node in graph.nodes:
            norm = norm_parameters(node, model, modules, once)
            layers = _readers(node, modules, once, values)
            value = values.get(node)
            if norm is not None and layers and isinstance(value, Tensor) and norm[0].shape == value.shape[-1:]:
                found += _divide(norm, layers, value)
    return found


def _divide(norm: tuple[Tensor, Tensor | None], layers: list[nn.Linear], value: Tensor) -> int:
    """Make outlier channels of a norm as large as the median one, as far as the layers allow; returns their number."""
    peaks = value.detach().abs().reshape(-1, value.shape[-1]).amax(0)
    columns = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
    factors = torch.exp2(outlier_exponents(peaks, columns))
    for parameter in norm:
        if parameter is not None:
            parameter /= factors
    for layer in layers:
        layer.weight *= factors
    return int((factors > 1).sum())


def norm_parameters(
    node: Node, model: nn.Module, modules: Mapping[str, nn.Module], once: Container[str]
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a norm over the last dimension, where nothing else uses them."""
    paths = norm_paths(node, modules, once)
    if paths is None:
        return None
    return fetch(model, paths[0]), None if paths[1] is None else fetch(model, paths[1])


def norm_paths(node: Node, modules: Mapping[str, nn.Module], once: Container[str]) -> tuple[str, str | None] | None:
    """As `norm_parameters`, where they are."""
    if node.op == "call_module":
        path, norm = str(node.target), modules[str(node.target)]
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or path not in once:
            return None
        return f"{path}.weight", None if norm.bias is None else f"{path}.bias"
    if node.target is not functional.layer_norm:
        return None
    given = dict(zip(("input", "normalized_shape", "weight", "bias"), node.args, strict=False)) | node.kwargs
    weight, bias = (own_path(given.get(name), once) for name in ("weight", "bias"))
    if weight is None or (bias is None and given.get("bias") is not None):
        return None
    return weight, bias


def _readers(
    node: Node, modules: Mapping[str, nn.Module], once: Container[str], values: Mapping[Node, Any]
) -> list[nn.Linear]:
    """The linear layers that read a value, if nothing else does (but its shape) and they read nothing else."""
    layers = []
    for user in node.users:
        if user in values and not isinstance(values[user], Tensor):
            continue  # its shape
        layer = modules.get(str(user.target)) if user.op == "call_module" else None
        if type(layer) is not nn.Linear or str(user.target) not in once:
            return []
        if is_shared(layer, modules):
            return []
        layers.append(layer)
    return layers
