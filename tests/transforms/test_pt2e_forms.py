"""Equivalent forms of PT2E graphs: equal in float, narrower ranges, and taken back where something else is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import workloads
from helpers import nets
from helpers.search import small_config
from helpers.state import weights
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.simulation.twin import unquantized
from cptv_ao.transforms.equalize import equalize
from cptv_ao.transforms.pt2e_patterns import SharedInputs

pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="pip install 'cptv_ao[pt2e]'")

DIM, HEADS = 8, 2
BATCHES = tuple(nets.images(32, 3, 8, 8).split(8))


class Attending(nn.Module):
    """One block of a ViT, in the forms that attention is written in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.patch = form, nn.Conv2d(3, DIM, 2, 2)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2, self.head = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.proj(self.attend(self.norm1(x)))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))

    def attend(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        if self.form == "three layers":
            parts = [layer(x).reshape(images, tokens, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            mixed = functional.scaled_dot_product_attention(*parts)
        elif self.form == "softmax":
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (part.reshape(images, tokens, HEADS, -1).transpose(1, 2) for part in (q, k, v))
            mixed = functional.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1, training=False) @ v
        else:
            q, k, v = self.qkv(x).reshape(images, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(images, tokens, DIM)


class Gated(Attending):
    """The values are read once more, from a slice of their own."""

    def attend(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        q, k, v, gate = y[..., :DIM], y[..., DIM : 2 * DIM], y[..., 2 * DIM :], y[..., 2 * DIM :]
        return functional.scaled_dot_product_attention(q * gate.sigmoid(), k, v)


FORMS = ("fused", "softmax", "three layers")


def apart(make: Any = Attending, form: str = "fused", outlier: float = 1.0) -> Any:
    """A network whose channels lie apart, and one of them behind the first norm so many times larger."""
    model: Any = nets.seeded(lambda: make(form))
    offsets = torch.linspace(-3, 3, DIM)
    with torch.no_grad():
        model.norm1.bias += offsets
        model.norm2.bias -= offsets
        model.qkv.bias[2 * DIM :] += offsets
        model.v.bias += offsets
        model.norm1.weight[2] *= outlier
        model.norm1.bias[2] *= outlier
        model.qkv.weight[:, 2] /= outlier
    return model


def quantized(model: nn.Module, bits: int = 4, fold: bool = True) -> GraphModule:
    return workloads.quantize_exported(model, BATCHES, weight_bits=8, activation_bits=bits, fold_quantize=fold)


def opened(graph: GraphModule, model: nn.Module) -> Backend:
    backend = Backend(graph)
    attach_float_weights(backend, model)
    return backend


def in_float(backend: Backend) -> Tensor:
    return unquantized(backend)(BATCHES[1])


def steps(backend: Backend) -> dict[str, float]:
    return {name: float(backend.read(name).scale) for name, s in backend.sites.items() if s.kind == "activation"}


def error(graph: GraphModule, model: nn.Module) -> float:
    with torch.no_grad():
        return float(torch.stack([(graph(b) - model(b)).square().mean() for b in BATCHES]).mean())


FIRST = Batch((BATCHES[0],), {}, 8)
NOTE = "the channels of 3 inputs of linear layers moved to the middle of their ranges"


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_function_stays_and_the_steps_are_finer(form: str, fold: bool) -> None:
    model = apart(form=form)
    graph = quantized(model, fold=fold)
    backend = opened(graph, model)
    wanted, coarse = in_float(backend), steps(backend)
    assert equalize(backend, [FIRST]) == [NOTE]
    torch.testing.assert_close(in_float(backend), wanted, rtol=1e-4, atol=1e-4)
    fine = steps(backend)
    layer = "q" if form == "three layers" else "qkv"
    moved = {f"{layer}.input", "proj.input", "fc1.input"}
    assert {name for name in fine if fine[name] != coarse[name]} == moved
    assert all(fine[name] < 0.8 * coarse[name] for name in moved)
    assert equalize(opened(graph, model), [FIRST]) == [], "they are in the middle already"


@torch.no_grad()
def test_values_of_attention_that_something_else_reads_stay() -> None:
    model = apart(Gated)
    graph = quantized(model)
    backend = opened(graph, model)
    wanted, coarse = in_float(backend), steps(backend)
    assert "proj.input" in [part.sites[0] for part in SharedInputs(backend).find()], "the graph alone does not tell"
    assert equalize(backend, [FIRST]) == [NOTE.replace("3", "2")]
    torch.testing.assert_close(in_float(backend), wanted, rtol=1e-4, atol=1e-4)
    assert {name for name, step in steps(backend).items() if step != coarse[name]} == {"qkv.input", "fc1.input"}


@torch.no_grad()
def test_outliers_move_into_the_weights() -> None:
    model = apart(outlier=60)
    graph = quantized(model, 8)
    backend, before = opened(graph, model), error(graph, model)
    wanted = in_float(backend)
    assert equalize(backend, [FIRST]) == ["1 outlier channels of 1 norms moved into the weights that read them", NOTE]
    torch.testing.assert_close(in_float(opened(graph, model)), wanted, rtol=1e-4, atol=1e-4)
    assert error(graph, model) < 0.3 * before


def test_a_search_starts_there_and_keeps_its_word(tmp_path: Path) -> None:
    model = apart(outlier=60)
    graph = quantized(model)
    fresh, other = copy.deepcopy(graph), copy.deepcopy(graph)
    config: dict[str, Any] = {"gradient_steps": 20, "evaluations": 2, "loss": "mse", "holdout": 0}
    before = error(graph, model)
    refine(graph, model, **config)
    refine(other, model, **config, equalize=False)
    report = cptv_ao.report(graph)
    assert NOTE in report.notes and NOTE not in cptv_ao.report(other).notes
    assert report.before.search == pytest.approx(before, rel=1e-4)
    assert report.after.search == pytest.approx(error(graph, model), rel=1e-4)
    assert error(graph, model) < 0.8 * error(other, model)
    cptv_ao.save_scales(graph, tmp_path / "refined")
    cptv_ao.load_scales(fresh, tmp_path / "refined")
    with torch.no_grad():
        assert torch.equal(fresh(BATCHES[1]), graph(BATCHES[1]))
    cptv_ao.diagnose(graph, BATCHES, float_model=model)
    found = error(graph, model)
    refine(graph, model, **config)
    assert error(graph, model) <= found * (1 + 1e-6)
    assert NOTE not in cptv_ao.report(graph).notes


def test_what_was_given_comes_back_where_it_is_better() -> None:
    """A loss by which only the model that was given is right."""
    model = apart()
    graph = quantized(model)
    with torch.no_grad():
        own = {model(b).numpy().tobytes(): graph(b) for b in BATCHES}

    def loss(outputs: Tensor, teacher: Tensor) -> Tensor:
        return (outputs - own[teacher.detach().numpy().tobytes()]).square().mean()

    as_given = weights(graph)
    refine(graph, model, loss=loss)
    assert weights(graph) == as_given
    assert cptv_ao.report(graph).before == cptv_ao.report(graph).after


def refine(graph: GraphModule, model: nn.Module, **changes: Any) -> None:
    cptv_ao.refine(graph, BATCHES, float_model=model, config=small_config(**changes), progress=False)


def test_diagnose_says_which_outliers_refine_moves() -> None:
    model = apart(outlier=60)
    found = cptv_ao.diagnose(quantized(model), BATCHES, float_model=model)
    assert found.findings.smoothable == ("fc1.input", "qkv.input")
    assert "which refine, given float_model, moves into the layers behind it" in found.advice[0]
