"""A fused op is compared with the end of what was fused; where the float model has no such end, it is left out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from helpers.diagnosed import block, diagnosed
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn import functional

from cptv_ao.core.qparams import QParams
from cptv_ao.diagnosis.float_outputs import FloatOutputs


class Fused(nn.Module):
    """Convolutions with a norm and a relu, as modules of one container, of several, and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        )
        self.head, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return functional.relu(self.norm(self.head(x))).mean((2, 3))


class Residual(nn.Module):
    """Adds outside of its blocks: what is scaled last there is the output of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        return self.head(self.blocks[1](x).relu())


def case_of(model: nn.Module, *shape: int) -> Case:
    batches = list(nets.images(64, *shape).split(16))
    prepared, converted = nets.quantize(model, batches)
    return Case(model, prepared, nets.without_twin(converted), batches)


@pytest.fixture
def fused() -> Case:
    return case_of(nets.seeded(Fused), 3, 8, 8)


def ends(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What the fused ops compute in float, by block."""
    first = model.features[:3](x)
    second = model.features[3:](first)
    return {"features.0": first, "features.3": second, "head": functional.relu(model.norm(model.head(second)))}


@pytest.mark.parametrize("prepared", [False, True])
def test_the_end_of_a_fused_pattern(fused: Case, prepared: bool) -> None:
    wanted = ends(fused.float_model, fused.batches[0])
    model: nn.Module = fused.float_model
    if prepared:  # its modules are fused already
        model = prepare_fx(copy.deepcopy(model), nets.mapping(), (fused.batches[0],)).eval()
    names = {"features.0": "features_0", "features.3": "features_3", "head": "head"}
    found = FloatOutputs(backend_of(fused), model, names)
    assert not found.missing
    with torch.no_grad(), found.watched() as seen:
        model(fused.batches[0])
    for name, value in wanted.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_block_causes_more_than_there_is(fused: Case) -> None:
    found = diagnosed(fused)
    assert found.simulated is None and "left out" not in found.notes[-1]
    assert {b.name for b in found.blocks} == {"features.0", "features.3", "head"}
    for part in found.blocks:
        assert part.cosine is not None and part.cosine > 0.999 and part.sqnr is not None and part.sqnr > 25
        assert 0 < part.share < 1
    backend = backend_of(fused)
    now = backend.read("features.3.weight")
    backend.write("features.3.weight", QParams(now.scale * 30, now.zero_point))
    assert diagnosed(fused).blocks[0].name == "features.3"


def test_blocks_that_end_elsewhere_are_left_out_and_told() -> None:
    found = diagnosed(case_of(nets.seeded(Residual), 12))
    assert block(found, "blocks.0").node.startswith("add") and block(found, "blocks.0").sqnr is None
    assert math.isnan(block(found, "blocks.0").share)
    assert block(found, "blocks.1").sqnr > 25 and block(found, "head").sqnr > 25
    assert found.notes[-1].endswith("left out, for no module of the float model ends where they do: blocks.0")
