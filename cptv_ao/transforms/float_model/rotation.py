"""Residual streams rotated, before a model is quantized; its function stays the same.

A few channels of the residual stream of a large transformer carry values tens of times larger than the others, and one
scale for all of them leaves the others few codes. A rotation of all channels spreads them evenly (QuaRot,
arXiv 2404.00456; SpinQuant, arXiv 2405.16406): what writes into the stream is rotated, what reads it rotates back.
Layer norms are in between: their weights and biases go into the linear layers behind them, and what they subtract and
divide by stays the same, since the rotation leaves the direction (1, 1, ... 1) where it is.

    Before: x + W y + b          ->  norm (g, c)  ->  V x + d
    After:  Q x + Q W y + Q b    ->  norm (1, 0)  ->  (V g Q^T) x + d + V c

Where the model returns the norm, a linear layer behind it rotates back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.core.rotations import peak_ratio
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.residual_streams import Layer, Norm, Reader, ResidualStream, Writer


def shown_ratio(stream: ResidualStream, shown: Mapping[Node, Any], turn: Tensor) -> float:
    """How many times larger the largest values of a stream are than those of the rotated one.

    Args:
        shown: what the nodes gave on example images.
        turn: the rotation.
    """
    values = (shown.get(node) for node in stream.sums)
    sums = [one for one in values if isinstance(one, Tensor) and one.dim() and one.shape[-1] == stream.width]
    return peak_ratio(sums, turn)


def rotate(model: nn.Module, stream: ResidualStream, turn: Tensor) -> list[str]:
    """Rotate a stream of a model, whose tensors are written; where nothing reads a norm, a layer is put behind it.

    Returns:
        The paths of these layers.
    """
    with torch.no_grad():
        for writer in stream.writers:
            _turn_written(model, writer, turn)
        for path in stream.tensors:
            tensor = fetch(model, path)
            tensor.copy_(_wide(tensor) @ turn.T)
        for reader in stream.readers:
            _turn_read(model, reader, turn)
    return [reader.end for reader in stream.readers if not reader.layers]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _turn_written(model: nn.Module, writer: Writer, turn: Tensor) -> None:
    weight, bias = fetch(model, writer.layer.weight), _bias(model, writer.layer)
    if writer.factors is not None:
        factors = fetch(model, writer.factors)
        turn = turn * _wide(factors).flatten()
        factors.fill_(1.0)
    weight.copy_((turn @ _wide(weight).flatten(1)).reshape(weight.shape))
    if bias is not None:
        bias.copy_(turn @ _wide(bias))


def _turn_read(model: nn.Module, reader: Reader, turn: Tensor) -> None:
    gain, offset = (None, None) if reader.norm is None else _parameters(model, reader.norm)
    for layer in reader.layers or (_appended(model, reader.end, gain),):
        held = fetch(model, layer.weight)
        weight = _wide(held)
        if offset is not None:
            _add_to_bias(model, layer, weight @ _wide(offset))
        if gain is not None:
            weight = weight * _wide(gain)
        held.copy_(weight @ turn.T)
    for tensor, neutral in ((gain, 1.0), (offset, 0.0)):
        if tensor is not None:
            tensor.fill_(neutral)


def _parameters(model: nn.Module, norm: Norm) -> tuple[Tensor, Tensor | None]:
    return fetch(model, norm[0]), None if norm[1] is None else fetch(model, norm[1])


def _bias(model: nn.Module, layer: Layer) -> Any:
    return None if layer.bias is None else fetch(model, layer.bias)


def _add_to_bias(model: nn.Module, layer: Layer, added: Tensor) -> None:
    bias = _bias(model, layer)
    if bias is not None:
        bias.add_(added.to(bias))
    elif layer.bias is not None:
        owner, _, name = layer.bias.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Parameter(added.to(fetch(model, layer.weight))))
    elif bool(added.any()):
        raise RuntimeError("a function without a bias cannot be given one")


def _appended(model: nn.Module, end: str, gain: Tensor | None) -> Layer:
    """A linear layer that gives what it is given, behind a norm of this weight, or an identity at the end."""
    assert gain is not None
    width, before = len(gain), model.get_submodule(end)
    layer = nn.Linear(width, width).to(gain)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    owner, _, name = end.rpartition(".")
    path = end if type(before) is nn.Identity else f"{end}.1"
    setattr(model.get_submodule(owner), name, layer if path == end else nn.Sequential(before, layer))
    return Layer(f"{path}.weight", f"{path}.bias", (width, width))
