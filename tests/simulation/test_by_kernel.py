"""What the twin has no arithmetic for: recurrent layers, embeddings, dynamic quantization. Their own kernels compute
it, and the gradient of a float form passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantizable as nnqa
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from helpers import nets
from helpers.op_nets import ENGINES
from helpers.quick import some
from helpers.search import small_config
from torch import Tensor, nn
from torch.ao.quantization import (
    default_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import QParams
from cptv_ao.simulation.twin import Twin, unquantized

WIDTH = 6
TOKENS = 20


class Between(nn.Module):
    """A layer between two quantized ones."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(width, 5)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.call(self.layer, self.before(x)))


class Looked(nn.Module):
    """A layer of tokens in front of quantized ones."""

    def __init__(self, layer: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.layer, self.hidden, self.after, self.pooled = layer, nn.Linear(8, 8), nn.Linear(8, 5), pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.hidden(self.layer(x)).relu())
        return y if self.pooled else y.mean(1)


def sequence(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0].mean(1)


def of_states(layer: nn.Module, x: Tensor) -> Tensor:
    state = x[:, :1].transpose(0, 1)
    return layer(x, (state, state))[0].mean(1)


def cell(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x[:, 0])


def lstm_cell(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x[:, 0])[0]


DYNAMIC: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "LSTM": (lambda: Between(nn.LSTM(WIDTH, 8, batch_first=True), sequence, 8), nnqd.LSTM),
    "LSTM of two layers and directions": (
        lambda: Between(nn.LSTM(WIDTH, 8, 2, batch_first=True, bidirectional=True), sequence, 16),
        nnqd.LSTM,
    ),
    "GRU": (lambda: Between(nn.GRU(WIDTH, 8, batch_first=True, bidirectional=True), sequence, 16), nnqd.GRU),
    "LSTMCell": (lambda: Between(nn.LSTMCell(WIDTH, 8), lstm_cell, 8), nnqd.LSTMCell),
    "GRUCell": (lambda: Between(nn.GRUCell(WIDTH, 8), cell, 8), nnqd.GRUCell),
    "RNNCell": (lambda: Between(nn.RNNCell(WIDTH, 8, nonlinearity="relu"), cell, 8), nnqd.RNNCell),
    "Linear": (lambda: Between(nn.Linear(WIDTH, 8), cell, 8), nnqd.Linear),
}
LOOKED: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "Embedding": (lambda: Looked(nn.Embedding(TOKENS, 8), pooled=False), nnq.Embedding),
    "EmbeddingBag": (lambda: Looked(nn.EmbeddingBag(TOKENS, 8, mode="sum"), pooled=True), nnq.EmbeddingBag),
}


def quantized(name: str, engine: str) -> tuple[nn.Module, GraphModule, list[Tensor]]:
    torch.backends.quantized.engine = engine
    make, kind = {**DYNAMIC, **LOOKED}[name]
    model = nets.seeded(make)
    generator = torch.Generator().manual_seed(1)
    if name in LOOKED:
        batches = [torch.randint(0, TOKENS, (8, 4), generator=generator) for _ in range(4)]
        qconfig: Any = float_qparams_weight_only_qconfig
    else:
        batches = [2 * torch.randn(8, 5, WIDTH, generator=generator) for _ in range(4)]
        qconfig = default_dynamic_qconfig
    mapping = nets.mapping().set_module_name("layer", qconfig)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
        for batch in batches:
            prepared(batch)
        converted = convert_fx(prepared)
    assert type(converted.get_submodule("layer")) is kind
    return model, converted, batches


@pytest.mark.parametrize(("name", "engine"), [(n, e) for e in ENGINES for n in (*DYNAMIC, *LOOKED)])
def test_the_twin_has_what_the_kernels_have(name: str, engine: str) -> None:
    _, converted, batches = quantized(name, engine)
    twin = Twin(Backend(converted)).checked(Batch((batches[0],), {}, 8))
    with torch.no_grad():
        wanted, got = converted(batches[0]), twin(batches[0])
    step: Any = getattr(converted.get_submodule("after"), "scale", 1e-5)
    assert float(((got - wanted).abs() / step).max()) < 1.01
    assert float((got != wanted).float().mean()) < 0.02
    assert twin.notes == []


@pytest.mark.parametrize("name", DYNAMIC)
def test_its_gradient_is_that_of_the_float_form(name: str) -> None:
    """Nearly that of the network in float."""
    _, converted, batches = quantized(name, "x86")
    twin, whole = Twin(Backend(converted)).checked(Batch((batches[0],), {}, 8)), unquantized(Backend(converted))
    gradients = []
    for one in (twin, whole):
        given = batches[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(given).square().sum(), given)
        gradients.append(gradient.flatten())
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.9


@pytest.mark.filterwarnings("ignore:not understood, left alone. after .reference Linear:cptv_ao.CptvWarning")
@pytest.mark.parametrize("name", some(*[*DYNAMIC, *LOOKED][::4], others=[*DYNAMIC, *LOOKED]))
def test_all_others_are_proposed_for(name: str) -> None:
    """A scale beside it that is sixteen times what it should be is found back."""
    model, converted, batches = quantized(name, "x86")
    backend = Backend(converted)
    lead = next(name for name, group in backend.movable().items() if group[0].kind == "activation")
    given = backend.read(lead)
    backend.write(lead, QParams(given.scale * 16, given.zero_point))
    config = small_config(gradient_steps=40, passes=0, loss="mse")
    cptv_ao.refine(converted, batches, float_model=model, config=config, progress=False)
    report = cptv_ao.report(converted)
    assert report.after.search < 0.5 * report.before.search
    assert not [note for note in report.notes if "gradient" in note or "twin" in note]


def test_static_lstm() -> None:
    """Quantized as a whole, in a module that nobody looks into."""
    torch.backends.quantized.engine = "x86"
    model = nets.seeded(lambda: Between(nn.LSTM(WIDTH, WIDTH, batch_first=True), of_states, WIDTH))
    generator = torch.Generator().manual_seed(1)
    batches = [2 * torch.randn(8, 5, WIDTH, generator=generator) for _ in range(4)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(
            copy.deepcopy(model),
            get_default_qconfig_mapping("x86"),
            (batches[0],),
            prepare_custom_config=PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, nnqa.LSTM),
        )
        for batch in batches:
            prepared(batch)
        custom = ConvertCustomConfig().set_observed_to_quantized_mapping(nnqa.LSTM, nnq.LSTM)
        converted = convert_fx(prepared, convert_custom_config=custom)
    assert type(converted.get_submodule("layer")) is nnq.LSTM
    twin = Twin(Backend(converted)).checked(Batch((batches[0],), {}, 8))
    with torch.no_grad():
        assert torch.equal(twin(batches[0]), converted(batches[0]))
    assert twin.notes == [], "its float form has a gradient"
    given = batches[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(twin(given).square().sum(), given)
    assert float(gradient.abs().max()) > 0
