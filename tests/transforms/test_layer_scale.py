"""Factors by channel behind a layer become part of it: one rounding where there were three."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.search import small_config
from helpers.state import everything
from torch import Tensor, nn

import cptv_ao
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.backends.open import open_backend
from cptv_ao.core.batches import Batch
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import unquantized
from cptv_ao.transforms.equalize import equalize, replaceable
from cptv_ao.transforms.lowered_patterns import Patterns


def opened(found: Case) -> Any:
    backend = open_backend(found.converted, found.float_model, cptv_ao.RefineConfig())
    attach_float_weights(backend, found.float_model)
    return backend


@torch.no_grad()
def in_float(found: Case) -> Tensor:
    value = unquantized(opened(found))(found.batches[0])
    return value.dequantize() if isinstance(value, QTensor) else value


@torch.no_grad()
def error(found: Case) -> float:
    return float(torch.cat([found.converted(b) - found.float_model(b) for b in found.batches]).square().mean())


class Scaled(nn.Module):
    """Two residual branches with layer scales: of a convolution (C, 1, 1), and of a linear layer (C,)."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.drop, self.head, self.twice = nn.Dropout(0.1), nn.Linear(8, 5), twice
        spread = torch.logspace(-2.5, 0.5, 8)
        self.gamma1 = nn.Parameter((spread * torch.tensor([1.0, -1.0] * 4)).reshape(8, 1, 1))
        self.gamma2 = nn.Parameter(spread.flip(0).index_fill(0, torch.tensor([3]), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * self.gamma1
        x = x.mean((2, 3))
        y = self.drop(self.fc2(torch.relu(self.fc1(x)))) * self.gamma2
        out: Tensor = self.head(x * self.gamma2 + y if self.twice else x + y)
        return out


def case(**settings: Any) -> Case:
    model = nets.seeded(lambda: Scaled(**settings))
    batches = list(nets.images(24, 3, 8, 8).split(6))
    prepared, converted = nets.quantize(model, batches)
    return Case(model, prepared, converted, batches)


@pytest.fixture(scope="module")
def _scaled() -> Case:
    return case()


@pytest.fixture
def scaled(_scaled: Case) -> Case:
    return _scaled.copy()


def folded(found: Case) -> list[str]:
    batch = Batch((found.batches[0],), {}, 6)
    return [note for note in equalize(opened(found), [batch]) if "folded into the layers before" in note]


def test_the_function_stays_and_roundings_go(scaled: Case) -> None:
    before, wanted = error(scaled), in_float(scaled)
    float_model = everything(scaled.float_model)
    assert folded(scaled) == ["2 layer scales folded into the layers before them"]
    assert torch.allclose(in_float(scaled), wanted, atol=1e-3)
    assert error(scaled) < before
    assert everything(scaled.float_model) == float_model
    for path in ("gamma1", "gamma2"):
        assert bool((getattr(scaled.converted, path) == 1).all())


def test_the_product_changes_no_code(scaled: Case) -> None:
    folded(scaled)
    model, image = scaled.converted, scaled.batches[0]
    values: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Watch(model).run(image)
    products = [n for n in model.graph.nodes if n.target is torch.ops.quantized.mul]
    assert len(products) == 2
    for node in products:
        given = values[node.args[0].name]
        assert torch.equal(given.int_repr(), values[node.name].int_repr())
        assert len(given.int_repr().unique()) > 10


def test_factors_of_one_change_no_code_either() -> None:
    """As a recipe leaves them in a float model that it rotates."""

    def ones() -> Scaled:
        model = Scaled()
        for gamma in (model.gamma1, model.gamma2):
            nn.init.ones_(gamma)
        return model

    model, batches = nets.seeded(ones), list(nets.images(24, 3, 8, 8).split(6))
    found = Case(model, *nets.quantize(model, batches), batches)
    before = error(found)
    assert folded(found) == ["2 layer scales folded into the layers before them"]
    assert error(found) <= before
    assert folded(found) == []
    test_the_product_changes_no_code(found)


def test_a_search_moves_both_sides_as_one_and_leaves_the_ones(scaled: Case) -> None:
    places = Patterns(opened(scaled)).scaled_layers()
    config = small_config(gradient_steps=20, population=("curvature", "output_error"))
    cptv_ao.refine(scaled.converted, scaled.batches, float_model=scaled.float_model, config=config, progress=False)
    report = cptv_ao.report(scaled.converted)
    assert "2 layer scales folded into the layers before them" in report.notes
    assert report.after.search < report.before.search
    backend = opened(scaled)
    for place in places:
        assert float(backend.read(place.factors).scale) == 1 / 64
        assert torch.equal(backend.read(place.output).scale, backend.read(place.product).scale)


def test_a_state_from_before_brings_all_back(scaled: Case) -> None:
    backend = opened(scaled)
    given, before = everything(scaled.converted), backend.snapshot()
    sites = list(backend.sites.values())
    equalize(backend, [Batch((scaled.batches[0],), {}, 6)])
    assert list(backend.sites.values()) != sites
    backend.restore_all(before)
    assert everything(scaled.converted) == given
    assert list(backend.sites.values()) == sites


def test_what_was_refined_is_saved_loaded_and_refined_again(scaled: Case, tmp_path: Path) -> None:
    fresh = scaled.copy()
    arguments: dict[str, Any] = {"float_model": scaled.float_model, "config": small_config(), "progress": False}
    cptv_ao.refine(scaled.converted, scaled.batches, **arguments)
    assert set(replaceable(opened(scaled))) >= {"gamma1", "gamma2"}
    cptv_ao.save_scales(scaled.converted, tmp_path / "scales")
    cptv_ao.load_scales(fresh.converted, tmp_path / "scales")
    image = scaled.batches[1]
    assert torch.equal(fresh.converted(image), scaled.converted(image))
    again = cptv_ao.refine(fresh.converted, fresh.batches, **arguments)
    report = cptv_ao.report(again)
    assert not any("layer scales" in note for note in report.notes), "they are ones already"
    assert report.after.search <= report.before.search


def test_factors_that_others_read_too_stay() -> None:
    shared = case(twice=True)
    given = copy.deepcopy(shared.converted.gamma2)
    notes = folded(shared)
    assert notes == ["1 layer scale folded into the layers before them"]
    assert torch.equal(shared.converted.gamma2, given)
