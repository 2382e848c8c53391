"""One small network in each form of quantized graph."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx import GraphModule

import cptv_ao
from helpers import nets, pt2e
from helpers.search import small_config

BATCHES = list(nets.images(24, 3, 8, 8).split(6))


class Injected(Exception):
    """Raised by the tests."""


class Small(nn.Module):
    """A convolution, a norm and linear layers, two of which share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        x = x + self.one(self.norm(x))
        return self.head(self.two(x).relu())


def fx(model: nn.Module, convert: Any) -> tuple[GraphModule, list[nn.Module]]:
    """The converted model, and what else the user holds. The float model is quantized as it is, not a copy."""
    prepared = prepare_fx(model, nets.mapping(3), (BATCHES[0],))
    for batch in BATCHES:
        prepared(3 * batch)  # ranges that are too wide: there is something to find
    return convert(prepared), [prepared]


def lowered(model: nn.Module) -> tuple[GraphModule, list[nn.Module]]:
    return fx(model, convert_fx)


def referred(model: nn.Module) -> tuple[GraphModule, list[nn.Module]]:
    return fx(model, convert_to_reference_fx)


def exported(model: nn.Module, fold: bool = True) -> tuple[GraphModule, list[nn.Module]]:
    torchao = pt2e.torchao()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    program = torch.export.export(model, (BATCHES[0],), dynamic_shapes=dynamic)
    prepared = torchao.prepare_pt2e(program.module(), pt2e.xnnpack())
    for batch in BATCHES:
        prepared(3 * batch)
    return torchao.convert_pt2e(prepared, fold_quantize=fold), [program.module(), prepared]


def not_folded(model: nn.Module) -> tuple[GraphModule, list[nn.Module]]:
    return exported(model, fold=False)


FORMS = [lowered, referred, exported, not_folded]


def made(form: Any, mode: Any = torch.no_grad) -> tuple[nn.Module, GraphModule, list[nn.Module]]:
    model = nets.seeded(Small)
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "x86"
        return model, *form(model)


def refine(model: GraphModule, float_model: nn.Module | None, **changes: Any) -> cptv_ao.Report:
    settings = {
        "evaluations": 4,
        "gradient_steps": 20,
        "population": ("ranges",),
        "loss": "mse",
        "holdout": 0,
    } | changes
    callback = settings.pop("callback", None)
    config = small_config(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cptv_ao.CptvWarning)
        cptv_ao.refine(model, BATCHES, float_model=float_model, config=config, callback=callback, progress=False)
    return cptv_ao.report(model)
