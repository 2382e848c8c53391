"""A float model that is not the one that was quantized, though its weights are, or that says nothing of the images: it
is told wherever it teaches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.cases import Case
from helpers.search import small_config
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao

TOLD = "float_model computes something else than the network that was quantized"
CONFIG = small_config(evaluations=2, gradient_steps=2)


class Normed(nn.Module):
    """A batch norm that fuses, one that does not, a group norm, and layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.later, self.group, self.head = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return self.head(self.group(self.later(x)).mean((2, 3)))


BATCHES = list(nets.images(24, 3, 8, 8).split(6))
CHANGES: dict[str, Callable[[Any], Any]] = {
    "bias": lambda m: m.head.bias.add_(1),
    "bias before a norm": lambda m: m.conv.bias.add_(1),
    "mean": lambda m: m.bn.running_mean.add_(1),
    "norm": lambda m: m.group.weight.mul_(3),
    "later norm": lambda m: m.later.weight[:4].mul_(3),
}


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return nets.seeded(Normed)


@pytest.fixture(params=["lowered", "PT2E"])
def model(request: pytest.FixtureRequest, float_model: nn.Module) -> GraphModule:
    if request.param == "PT2E":
        pt2e.torchao()
        return pt2e.converted(float_model, pt2e.x86(), True, BATCHES)
    return nets.quantize(copy.deepcopy(float_model), BATCHES)[1]


def told(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, progress=False, **kwargs)
    return [str(w.message) for w in caught if issubclass(w.category, cptv_ao.CptvWarning) and w.filename == __file__]


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_beside_weights_is_told(model: GraphModule, float_model: nn.Module, change: str) -> None:
    other = copy.deepcopy(float_model)
    with torch.no_grad():
        CHANGES[change](other)
    (warned,) = told(cptv_ao.refine, model, BATCHES, float_model=other, config=CONFIG)
    assert warned.startswith(TOLD)
    assert warned in cptv_ao.report(model).notes


@pytest.mark.parametrize("call", [cptv_ao.diagnose, cptv_ao.plan])
def test_whoever_measures_tells_it_too(model: GraphModule, float_model: nn.Module, call: Callable[..., Any]) -> None:
    other = copy.deepcopy(float_model)
    with torch.no_grad():
        CHANGES["bias"](other)
    budget = {"budget": 0.2} if call is cptv_ao.plan else {}
    (warned,) = told(call, model, BATCHES, float_model=other, **budget)
    assert warned.startswith(TOLD)
    assert told(call, model, BATCHES, float_model=float_model, **budget) == []


def test_the_right_one_is_told_nothing_whatever_was_refined_before(model: GraphModule, float_model: nn.Module) -> None:
    for _ in range(3):
        assert told(cptv_ao.refine, model, BATCHES, float_model=float_model, config=CONFIG) == []


def test_nor_of_two_bits(vit_w2: Case) -> None:
    assert told(cptv_ao.refine, vit_w2.converted, vit_w2.batches, float_model=vit_w2.float_model, config=CONFIG) == []


def test_biases_that_nobody_knows_are_those_of_an_earlier_refine(vit_w2: Case) -> None:
    fresh = vit_w2.copy().converted
    config = small_config(population=("biases",), gradient_steps=0, passes=0)
    assert not told(cptv_ao.refine, vit_w2.converted, vit_w2.batches, float_model=vit_w2.float_model, config=config)
    assert any(move.corrected for move in cptv_ao.report(vit_w2.converted).moves)
    fresh.load_state_dict(vit_w2.converted.state_dict())
    (warned,) = told(cptv_ao.refine, fresh, vit_w2.batches, float_model=vit_w2.float_model, config=CONFIG)
    assert "came out of a state_dict" in warned


def test_a_float_model_that_draws_is_told(model: GraphModule, float_model: nn.Module) -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(vars(copy.deepcopy(float_model)))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(Normed.forward(self, x), 0.5, training=True)  # type: ignore[arg-type]

    (warned,) = told(cptv_ao.refine, model, BATCHES, float_model=Drawing(), config=CONFIG)
    assert warned == "float_model gives other outputs each time that it is run on the same images"


@pytest.mark.parametrize("batches", [[torch.zeros(6, 3, 8, 8)] * 3, [BATCHES[0][:1].expand(6, -1, -1, -1)] * 2])
def test_images_that_are_all_the_same(model: GraphModule, float_model: nn.Module, batches: list[Tensor]) -> None:
    (warned,) = told(cptv_ao.refine, model, batches, float_model=float_model, config=CONFIG)
    assert "the float network's output is the same for all" in warned
    assert warned in cptv_ao.report(model).notes


def test_one_image_is_no_reason_for_a_word(model: GraphModule, float_model: nn.Module) -> None:
    config = small_config(evaluations=2, gradient_steps=2, holdout=0)
    assert told(cptv_ao.refine, model, [BATCHES[0][:1]], float_model=float_model, config=config) == []
