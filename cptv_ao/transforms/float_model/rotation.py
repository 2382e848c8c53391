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

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.transforms.float_model.residual_streams import Layer, Reader, ResidualStream, Writer

# A channel is spread the further the flatter a rotation is: entries are held to so many times 1 / sqrt(width), in turn
# with what makes the matrix orthogonal again.
_CAP, _ROUNDS, _STEPS, _LAST_STEPS = 1.2, 40, 1, 12


def rotation(width: int) -> Tensor:
    """An orthogonal matrix (width, width), float64, that gives a vector of ones back and spreads each channel over all;
    always the same one."""
    generator = torch.Generator().manual_seed(width)
    ones = torch.full((width, width), 1 / width, dtype=torch.float64)
    others = torch.eye(width, dtype=torch.float64) - ones
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    for _ in range(_ROUNDS):
        turn = ones + others @ turn.clamp(-_CAP / math.sqrt(width), _CAP / math.sqrt(width)) @ others
        turn = _orthogonal(turn, _STEPS)
    return _orthogonal(turn, _LAST_STEPS)


def _orthogonal(near: Tensor, steps: int) -> Tensor:
    """The orthogonal matrix nearest to one (N, N) whose singular values are below sqrt(3) (Newton and Schulz)."""
    for _ in range(steps):
        near = 1.5 * near - 0.5 * near @ (near.T @ near)
    return near


def peak_ratio(stream: ResidualStream, shown: Mapping[Node, Any], turn: Tensor) -> float:
    """How many times larger the largest values of a stream are than those of the rotated one, in the geometric mean of
    its sums.

    Args:
        shown: what the nodes gave on example images.
        turn: the rotation.
    """
    ratios = []
    for node in stream.sums:
        value = shown.get(node)
        if isinstance(value, Tensor) and value.dim() and value.shape[-1] == stream.width:
            peak, turned = value.abs().max(), (value @ turn.T.to(value)).abs().max()
            ratios.append(math.log(float(peak) / float(turned)) if peak > 0 and turned > 0 else 0.0)
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0


def rotate(model: nn.Module, stream: ResidualStream, turn: Tensor) -> list[str]:
    """Rotate a stream of a model, whose tensors are written; where nothing reads a norm, a layer is put behind it.

    Returns:
        The paths of these layers.
    """
    with torch.no_grad():
        for writer in stream.writers:
            _turn_written(writer, turn)
        for tensor in stream.tensors:
            tensor.copy_(_wide(tensor) @ turn.T)
        for reader in stream.readers:
            layers = reader.layers or (_appended(model, reader),)
            _turn_read(reader, layers, turn)
    return [reader.end for reader in stream.readers if not reader.layers]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _turn_written(writer: Writer, turn: Tensor) -> None:
    layer, factors = writer.layer, writer.factors
    if factors is not None:
        turn = turn * _wide(factors)
        factors.fill_(1.0)
    layer.weight.copy_((turn @ _wide(layer.weight).flatten(1)).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(turn @ _wide(layer.bias))


def _turn_read(reader: Reader, layers: tuple[Layer, ...], turn: Tensor) -> None:
    for layer in layers:
        weight = _wide(layer.weight)
        if reader.norm is not None:
            gain, offset = reader.norm
            if offset is not None:
                _add_to_bias(layer, weight @ _wide(offset))
            weight = weight * _wide(gain)
        layer.weight.copy_(weight @ turn.T)
    for tensor, neutral in zip(reader.norm or (), (1.0, 0.0), strict=False):
        if tensor is not None:
            tensor.fill_(neutral)


def _add_to_bias(layer: Layer, added: Tensor) -> None:
    if layer.bias is not None:
        layer.bias.add_(added.to(layer.bias))
    elif layer.module is not None:
        layer.module.bias = nn.Parameter(added.to(layer.weight))
    elif bool(added.any()):
        raise RuntimeError("a function without a bias cannot be given one")


def _appended(model: nn.Module, reader: Reader) -> Layer:
    """A linear layer that gives what it is given, at the end behind a norm."""
    assert reader.norm is not None
    width, before = len(reader.norm[0]), model.get_submodule(reader.end)
    layer = nn.Linear(width, width).to(reader.norm[0])
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    owner, _, name = reader.end.rpartition(".")
    setattr(model.get_submodule(owner), name, layer if type(before) is nn.Identity else nn.Sequential(before, layer))
    return Layer(layer.weight, layer.bias, layer)
