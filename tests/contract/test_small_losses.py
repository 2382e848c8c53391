"""Losses that float32 would not tell from zero: the search goes on where outputs are still far from the teacher's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import nets
from torch import nn

import cptv_ao
from cptv_ao.diagnosis.meters import Fidelity


def net(spread: float) -> nn.Module:
    """A small CNN whose logits are so far apart, as those of a network that is sure of nothing."""
    torch_net = nets.seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    )
    with torch.no_grad():
        torch_net[-1].weight.mul_(spread)
        torch_net[-1].bias.mul_(spread)
    return torch_net


def sqnr(model: nn.Module, teacher: nn.Module, images: torch.Tensor) -> float:
    found = Fidelity()
    with torch.no_grad():
        found.add(model(images), teacher(images))
    assert found.sqnr is not None
    return found.sqnr


@pytest.mark.parametrize("spread", [1.0, 0.03, 0.003])
def test_outputs_come_nearer_however_small_the_logits(spread: float) -> None:
    model, unseen = net(spread), nets.images(128, 3, 8, 8, seed=9)
    batches = list(nets.images(128, 3, 8, 8, seed=1).split(32))
    _, converted = nets.quantize(copy.deepcopy(model), batches, weight_bits=4)
    before = sqnr(converted, model, unseen)
    config = cptv_ao.RefineConfig(gradient_steps=40, passes=1)
    cptv_ao.refine(converted, batches, float_model=model, config=config, progress=False)
    report = cptv_ao.report(converted)
    assert 0 < report.after.search < report.before.search / 2
    assert sqnr(converted, model, unseen) > before + 2
