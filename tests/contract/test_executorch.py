"""The road to ExecuTorch: quantize with its XNNPACKQuantizer, refine, lower, write a .pte, run it from Python.

Its kernels are not the graph: XNNPACK adds and multiplies codes with its own roundings, so outputs agree up to steps.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.attention import DIM, Attending
from helpers.search import small_config
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.simulation.twin import Twin

pytest.importorskip("executorch.runtime", reason="pip install 'cptv_ao[executorch]'")
torchao = pt2e.torchao()
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.backends.xnnpack.recipes.xnnpack_recipe_types import XNNPackRecipeType
from executorch.exir import to_edge_transform_and_lower
from executorch.export import ExportRecipe, export
from executorch.runtime import Runtime

BATCHES = list(nets.images(64, 3, 8, 8).split(16))
UNSEEN = nets.images(64, 3, 8, 8, seed=1).split(16)


class Tokens(Attending):
    """A ViT of one block with a class token and a position embedding, in front of channels that lie apart."""

    def __init__(self) -> None:
        super().__init__("one layer")
        self.token, self.position = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, 17, DIM))
        with torch.no_grad():
            self.norm1.bias += torch.arange(DIM) * 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.proj(self.attend(self.norm1(x)))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


def exported(model: nn.Module) -> Any:
    """For batches of 16, as what runs on a device is."""
    return torch.export.export(model, (BATCHES[0],))


def lowered(graph: GraphModule) -> bytes:
    program = to_edge_transform_and_lower(exported(graph), partitioner=[XnnpackPartitioner()])
    return bytes(program.to_executorch().buffer)


def runner(program: Any) -> Any:
    """What runs a .pte: its bytes or its path."""
    loaded = Runtime.get().load_program(program)  # must outlive its methods
    return lambda images: loaded.load_method("forward").execute([images])[0]


def outputs(model: Any, batches: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def mse(model: Any, teacher: nn.Module, batches: Any) -> float:
    return float((outputs(model, batches) - outputs(teacher, batches)).square().mean())


def settings(**changes: Any) -> cptv_ao.RefineConfig:
    wanted: dict[str, Any] = {"evaluations": 4, "gradient_steps": 60, "loss": "mse", "holdout": 0.25}
    return small_config(**(wanted | {"population": ("curvature",)} | changes))


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return nets.seeded(Tokens)


@pytest.fixture(scope="module")
def converted(float_model: nn.Module) -> GraphModule:
    config = get_symmetric_quantization_config(is_per_channel=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = torchao.prepare_pt2e(exported(float_model).module(), XNNPACKQuantizer().set_global(config))
        for batch in BATCHES:
            prepared(batch)
        graph: GraphModule = torchao.convert_pt2e(prepared)
        return graph


@pytest.fixture
def graph(converted: GraphModule) -> GraphModule:
    return copy.deepcopy(converted)


def test_the_constants_of_a_vit_are_sites(graph: GraphModule) -> None:
    sites = cptv_ao.find_sites(graph)
    assert sorted(site.op for name, site in sites.items() if "constant" in name) == ["add", "cat"]
    assert sites.unknown == ()
    with torch.no_grad():
        assert torch.equal(Twin(Backend(graph))(BATCHES[0]), graph(BATCHES[0]))


def test_the_whole_road(graph: GraphModule, float_model: nn.Module, tmp_path: Path) -> None:
    before = runner(lowered(graph))
    cptv_ao.refine(graph, BATCHES, float_model=float_model, config=settings(), progress=False)
    report = cptv_ao.report(graph)
    assert report.after.search < 0.9 * report.before.search
    assert not any("does not hold" in note for note in report.notes if note.startswith("constants"))
    path = tmp_path / "refined.pte"
    path.write_bytes(lowered(graph))
    after = runner(path)
    error = outputs(graph, UNSEEN) - outputs(float_model, UNSEEN)
    apart = outputs(after, UNSEEN) - outputs(graph, UNSEEN)
    assert float(apart.square().mean()) < float(error.square().mean()), "kernels add less than quantization"
    assert mse(after, float_model, BATCHES) < 0.9 * mse(before, float_model, BATCHES)


def test_what_the_runner_gives_is_accepted(graph: GraphModule, float_model: nn.Module) -> None:
    given = copy.deepcopy(graph)
    config = settings(accept_on=lambda model: runner(lowered(model)), holdout=0)
    cptv_ao.refine(graph, BATCHES, float_model=float_model, config=config, progress=False)
    report = cptv_ao.report(graph)
    for model, losses in ((given, report.before), (graph, report.after)):
        assert mse(runner(lowered(model)), float_model, BATCHES) == pytest.approx(losses.search, rel=1e-5)
    assert report.after.search < report.before.search


def test_a_recipe_refines_by_its_own_hook(float_model: nn.Module, tmp_path: Path) -> None:
    recipe = ExportRecipe.get_recipe(XNNPackRecipeType.PT2E_INT8_STATIC_PER_CHANNEL)
    made: list[GraphModule] = []

    def refined(graph: GraphModule) -> GraphModule:
        made.append(graph)
        return cptv_ao.refine(graph, BATCHES, float_model=float_model, config=settings(), progress=False)

    recipe.quantization_recipe.post_convert_passes = [refined]
    recipe.quantization_recipe.calibration_inputs_fn = lambda: [(batch,) for batch in BATCHES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = export(copy.deepcopy(float_model), [(BATCHES[0],)], recipe)
    assert cptv_ao.report(made[0]).after.search < cptv_ao.report(made[0]).before.search
    session.save_to_pte(str(tmp_path / "refined"))
    ran = outputs(runner(tmp_path / "refined.pte"), UNSEEN)
    error = outputs(made[0], UNSEEN) - outputs(float_model, UNSEEN)
    assert float((ran - outputs(made[0], UNSEEN)).square().mean()) < float(error.square().mean())
