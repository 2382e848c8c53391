"""QNNPACK keeps the first output scale and the first padding that an op saw: what is scored must be what ships."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.qparams import QParams


class Padded(nn.Module):
    """Padded convolutions, one of them behind a pooling, one functional, one that pads nothing, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.bias = nn.Parameter(torch.randn(8) / 9)
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.pool(self.first(x).relu()))
        x = self.last(nn.functional.conv2d(x, self.weight, self.bias, (1, 1), (1, 1), (1, 1), 1))
        return self.head(x.mean((2, 3)))


BATCHES = list(nets.images(16, 3, 12, 12).split(4))


@pytest.fixture(params=["qnnpack", "x86"])
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, GraphModule]:
    """The float model and the quantized one, which has run already."""
    if request.param not in torch.backends.quantized.supported_engines:
        pytest.skip(f"no {request.param} here")
    torch.backends.quantized.engine = request.param
    model = nets.seeded(Padded)
    _, quantized = nets.quantize(model, BATCHES, weight_bits=4, per_tensor=True, engine=request.param)
    quantized(BATCHES[0])
    return model, quantized


def as_shipped(model: GraphModule) -> Tensor:
    """What another process gets: freshly packed weights."""
    return copy.deepcopy(model)(BATCHES[0])


@pytest.mark.parametrize("what", ["first.scale", "first_input_zero_point_0"])
def test_torch_still_does_it(what: str) -> None:
    """If this fails, QNNPACK was repaired, and `PackedWeightSlot.renew` can go."""
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("no qnnpack here")
    torch.backends.quantized.engine = "qnnpack"
    _, quantized = nets.quantize(nets.seeded(Padded), BATCHES, weight_bits=4, per_tensor=True, engine="qnnpack")
    quantized(BATCHES[0])
    if what == "first.scale":
        quantized.first.scale *= 2
    else:
        quantized.first_input_zero_point_0 += 9
    assert not torch.equal(quantized(BATCHES[0]), as_shipped(quantized))


@pytest.mark.parametrize(("factor", "step"), [(1.0, 9), (1.7, 0), (0.6, -7)])
def test_what_moves_is_seen(models: tuple[nn.Module, GraphModule], factor: float, step: int) -> None:
    _, quantized = models
    given = quantized(BATCHES[0])
    backend = Backend(quantized)
    states = backend.snapshot()
    for name, site in backend.sites.items():
        if not site.affine:
            continue
        now = backend.read(name)
        backend.write(name, QParams((now.scale * factor).float().double(), (now.zero_point + step).clamp(0, 255)))
        for count in (1, 4):  # a larger batch than any before has a buffer of its own
            images = BATCHES[0][:count]
            assert torch.equal(quantized(images), copy.deepcopy(quantized)(images)), name
        backend.restore(name, states[name])
        assert torch.equal(quantized(BATCHES[0]), given), name
    weights = [name for name, site in backend.sites.items() if site.kind == "weight"]
    assert all(backend.state(name).stored.slot is states[name].stored.slot for name in weights)


def test_what_refine_leaves_is_what_ships(models: tuple[nn.Module, GraphModule]) -> None:
    model, quantized = models
    config = small_config(
        evaluations=6, gradient_steps=8, population=("output_error", "ranges", "biases"), holdout=0.25
    )
    cptv_ao.refine(quantized, BATCHES, float_model=model, config=config, progress=False)
    report = cptv_ao.report(quantized)
    assert any(move.zero_point for move in report.moves)
    assert torch.equal(quantized(BATCHES[0]), as_shipped(quantized))
    again = copy.deepcopy(quantized)
    cptv_ao.refine(again, BATCHES, float_model=model, config=small_config(evaluations=1), progress=False)
    assert cptv_ao.report(again).before == report.after
