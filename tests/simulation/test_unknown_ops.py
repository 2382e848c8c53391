"""Networks with what the float twin does not know: kernels compute it, and all others are proposed for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from helpers import nets
from helpers.quick import each_value
from helpers.search import small_config
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.evaluation.teacher import as_float


class Cut(nnq.Linear):
    """A quantized op that nobody knows, whose output has another shape than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :6]


class Same(nnq.Linear):
    """One whose output has the shape of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone()


class Chain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(width, 5)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu())[:, : self.width])


class Solid(nn.Module):
    """Convolutions and pools of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.MaxPool3d(2)
        self.mean, self.head = nn.AdaptiveAvgPool3d(1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.norm(self.conv(x))))
        return self.head(self.mean(functional.avg_pool3d(x, 2, 1)).flatten(1))


@pytest.fixture(params=[Cut, Same])
def unknown(request: Any) -> tuple[nn.Module, GraphModule, list[Tensor], str]:
    """A network with an op that nobody knows, its quantized form, images, and how its gradient is told of."""
    model = nets.seeded(lambda: Chain(6 if request.param is Cut else 8))
    batches = list(nets.images(32, 8).split(8))
    converted = nets.quantize(model, batches, weight_bits=3)[1]
    converted.b.__class__ = request.param
    return model, converted, batches, "no gradient passes b (Cut)" if request.param is Cut else ""


def refined(model: GraphModule, batches: list[Tensor], float_model: Any, **changes: Any) -> cptv_ao.Report:
    config = small_config(gradient_steps=4, **changes)
    cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    return cptv_ao.report(model)


@pytest.mark.filterwarnings("ignore:refine without float_model:cptv_ao.CptvWarning")
@pytest.mark.filterwarnings("ignore:not understood, left alone. b :cptv_ao.CptvWarning")
@pytest.mark.parametrize(("given", "score_on"), each_value([True, False], ["kernels", "simulation"]))
def test_an_op_that_nobody_knows_costs_no_proposals(unknown: Any, given: bool, score_on: str) -> None:
    model, converted, batches, told = unknown
    report = refined(converted, batches, model if given else None, score_on=score_on)
    assert report.stages
    assert report.after.search < report.before.search or not given
    notes = [note for note in report.notes if "twin" in note or "gradient" in note]
    assert [note.startswith(told) for note in notes] == ([True] if told else [])


def test_diagnose_measures_around_an_op_that_nobody_knows(unknown: Any) -> None:
    model, converted, batches, _ = unknown
    diagnosis = cptv_ao.diagnose(converted, batches, float_model=model, progress=False)
    assert not [note for note in diagnosis.notes if "twin" in note]
    assert all(site.share is not None for site in diagnosis.sites)


@pytest.mark.filterwarnings("ignore:refine without float_model:cptv_ao.CptvWarning")
def test_a_batch_that_the_model_cannot_take_is_no_unknown_op() -> None:
    model, batches = (
        nets.seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))),
        list(nets.images(32, 8).split(8)),
    )
    _, converted = nets.quantize(model, batches)
    with pytest.raises(cptv_ao.CalibrationDataError, match="inputs of shape"):
        refined(converted, [batch[:, :7] for batch in batches], None)


@pytest.mark.filterwarnings("ignore:refine without float_model:cptv_ao.CptvWarning")
@pytest.mark.parametrize("given", [True, False])
def test_three_dimensions(given: bool) -> None:
    model, batches = nets.seeded(Solid), list(nets.images(32, 3, 4, 6, 6).split(8))
    _, converted = nets.quantize(model, batches, weight_bits=3)
    report = refined(converted, batches, model if given else None)
    assert not [note for note in report.notes if "twin" in note]
    assert report.after.search <= report.before.search


class Trainable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.norm2, self.fc, self.head = nn.BatchNorm2d(4), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return self.head(functional.relu(self.fc(x.mean((2, 3)))))


@pytest.mark.parametrize("of_a_copy", [True, False])
def test_a_model_that_was_prepared_for_qat_is_a_float_model(of_a_copy: bool) -> None:
    """Its layers are sequences with a norm inside that hold their weight themselves. convert_fx may have changed it."""
    torch.backends.quantized.engine = "x86"
    batches = list(nets.images(32, 3, 8, 8).split(8))
    trained = prepare_qat_fx(nets.seeded(Trainable).train(), get_default_qat_qconfig_mapping("x86"), (batches[0],))
    for batch in batches:
        trained(batch)
    trained.eval()
    still = copy.deepcopy(trained)
    still.apply(torch.ao.quantization.disable_observer)
    wanted = still(batches[0])
    model = convert_fx(copy.deepcopy(trained) if of_a_copy else trained)
    given = cptv_ao.find_sites(model)
    report = refined(model, batches, trained, population=("output_error",))
    assert {site.name for site in given.values() if site.kind == "weight"} == {
        f"{name}.weight" for name in ("conv1", "conv2", "fc", "head")
    }
    assert report.after.search <= report.before.search
    with torch.no_grad(), as_float(trained):
        # That network was trained with its fake quantization. Roundings on a tie may fall to the other side.
        torch.testing.assert_close(trained(batches[0]), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    with pytest.raises(cptv_ao.FloatModelMismatchError, match="or the prepared model"):
        refined(model, batches, nets.seeded(Trainable))
