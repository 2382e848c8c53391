"""Residual streams rotated, before a model is quantized; its function stays the same.

A few channels of the residual stream of a large transformer carry values tens of times larger than the others, and one
scale for all of them leaves the others few codes. A rotation of all channels spreads them evenly (QuaRot,
arXiv 2404.00456; SpinQuant, arXiv 2405.16406): what writes into the stream is rotated, what reads it rotates back.
Layer norms are in between: their weights and biases go into the linear layers behind them, and what they subtract and
divide by stays the same, since the rotation leaves the direction (1, 1, ... 1) where it is.

    Before: x + W y + b          ->  norm (g, c)  ->  V x + d
    After:  Q x + Q W y + Q b    ->  norm (1, 0)  ->  (V g Q^T) x + d + V c

Where the model returns the norm, a linear layer behind it rotates back. Where a norm begins the stream (CLIP), a linear
layer behind it rotates: Q g x + Q c. Its place is in float, for a g of numbers far apart leaves such weights few codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.residual_streams import Layer, Reader, ResidualStream, Writer
from cptv_ao.transforms.turned_streams import HeldTensors, idle_layer, turn_stream


def rotate(model: nn.Module, stream: ResidualStream, turn: Tensor) -> list[str]:
    """Rotate a stream of a model, whose tensors are written; where nothing reads a norm, or one begins the stream, a
    layer is put behind it.

    Returns:
        The paths of the layers that rotate back.
    """
    begun = tuple(_begun_by_a_layer(model, path) for path in stream.starts)
    readers = tuple(reader if reader.layers else _read_by_a_layer(model, reader) for reader in stream.readers)
    with torch.no_grad():
        turn_stream(_Tensors(model), replace(stream, writers=stream.writers + begun, readers=readers), turn)
    return [reader.end for reader in stream.readers if not reader.layers]


class _Tensors(HeldTensors):
    """Those of a float model, which are written."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def wide(self, path: str) -> Tensor:
        held: Tensor = fetch(self._model, path)
        return held.detach().to("cpu", torch.float64)

    def put(self, path: str, value: Tensor) -> None:
        fetch(self._model, path).copy_(value)

    def of_layer(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        there = layer.bias is not None and fetch(self._model, layer.bias) is not None
        return self.wide(layer.weight), self.wide(layer.bias) if there and layer.bias is not None else None

    def put_layer(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        self.put(layer.weight, weight)
        if bias is None:
            return
        if layer.bias is None:
            if bool(bias.any()):
                raise RuntimeError("a function without a bias cannot be given one")
        elif fetch(self._model, layer.bias) is None:
            owner, _, name = layer.bias.rpartition(".")
            own = nn.Parameter(bias.to(fetch(self._model, layer.weight)))
            setattr(self._model.get_submodule(owner), name, own)
        else:
            self.put(layer.bias, bias)


def _begun_by_a_layer(model: nn.Module, path: str) -> Writer:
    """A norm that begins a stream, with a linear layer behind it that multiplies and adds what the norm did."""
    norm: Any = model.get_submodule(path)
    layer = idle_layer(len(norm.weight)).to(norm.weight)
    with torch.no_grad():
        layer.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)
        if norm.bias is not None:
            layer.bias.copy_(norm.bias)
            norm.bias.zero_()
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Sequential(norm, layer))
    return Writer(Layer(f"{path}.1.weight", f"{path}.1.bias", tuple(layer.weight.shape)))


def _read_by_a_layer(model: nn.Module, reader: Reader) -> Reader:
    """A norm that is returned, with a linear layer behind it, or in the place of an identity there, that gives what it
    is given."""
    assert reader.norm is not None
    end, (weight, bias) = reader.end, reader.norm
    before, gain = model.get_submodule(end), fetch(model, weight)
    behind: nn.Module = idle_layer(len(gain)).to(gain)
    owner, _, name = end.rpartition(".")
    path = end
    if type(before) is not nn.Identity:  # the norm itself
        path, behind = f"{end}.1", nn.Sequential(before, behind)
        weight, bias = f"{end}.0.weight", None if bias is None else f"{end}.0.bias"
    setattr(model.get_submodule(owner), name, behind)
    own = Layer(f"{path}.weight", f"{path}.bias", (len(gain), len(gain)))
    return replace(reader, norm=(weight, bias), layers=(own,))
