"""Attention in a lowered model: keys moved to the middle of their ranges; equal in float, and finer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.attention import BATCHES, DIM, HEADS, Attending
from helpers.cases import Case, backend_of, error, in_float
from helpers.search import small_config
from torch import Tensor, nn
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import weight_ranges
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE
from cptv_ao.core.qparams import qparams_for_range
from cptv_ao.simulation.twin import unquantized
from cptv_ao.transforms.attention_patterns import AttentionPatterns
from cptv_ao.transforms.channel_ranges import channel_ends, moving_with, whole_values
from cptv_ao.transforms.equalize import equalize
from cptv_ao.transforms.range_clipping import observed_codes

NOTE = "keys of 1 attention moved to the middle of their ranges, which no softmax sees"
FIRST = Batch((BATCHES[0],), {}, 8)
LAYERS = ("qkv", "q", "k", "v")


class Written(Attending):
    """Attention in more of the forms that it is written in."""

    def attend(self, x: Tensor) -> Tensor:
        if self.form in ("fused", "softmax", "three layers"):
            return super().attend(x)
        images, tokens, _ = x.shape
        if self.form == "bmm":
            heads = [layer(x).reshape(images, tokens, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            q, k, v = (part.flatten(0, 1) for part in heads)
            scores = torch.bmm(q, k.transpose(1, 2)) / 2.0 + self.bias
            return torch.bmm(functional.softmax(scores, -1), v).unflatten(0, (images, HEADS)).transpose(1, 2).flatten(2)
        q, k, v = self.qkv(x).reshape(images, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "scaled":
            q = q * 0.25
        if self.form == "normed":
            k = functional.normalize(k, dim=-1)
        if self.form == "rotary":
            k = k * self.bias[:, :1, : k.shape[-1]].cos()
        scores = torch.matmul(q, k.transpose(-2, -1))
        mixed = scores.softmax(-1).matmul(v) if self.form != "no softmax" else scores.relu() @ v
        if self.form == "read twice":
            mixed = mixed + k
        if self.form == "two queries":
            mixed = mixed + torch.matmul(q.flip(2), k.transpose(-2, -1)).softmax(-1).matmul(v)
        return mixed.transpose(1, 2).reshape(images, tokens, DIM)


def unlike(form: str, bias: bool = True) -> Case:
    """Keys lie apart, and the outputs come from attention, most of all."""

    def make() -> Any:
        model: Any = Written(form)
        model.bias = nn.Parameter(torch.randn(1, 16, 16) / 3)
        for name in LAYERS:
            layer = nn.Linear(DIM, 3 * DIM if name == "qkv" else DIM, bias=bias)
            setattr(model, name, layer)
        return model

    model: Any = nets.seeded(make)
    with torch.no_grad():
        model.proj.weight *= 8
        if bias:
            model.qkv.bias[DIM : 2 * DIM] += torch.linspace(-40, 40, DIM)
            model.k.bias += torch.linspace(-40, 40, DIM)
        else:  # what all tokens have in common
            model.norm1.bias += 3
            model.qkv.weight[DIM : 2 * DIM] *= 4
    return Case(model, *nets.quantize(model, BATCHES), list(BATCHES))


def spans(backend: Backend, names: Iterable[str]) -> dict[str, float]:
    return {name: float(backend.read(name).scale) for name in names}


@pytest.mark.parametrize("form", ["fused", "softmax", "three layers", "bmm", "scaled"])
@torch.no_grad()
def test_the_function_stays_and_the_steps_are_finer(form: str) -> None:
    case = unlike(form)
    given, backend = case.copy(), backend_of(case)
    names = AttentionPatterns(backend).keys()[0].sites.values()
    wanted, coarse = in_float(backend, BATCHES[1]), spans(backend, names)
    assert NOTE in equalize(backend, [FIRST])
    torch.testing.assert_close(in_float(backend, BATCHES[1]), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_float(backend_of(case), BATCHES[1]), wanted, rtol=1e-4, atol=1e-4)
    fine = spans(backend, names)
    source = "k.output" if form in ("three layers", "bmm") else "qkv.output"
    assert fine[source] < 0.5 * coarse[source]
    assert error(case.converted, case) < 0.7 * error(given.converted, given)
    assert NOTE not in equalize(backend_of(case), [FIRST]), "they are even already"


@pytest.mark.parametrize("form", ["normed", "rotary", "no softmax", "read twice"])
@torch.no_grad()
def test_what_is_no_such_attention_stays(form: str) -> None:
    case = unlike(form)
    backend = backend_of(case)
    wanted = in_float(backend, BATCHES[1])
    assert NOTE not in equalize(backend, [FIRST])
    torch.testing.assert_close(in_float(backend, BATCHES[1]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["fused", "scaled", "two queries", "bmm"])
@torch.no_grad()
def test_scales_hold_what_is_there_then(form: str) -> None:
    case = unlike(form)
    backend = backend_of(case)
    codes, names = observed_codes(backend, FIRST, ALONE), AttentionPatterns(backend).keys()[0].sites.values()
    assert any(note.startswith("keys of ") for note in equalize(backend, [FIRST]))
    moving = moving_with(backend, names)
    seen = channel_ends(unquantized(backend), whole_values(moving), [FIRST], ALONE)
    for group in moving:
        lows, highs = zip(*(seen[node].bounds for site in group for node in site.nodes), strict=True)
        for site in group:
            found, wanted = backend.read(site.name), qparams_for_range(min(lows), max(highs), site, codes)
            torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-4, atol=0.0)
            torch.testing.assert_close(found.zero_point, wanted.zero_point, rtol=0.0, atol=1.0)


@torch.no_grad()
def test_layers_without_a_bias_get_one() -> None:
    case = unlike("fused", bias=False)
    backend = backend_of(case)
    wanted = in_float(backend, BATCHES[1])
    assert NOTE in equalize(backend, [FIRST])
    torch.testing.assert_close(in_float(backend, BATCHES[1]), wanted, rtol=1e-4, atol=1e-4)
    assert bool(case.converted.qkv.bias().any())


@torch.no_grad()
def test_without_float_weights_codes_stay() -> None:
    case = unlike("fused")
    backend = Backend(case.converted, weight_ranges(case.float_model))
    wanted = in_float(backend, BATCHES[1])
    codes = {name: backend.weight(name).int_repr() for name, site in backend.sites.items() if site.kind == "weight"}
    assert NOTE in equalize(backend, [FIRST])
    torch.testing.assert_close(in_float(backend, BATCHES[1]), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(backend.weight(name).int_repr(), given) for name, given in codes.items())


def test_a_search_starts_there_and_a_fresh_conversion_gets_it_all(tmp_path: Path) -> None:
    case = unlike("fused")
    fresh, other, start = case.copy().converted, case.copy(), error(case.converted, case)
    config = small_config(gradient_steps=20, evaluations=2, loss="mse", population=("ranges", "biases"))

    def refined() -> cptv_ao.Report:
        cptv_ao.refine(case.converted, BATCHES, float_model=case.float_model, config=config, progress=False)
        return cptv_ao.report(case.converted)

    assert NOTE in refined().notes
    found = error(case.converted, case)
    assert found < 0.6 * start
    cptv_ao.save_scales(case.converted, tmp_path / "refined")
    cptv_ao.load_scales(fresh, tmp_path / "refined")
    other.converted.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(BATCHES[1]), case.converted(BATCHES[1]))
        assert torch.equal(other.converted(BATCHES[1]), case.converted(BATCHES[1]))
    assert NOTE not in refined().notes
    assert error(case.converted, case) <= found * (1 + 1e-6)
