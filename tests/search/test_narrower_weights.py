"""Activations on whole containers where kernels saturate on them, with weights of fewer codes."""

from __future__ import annotations

import pytest
import torch
import workloads
from helpers.search import small_config
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.qparams import rescaled
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.narrower_weights import narrower_weights
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.simulation.saturation import saturating_inputs
from cptv_ao.simulation.twin import Twin

NAME = "whole range, weights of fewer codes where kernels saturate"


def depthwise(seed: int = 0) -> nn.Module:
    """FBGEMM's depthwise kernels saturate on every machine; all weights are positive, so that products add up."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.abs_()
        model[1].weight.abs_().add_(0.1)
    return model


def case(reduce_range: bool, seed: int = 0) -> tuple[nn.Module, GraphModule, Tensor]:
    model, images = depthwise(seed), torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    _, converted = workloads.quantize(model, [images], reduce_range=reduce_range, engine="fbgemm")
    return model, converted, images


def opened(model: nn.Module, converted: GraphModule) -> Backend:
    backend = Backend(converted)
    attach_float_weights(backend, model)
    return backend


@torch.no_grad()
@pytest.mark.parametrize("reduce_range", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_no_kernel_saturates_on_whole_containers_then(reduce_range: bool, seed: int) -> None:
    model, converted, images = case(reduce_range, seed)
    backend, batch = opened(model, converted), Batch((images,), {}, 16)
    before = backend.read("0.output")
    found = narrower_weights(Twin(backend), backend.movable(), ["0.output"], backend.read, batch)
    assert found.keys() == {"0.output"} and found["0.output"].keys() == {"0.output", "1.weight"}
    factor = float(found["0.output"]["0.output"].scale / before.scale)
    assert factor == pytest.approx(127 / 255 if reduce_range else 1.0)
    backend.write("0.output", rescaled(before, factor, backend.sites["0.output"]))
    assert "0.output" in saturating_inputs(converted, _twin(backend), batch), "so it would without them"
    for name, qparams in found["0.output"].items():
        backend.write(name, qparams)
    assert saturating_inputs(converted, _twin(backend), batch) == {}
    assert int(converted.get_submodule("0")(images_of(converted, images)).int_repr().max()) > 200
    codes = backend.weight("1.weight").int_repr().flatten(1).int().abs()
    assert int(codes.topk(2).values.sum(1).max()) <= 128 and int(codes.max()) > 60


@torch.no_grad()
def test_rows_with_one_large_weight_lose_nothing() -> None:
    model, images = depthwise(), torch.rand(16, 3, 8, 8)
    assert isinstance(model[1].weight, Tensor)
    model[1].weight[0] = torch.tensor([1.0, *[1e-4] * 8]).reshape(1, 3, 3)
    _, converted = workloads.quantize(model, [images], engine="fbgemm")
    backend, batch = opened(model, converted), Batch((images,), {}, 16)
    found = narrower_weights(Twin(backend), backend.movable(), ["0.output"], backend.read, batch)
    factors = found["0.output"]["1.weight"].scale / backend.read("1.weight").scale
    assert float(factors[0]) == pytest.approx(1.0, abs=0.02) and float(factors[1:].min()) > 1.2


@torch.no_grad()
def test_activations_whose_readers_may_not_move_stay_as_they_are() -> None:
    model, converted, images = case(True)
    backend, batch = opened(model, converted), Batch((images,), {}, 16)
    groups = {lead: group for lead, group in backend.movable().items() if lead != "1.weight"}
    assert narrower_weights(Twin(backend), groups, ["0.output"], backend.read, batch) == {}
    without = Backend(converted)  # whose codes would be rounded twice
    assert narrower_weights(Twin(without), without.movable(), ["0.output"], without.read, batch) == {}


@torch.no_grad()
@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_limits_are_lifted_where_it_is_accepted_and_only_there(accepted: bool, reduce_range: bool) -> None:
    model, converted, images = case(reduce_range)
    backend = opened(model, converted)
    search = Images.of([Batch((images,), {}, 16)], model, RefineConfig())
    config = small_config(population=("ranges",), gradient_steps=0)
    proposer = Proposer(backend, backend, backend.movable(), Calibration(config, search), Budget())
    names = []

    def limit() -> int:
        return proposer._searched.twin.sites.modules["0.output"].site.qmax

    for name, scales in proposer.proposals(lambda loss: None, lambda worth: None):
        names.append(name)
        assert limit() == 127
        if name == NAME:
            proposed = scales()
            assert limit() == 255, "what is proposed runs on the twin as it is"
            factor = float(proposed["0.output"].scale / backend.read("0.output").scale)
            assert factor == pytest.approx(127 / 255 if reduce_range else 1.0)
            for own, qparams in proposed.items() if accepted else ():
                backend.write(own, qparams)
    assert names[-1] == NAME and limit() == (255 if accepted or not reduce_range else 127)
    if not accepted:
        proposer._searched.follow()
        followed, wanted = proposer._searched.twin(images), model(images)
        apart = float((followed - wanted).abs().mean() / wanted.abs().mean())
        assert apart < 0.02, "what is proposed next is for the network that is there, not for one that is clipped"


@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_find_it_better_behind_a_depthwise_first_layer(seed: int) -> None:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 36, 10))
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), *head
    ).eval()
    with torch.no_grad():
        model[0].weight.abs_().add_(0.5)
    images = torch.rand(64, 8, 8, 8)
    _, converted = workloads.quantize(model, [images], engine="fbgemm")
    config = small_config(population=("ranges", "biases"), gradient_steps=0, passes=0, loss="mse")
    batches = list(images.split(16))
    cptv_ao.refine(converted, batches, float_model=model, config=config, progress=False)
    told = [line for line in str(cptv_ao.report(converted)).splitlines() if line.startswith(NAME)]
    assert any("not better" not in line for line in told), told
    assert saturating_inputs(converted, _twin(Backend(converted)), Batch((images,), {}, 64)) == {}


def _twin(backend: Backend) -> Twin:
    twin = Twin(backend)
    twin.reround_weights(False)
    return twin


def images_of(converted: GraphModule, images: Tensor) -> Tensor:
    """As the first layer is given them."""
    scale, zero_point = (getattr(converted, f"0_input_{name}_0") for name in ("scale", "zero_point"))
    return torch.quantize_per_tensor(images, float(scale), int(zero_point), torch.quint8)
