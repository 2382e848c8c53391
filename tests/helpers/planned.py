"""A network of which one place is far worse than all others in 8 bits, quantized with and without parts in float."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from helpers import nets, pt2e

BATCHES = list(nets.images(64, 16).split(16))


class Chain(nn.Module):
    """Four linear layers and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = x + self.third(self.second(x))
        found: Tensor = self.last(x)
        return found


def outlier_between() -> Chain:
    """Between `second` and `third` a channel is hundreds of times larger than the others: equal in float."""
    model = nets.seeded(Chain)
    with torch.no_grad():
        model.second.weight[3] *= 300
        model.second.bias[3] *= 300
        model.third.weight[:, 3] /= 300
    return model


class Sum(nn.Module):
    """A residual block whose sum goes through a ReLU, which is fused with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.first(x))
        found: Tensor = self.third(self.act2(x + self.second(x)))
        return found


def outlier_in_a_sum() -> nn.Module:
    """The sum has a channel that is a hundred times larger than the others."""
    model = nets.seeded(lambda: nn.Sequential(Sum(), nn.Linear(16, 8)))
    with torch.no_grad():
        block: Any = model[0]
        block.second.weight[3] *= 100
        block.third.weight[:, 3] /= 100
    return model


def quantize_fx(model: nn.Module, plan: cptv_ao.Plan | None = None, mapping: Any = None) -> GraphModule:
    """Stock torch.ao FX, with what a plan leaves in float."""
    mapping = cptv_ao.qconfig_mapping(8, "x86") if mapping is None else mapping
    if plan is not None:
        mapping = plan.qconfig_mapping(mapping)
    return nets.quantize(model, BATCHES, mapping=mapping)[1]


def quantize_pt2e(
    model: nn.Module, quantizer: Callable[[], Any], batches: Sequence[Tensor], plan: cptv_ao.Plan | None = None
) -> GraphModule:
    """Stock PT2E, the same."""
    made = quantizer() if plan is None else plan.quantizer(quantizer())
    return pt2e.converted(copy.deepcopy(model), made, True, batches)


def mse(model: Any, teacher: nn.Module, batches: Sequence[Tensor]) -> float:
    """Mean squared error of the outputs."""
    with torch.no_grad():
        found = [float((model(batch.clone()) - teacher(batch.clone())).square().mean()) for batch in batches]
    return sum(found) / len(found)
