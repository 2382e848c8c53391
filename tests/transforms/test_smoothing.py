"""Outliers of norms that the recipe moves into the weights behind them, at no change of the function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.search import small_config
from torch import Tensor, nn

import cptv_ao
from cptv_ao.core.losses import kl


class Norms(nn.Module):
    """A norm that three linear layers read, and others that something else reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.added_to = nn.LayerNorm(8)
        self.after = nn.Linear(8, 8)
        self.twice = nn.LayerNorm(8)
        self.shared = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = self.q(y) * self.k(y).sigmoid() + self.v(y)
        y = self.added_to(x)
        x = self.after(y) + y
        return self.shared(self.twice(x)) + self.shared(x)


def with_outlier(seed: int = 0) -> Norms:
    """Channel 2 of each norm is 50 times larger, and what reads it as much smaller where that is one norm's own."""
    torch.manual_seed(seed)
    model = Norms().eval()
    with torch.no_grad():
        for norm in (model.norm, model.added_to, model.twice):
            norm.bias.normal_(0, 0.1)
            norm.weight[2] *= 50
            norm.bias[2] *= 50
        for layer in (model.q, model.k, model.v, model.after):
            layer.weight[:, 2] /= 50
    return model


def test_only_what_linear_layers_alone_read_is_smoothed() -> None:
    model = with_outlier()
    state = copy.deepcopy(model.state_dict())
    example = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(example)
    ready = cptv_ao.recipe(model, (example,))
    found = ready.model.state_dict()
    changed = {name for name in state if not torch.equal(state[name], found[name])}
    assert changed == {"norm.weight", "norm.bias", "q.weight", "k.weight", "v.weight"}
    for name in changed:
        still = [c for c in range(8) if c != 2]
        assert torch.equal(state[name][..., still], found[name][..., still])
    assert float(found["norm.weight"][2]) < 8
    with torch.no_grad():
        torch.testing.assert_close(ready.model(example), expected, rtol=1e-4, atol=1e-3)
    assert "1 outlier channels" in str(ready)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the given model changed"


def test_a_column_never_becomes_the_largest_of_its_layer() -> None:
    """Its weights would take the codes that the activations were given."""
    model = with_outlier()
    with torch.no_grad():
        model.k.weight[:, 2] *= 5
    before = max(float(layer.weight.abs().max()) for layer in (model.q, model.k, model.v))
    ready = cptv_ao.recipe(model, (torch.randn(16, 5, 8),)).model
    layers: list[Any] = [ready.get_submodule(name) for name in "qkv"]
    assert max(float(layer.weight.abs().max()) for layer in layers) <= before * (1 + 1e-6)
    weights: list[Any] = [ready.get_submodule("norm").weight, model.norm.weight]
    assert 1 < float(weights[1][2] / weights[0][2]) < 50


def test_a_network_without_outliers_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = Norms().eval()
    ready = cptv_ao.recipe(model, (torch.randn(16, 5, 8),))
    assert ready.notes == ()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ready.model.state_dict().items())


@pytest.mark.slow
def test_an_outlier_vit_is_quantized_as_well_as_one_without(vit: nn.Module, digits: Any) -> None:
    from workloads import logits, quantize, with_outliers

    images = digits.calibration(400, seed=0)
    model = with_outliers(vit)
    ready = cptv_ao.recipe(model, (images[:50],))
    assert f"{3 * 2 * 4} outlier channels" in str(ready)

    def loss(network: nn.Module) -> float:
        _, converted = quantize(copy.deepcopy(network), images[:200].split(50))
        return float(kl(logits(converted, images[200:]), logits(vit, images[200:])))

    stock = loss(model)
    assert loss(ready.model) < min(0.05 * stock, 2 * loss(vit))
    _, converted = quantize(copy.deepcopy(ready.model), images[:200].split(50))
    cptv_ao.refine(converted, images[:100].split(50), float_model=model, config=small_config(), progress=False)
    with pytest.raises(cptv_ao.FloatModelMismatchError):
        cptv_ao.refine(converted, [images[:50]], float_model=torch.nn.Sequential(vit), progress=False)
