"""Equivalent forms of PT2E graphs: equal in float, narrower ranges, and taken back where something else is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.attention import BATCHES, DIM, NOTE, Attending, Gated, apart, quantized, refine, steps
from helpers.quick import each_value
from helpers.state import weights
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.events import Event
from cptv_ao.fx.paths import fetch
from cptv_ao.simulation.twin import unquantized
from cptv_ao.transforms.equalize import equalize
from cptv_ao.transforms.pt2e_patterns import SharedInputs

pt2e.torchao()

FORMS = ("fused", "softmax", "three layers")


def opened(graph: GraphModule, model: nn.Module) -> Backend:
    backend = Backend(graph)
    attach_float_weights(backend, model)
    return backend


def in_float(backend: Backend) -> Tensor:
    return unquantized(backend)(BATCHES[1])


def error(graph: GraphModule, model: nn.Module) -> float:
    with torch.no_grad():
        return float(torch.stack([(graph(b) - model(b)).square().mean() for b in BATCHES]).mean())


ONE_CHANNEL = "1 channel of 1 input of linear layers evened out with the weights there"
FIRST = Batch((BATCHES[0],), {}, 8)


@pytest.mark.parametrize(("form", "fold"), each_value(FORMS, [True, False]))
@torch.no_grad()
def test_the_function_stays_and_the_steps_are_finer(form: str, fold: bool) -> None:
    model = apart(form=form)
    graph = quantized(model, fold=fold)
    backend = opened(graph, model)
    wanted, coarse = in_float(backend), steps(backend)
    *evened, centred = equalize(backend, [FIRST])
    assert centred == NOTE
    assert not evened or (fold and _evened_out(evened)), "a weight that the graph rounds itself is not rounded anew"
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
    assert equalize(backend, [FIRST]) == [ONE_CHANNEL, NOTE]
    norm = next(part for part in SharedInputs(backend).find() if part.sites == ("qkv.input",))
    assert norm.weight is not None
    factors = fetch(graph, norm.weight) / model.norm1.weight
    assert [c for c in range(DIM) if factors[c] != 1] == [2] and 0 < float(factors[2]) < 1 / 4
    torch.testing.assert_close(in_float(opened(graph, model)), wanted, rtol=1e-4, atol=1e-4)
    assert error(graph, model) < 0.3 * before


def unlike(form: str = "fused", wide: float = 16.0) -> Any:
    """Like `apart`, and every other channel behind the first norm and of the values of attention so much larger; what
    reads it makes up for it."""
    model = apart(form=form)
    with torch.no_grad():
        model.norm1.weight[::2] *= wide
        model.norm1.bias[::2] *= wide
        model.proj.weight[:, ::2] /= wide
        for layer, first in ((model.qkv, 2 * DIM), (model.q, DIM), (model.k, DIM), (model.v, 0)):
            layer.weight[:, ::2] /= wide
            layer.weight[first::2] *= wide
            layer.bias[first::2] *= wide
    return model


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_channels_of_unlike_size_are_evened_out(form: str) -> None:
    """Behind attention, too, where the rows of the layer that gives the values take the factors."""
    model = unlike(form)
    graph = quantized(model)
    backend, before = opened(graph, model), error(graph, model)
    wanted, codes = in_float(backend), backend.weight("proj.weight").int_repr()
    notes = equalize(backend, [FIRST])
    assert "inputs of linear layers evened out with the weights there" in notes[0]
    torch.testing.assert_close(in_float(backend), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_float(opened(graph, model)), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(backend.weight("proj.weight").int_repr(), codes), "rounded anew"
    assert error(graph, model) < 0.5 * before
    again = equalize(opened(graph, model), [FIRST])
    assert _evened_out(again) <= _evened_out(notes) / 3, "they are nearly even already"


def _evened_out(notes: list[str]) -> int:
    return sum(int(note.split()[0]) for note in notes if "evened out" in note)


@torch.no_grad()
def test_without_float_weights_channels_are_only_centred() -> None:
    model = unlike()
    graph = quantized(model)
    backend = Backend(graph)
    wanted = in_float(backend)
    codes = {name: backend.weight(name).int_repr() for name, s in backend.sites.items() if s.kind == "weight"}
    assert equalize(backend, [FIRST])[0].startswith("the channels of")
    torch.testing.assert_close(in_float(backend), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(backend.weight(name).int_repr(), given) for name, given in codes.items())


@torch.no_grad()
def test_a_linear_layer_without_a_bias_lets_its_input_be_scaled_not_moved() -> None:
    model = unlike()
    model.proj.bias = None
    graph = quantized(model)
    backend = opened(graph, model)
    wanted = in_float(backend)
    assert "evened out" in equalize(backend, [FIRST])[0]
    torch.testing.assert_close(in_float(backend), wanted, rtol=1e-4, atol=1e-4)


class Rooted(Attending):
    """Norms without a bias, the first one of root mean squares."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.LayerNorm(DIM, bias=False)


@torch.no_grad()
def test_norms_without_a_bias_are_only_multiplied() -> None:
    model: Any = nets.seeded(lambda: Rooted("fused"))
    for norm, layer in ((model.norm1, model.qkv), (model.norm2, model.fc1)):
        norm.weight[::2] *= 16
        layer.weight[:, ::2] /= 16
    graph = quantized(model)
    backend, coarse = opened(graph, model), error(graph, model)
    wanted = in_float(backend)
    notes = equalize(backend, [FIRST])
    assert "of 2 inputs of linear layers evened out" in notes[0] and "moved" not in notes[0]
    torch.testing.assert_close(in_float(backend), wanted, rtol=1e-4, atol=1e-4)
    assert error(graph, model) < 0.7 * coarse


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


def test_the_form_is_the_first_gain_and_told_as_one() -> None:
    """The simulation says what the graph would: the form is scored there alone, and at once."""
    model = apart(outlier=60)
    graph = quantized(model)
    events = list[Event]()
    refine(graph, model, gradient_steps=0, evaluations=2, loss="mse", callback=events.append)
    report = cptv_ao.report(graph)
    first = next(event for event in events if event.kind == "proposal")
    assert report.stages[0].startswith("equal forms: accepted")
    assert report.after.search <= first.loss < report.before.search
    assert report.history[1].search == first.loss and report.history[1].kept


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
    report = cptv_ao.report(graph)
    assert report.before == report.after
    assert report.stages[0].startswith("equal forms: not better, the search starts there, loss ")


def test_diagnose_says_which_outliers_refine_moves() -> None:
    model = apart(outlier=60)
    found = cptv_ao.diagnose(quantized(model), BATCHES, float_model=model)
    assert found.findings.smoothable == ("fc1.input", "proj.input", "qkv.input")
    assert "which refine, given float_model, moves into the layers behind it" in found.advice[0]
