"""What a rotation does to the tensors around a residual stream, wherever they are held.

See `cptv_ao.transforms.float_model.rotation` for the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cptv_ao.transforms.residual_streams import Layer, Reader, ResidualStream, Writer


class HeldTensors(ABC):
    """Reads tensors of a model in float64, and replaces them."""

    @abstractmethod
    def wide(self, path: str) -> Tensor:
        """The tensor at a path."""

    @abstractmethod
    def put(self, path: str, value: Tensor) -> None:
        """Another one in its place."""

    @abstractmethod
    def of_layer(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, None where there is none."""

    @abstractmethod
    def put_layer(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        """Others in their place."""


def turn_stream(tensors: HeldTensors, stream: ResidualStream, turn: Tensor) -> None:
    """Rotate a stream all of whose norms are read by layers.

    Args:
        tensors: of the model, which are written.
        turn: the rotation, float64.
    """
    for writer in stream.writers:
        _turn_written(tensors, writer, turn)
    for path in stream.tensors:
        tensors.put(path, tensors.wide(path) @ turn.T)
    for reader in stream.readers:
        _turn_read(tensors, reader, turn)


def _turn_written(tensors: HeldTensors, writer: Writer, turn: Tensor) -> None:
    weight, bias = tensors.of_layer(writer.layer)
    if writer.factors is not None and bool(((factors := tensors.wide(writer.factors)) != 1).any()):
        turn = turn * factors.flatten()
        tensors.put(writer.factors, torch.ones_like(factors))
    turned = (turn @ weight.flatten(1)).reshape(weight.shape)
    tensors.put_layer(writer.layer, turned, None if bias is None else turn @ bias)


def _turn_read(tensors: HeldTensors, reader: Reader, turn: Tensor) -> None:
    norm = reader.norm or (None, None)
    gain, offset = (None if path is None else tensors.wide(path) for path in norm)
    for layer in reader.layers:
        weight, bias = tensors.of_layer(layer)
        if offset is not None:
            bias = weight @ offset + (0.0 if bias is None else bias)
        tensors.put_layer(layer, (weight if gain is None else weight * gain) @ turn.T, bias)
    for path, neutral in zip(norm, (1.0, 0.0), strict=True):
        if path is not None:
            tensors.put(path, torch.full_like(tensors.wide(path), neutral))


def idle_layer(width: int) -> nn.Linear:
    """A linear layer that gives what it is given, float32; no random numbers are drawn for it."""
    layer = nn.Linear(width, width, device="meta", dtype=torch.float32).to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer
