"""Whether a graph ends in a layer with a weight."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional

from cptv_ao.fx.output_layer import ends_in_layer


class Ends(nn.Module):
    """A network with a given end."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.first, self.end = nn.Conv2d(3, 8, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.first(x).relu().mean((2, 3)))


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1)


class PooledLast(nn.Module):
    """The logits of each place, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.first(x)).flatten(1)


class Heads(nn.Module):
    """Two heads, of which a number or a layer makes one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.one, self.two, self.norm = form, nn.Linear(8, 5), nn.Linear(8, 5), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.form == "mean":
            return (one + two) / 2
        if self.form == "sum":
            return torch.add(one, two)
        if self.form == "half":
            return 0.5 * (one.flatten(1) + two).contiguous()
        if self.form == "normed":
            return one + self.norm(two)
        if self.form == "gated":
            return one * two
        return one + 1  # more than a number of each


ENDS: dict[str, tuple[nn.Module, bool]] = {
    "mean of heads": (Heads("mean"), True),
    "sum of heads": (Heads("sum"), True),
    "half of heads": (Heads("half"), True),
    "a head and a norm": (Heads("normed"), False),
    "a gate": (Heads("gated"), False),
    "moved": (Heads("moved"), False),
    "linear": (nn.Linear(8, 5), True),
    "dropout": (nn.Sequential(nn.Linear(8, 5), nn.Dropout()), True),
    "log softmax": (nn.Sequential(nn.Linear(8, 5), nn.LogSoftmax(1)), True),
    "norm": (nn.LayerNorm(8), False),
    "unit": (nn.Sequential(nn.Linear(8, 5), Unit()), False),
    "relu": (nn.Sequential(nn.Linear(8, 5), nn.ReLU()), False),
    "features": (nn.Identity(), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_of_float_graphs(name: str) -> None:
    end, wanted = ENDS[name]
    assert ends_in_layer(symbolic_trace(Ends(end))) is wanted


def test_logits_may_be_averaged() -> None:
    assert ends_in_layer(symbolic_trace(PooledLast()))


@pytest.mark.parametrize("name", ["linear", "norm", "relu", "features", "mean of heads", "half of heads", "a gate"])
def test_of_quantized_graphs(name: str) -> None:
    end, wanted = ENDS[name]
    model = Ends(end).eval()
    batch = torch.randn(4, 3, 8, 8)
    _, converted = nets.quantize(model, [batch])
    assert isinstance(converted, GraphModule)
    assert ends_in_layer(converted) is wanted
