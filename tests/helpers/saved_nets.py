"""Networks that torch can save, and such that it cannot save whole."""

from __future__ import annotations

import torch
from torch import nn

from helpers import nets
from helpers.cases import Case


class Plain(nn.Module):
    """A CNN without annotations: those of `nets` are strings, which torch.jit.script cannot read from an FX graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 5)

    def forward(self, x):  # type: ignore[no-untyped-def]
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc((x + self.conv2(x)).mean((2, 3)))


class Linears(nn.Module):
    """Nothing that torch cannot save."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.fc2(self.norm(self.fc1(x)))


class SoftmaxModule(nn.Module):
    """Attention's softmax and an ELU as modules: quantized modules whose scales are in no state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.soft, self.elu, self.fc2 = nn.Linear(6, 6), nn.Softmax(-1), nn.ELU(), nn.Linear(6, 4)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.fc2(self.elu(self.soft(self.fc1(x))))


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    Plain: (3, 8, 8), Linears: (6,), SoftmaxModule: (6,), nets.ConvNet: (3, 16, 16), nets.FunctionalNet: (3, 8, 8),
}  # fmt: skip


def made(kind: type[nn.Module], gain: float = 1.0, shape: tuple[int, ...] = ()) -> Case:
    """A converted model; with another gain of the calibration images the scales are others.

    Args:
        shape: of an image, of a network that is not among `SHAPES`.
    """
    float_model = nets.seeded(kind)
    batches = list((nets.images(16, *(shape or SHAPES[kind])) * gain).split(4))
    prepared, converted = nets.quantize(float_model, batches, weight_bits=3)
    return Case(float_model, prepared, converted, batches)
