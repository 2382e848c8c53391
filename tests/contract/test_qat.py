"""A network that was trained with fake quantization: that network is the teacher, not one that nobody trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import workloads
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.evaluation.teacher import as_float, fakes_quantization

SEEDS = (0, 1, 2)


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def fit(model: nn.Module, images: workloads.Images, rate: float, steps: int = 200) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        rows = torch.randint(0, len(images.train), (64,))
        optimizer.zero_grad()
        functional.cross_entropy(model(images.train[rows]), images.train_labels[rows]).backward()
        optimizer.step()


def trained(images: workloads.Images, seed: int) -> GraphModule:
    """A CNN of the digits at 2-bit weights, trained with fake quantization, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
        model = nn.Sequential(block(1, 12, 1), block(12, 16, 2), block(16, 24, 2), *head).train()
        fit(model, images, 4e-3)
        weight = FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-2,
            quant_max=1,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
        activation = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, reduce_range=True)
        mapping = QConfigMapping().set_global(QConfig(activation, weight))
        prepared = prepare_qat_fx(model, mapping, (images.train[:8],))
        fit(prepared, images, 2e-3)
        return prepared.eval()


@pytest.fixture(scope="module")
def prepared(digits: workloads.Images) -> GraphModule:
    return trained(digits, 0)


def test_the_teacher_rounds_as_it_was_trained_and_observes_nothing(
    prepared: GraphModule, digits: workloads.Images
) -> None:
    images = digits.test[:32]
    fixed = copy.deepcopy(prepared)
    for module in fixed.modules():
        if isinstance(module, FakeQuantize):
            module.disable_observer()
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items() if isinstance(tensor, Tensor)}
    with torch.no_grad(), as_float(prepared):
        found = prepared(images)
    with torch.no_grad():
        assert torch.equal(found, fixed(images))
    assert all(torch.equal(prepared.state_dict()[name], tensor) for name, tensor in before.items())


def test_without_fake_quantization_in_use_it_is_float(prepared: GraphModule, digits: workloads.Images) -> None:
    off = copy.deepcopy(prepared)
    for module in off.modules():
        if isinstance(module, FakeQuantize):
            module.disable_fake_quant()
            module.disable_observer()
    assert fakes_quantization(prepared) and not fakes_quantization(off)
    with torch.no_grad():
        plain = off(digits.test[:32])
        with as_float(off):
            assert torch.equal(off(digits.test[:32]), plain)


@pytest.mark.slow
def test_refine_does_not_undo_the_training(digits: workloads.Images) -> None:
    changes: list[float] = []
    for seed in SEEDS:
        model = trained(digits, seed)
        converted = convert_fx(copy.deepcopy(model))
        before = workloads.accuracy(workloads.logits(converted, digits.test), digits.test_labels)
        arguments: dict[str, Any] = {
            "config": cptv_ao.RefineConfig(gradient_steps=60, passes=0, seed=seed),
            "progress": False,
        }
        refined = cptv_ao.refine(converted, digits.train.split(100), float_model=model, **arguments)
        assert any("with its fake quantization" in note for note in cptv_ao.report(refined).notes)
        changes.append(workloads.accuracy(workloads.logits(refined, digits.test), digits.test_labels) - before)
    assert sum(changes) / len(changes) > -0.01, changes
