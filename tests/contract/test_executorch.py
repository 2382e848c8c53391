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
from helpers.shipping import BATCHES, UNSEEN, Tokens, mse, settings
from torch import nn
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
    assert mse(after, graph, UNSEEN) < mse(graph, float_model, UNSEEN), "kernels add less than quantization"
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
    ran = runner(tmp_path / "refined.pte")
    assert mse(ran, made[0], UNSEEN) < mse(made[0], float_model, UNSEEN)
