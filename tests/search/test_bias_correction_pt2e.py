"""Bias correction in PT2E graphs, whose biases are tensors beside the weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.state import everything
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.backends.rollback import restored_on_error
from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import rescaled
from cptv_ao.search.proposals.bias_correction import corrections
from cptv_ao.simulation.twin import Twin, unquantized

pt2e.torchao()
IMAGES = torch.cat(pt2e.BATCHES).abs()  # of which roundings of weights move the means
#: of how many steps of 8 bits one is
COARSE = 40.0


class Layers(nn.Module):
    """A layer of each kind with a bias of its own, one without, one that is called twice, two that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bare, self.twice = nn.Conv2d(3, 6, 3), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.conv(x).relu().mean((2, 3)))
        x = self.twice(self.twice(x).relu()).relu()
        return self.other(self.one(x).relu())


def coarse(float_model: nn.Module, fold: bool = True) -> GraphModule:
    """Converted with weights of few codes."""
    model = pt2e.converted(float_model, pt2e.x86(), fold)
    backend = Backend(model)
    attach_float_weights(backend, float_model)
    for name, site in backend.sites.items():
        if site.kind == "weight" and name in backend.float_weights:
            backend.write(name, rescaled(backend.read(name), COARSE, site))
    return model


def refined(model: GraphModule, float_model: nn.Module, **changes: Any) -> cptv_ao.Report:
    return pt2e.refine(model, float_model, **({"population": ("biases",), "gradient_steps": 0, "passes": 0} | changes))


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return nets.seeded(pt2e.Residual)


@pytest.mark.parametrize("fold", [True, False])
@torch.no_grad()
def test_a_layer_alone_gets_what_it_lost(fold: bool) -> None:
    layer = nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3)))
    model = coarse(layer, fold)
    backend = Backend(model)
    attach_float_weights(backend, layer)
    with restored_on_error(model, backend):
        lost = (layer(IMAGES) - model(IMAGES)).mean((0, 2, 3))
        twin = Twin(backend)
        twin.reround_weights()
        found, images = corrections(twin, ["0.weight"], [Batch((IMAGES,), {}, len(IMAGES))])
        assert images == len(IMAGES)
        assert float(lost.abs().max()) > 0.01
        assert torch.allclose(found["0.weight"], lost, atol=1e-5)
        before, given = everything(model)["state_dict"], layer[0].bias.clone()
        state = backend.state("0.weight")
        backend.write("0.weight", replace(backend.read("0.weight"), correction=found["0.weight"]))
        assert torch.allclose((layer(IMAGES) - model(IMAGES)).mean((0, 2, 3)), torch.zeros(5), atol=1e-5)
        backend.restore("0.weight", state)
        assert everything(model)["state_dict"] == before
    assert torch.equal(layer[0].bias, given)


def test_biases_that_others_read_stay() -> None:
    backend = Backend(pt2e.converted(nets.seeded(Layers), pt2e.x86(), True))
    weights = [name for name, site in backend.sites.items() if site.kind == "weight"]
    assert [name for name in weights if backend.correctable(name)] == ["conv.weight"]


def test_a_search_gains_by_them(float_model: nn.Module) -> None:
    """And gives the float model back as it was: exporting shares its tensors."""
    model, before = coarse(float_model), copy.deepcopy(float_model.state_dict())
    report = refined(model, float_model)
    assert report.stages[0].startswith("biases corrected: accepted")
    assert report.after.mean < 0.9 * report.before.mean
    assert any(move.corrected for move in report.moves)
    assert all(torch.equal(now, before[name]) for name, now in float_model.state_dict().items())


def test_files_hold_them(float_model: nn.Module, tmp_path: Path) -> None:
    model, fresh = coarse(float_model), coarse(float_model)
    assert refined(model, float_model).moves
    cptv_ao.save_scales(model, tmp_path / "refined")
    cptv_ao.load_scales(fresh, tmp_path / "refined")
    assert torch.equal(fresh(IMAGES)["logits"], model(IMAGES)["logits"])


def test_an_exception_leaves_nothing(float_model: nn.Module) -> None:
    model = coarse(float_model)
    before = everything(model)["state_dict"]

    def stop(event: cptv_ao.Event) -> None:
        if event.kind == "proposal":
            raise KeyboardInterrupt

    config = cptv_ao.RefineConfig(population=("biases",), gradient_steps=0, passes=0)
    with pytest.raises(KeyboardInterrupt):
        cptv_ao.refine(model, pt2e.BATCHES, float_model=float_model, config=config, callback=stop, progress=False)
    assert everything(model)["state_dict"] == before


@pytest.mark.parametrize("fold", [True, False])
def test_what_was_corrected_before_is_added_once(fold: bool, tmp_path: Path) -> None:
    """To the twin of a model that was refined, of a copy of it, and of one that got its scales from a file."""
    float_model = nets.seeded(Layers)
    model = coarse(float_model, fold)
    fresh, images = copy.deepcopy(model), pt2e.BATCHES[0]
    wanted = unquantized(Backend(fresh))(images)
    assert any(move.corrected for move in refined(model, float_model, output=None).moves)
    cptv_ao.save_scales(model, tmp_path / "scales")
    for one in (model, copy.deepcopy(model), cptv_ao.load_scales(fresh, tmp_path / "scales")):
        backend = Backend(one)
        assert any(backend.read(name).correction is not None for name in backend.sites)
        assert torch.equal(Twin(backend)(images), one(images))
        cptv_ao.diagnose(one, pt2e.BATCHES, float_model=float_model, progress=False)  # without a warning
    if not fold:  # the graph holds the float weights
        assert torch.equal(unquantized(Backend(model))(images), wanted)


class Gated(nn.Module):
    """A layer of one vector, which no batch has, beside one of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.gate = nn.Parameter(torch.linspace(-1, 2, 6)), nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.conv(x).mean((2, 3)) + self.gate(self.vector)}


def test_a_layer_of_a_vector_gets_one_and_learns_it() -> None:
    float_model = nets.seeded(Gated)
    model = coarse(float_model)
    report = refined(model, float_model, gradient_steps=4)
    assert {move.name for move in report.moves if move.corrected} == {"conv.weight", "gate.weight"}
    assert report.after.mean < 0.9 * report.before.mean
