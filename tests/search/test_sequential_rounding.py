"""Weights rounded column after column: against all roundings that there are, and the rows that they are found for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from helpers.search import small_config
from torch import Tensor
from torch.nn import functional

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.core.weight_rounding import along_axis, round_weight
from cptv_ao.search.proposals import sequential_rounding
from cptv_ao.search.proposals.sequential_rounding import (
    affordable_columns,
    column_parts,
    rounded_in_turn,
    sequential_roundings,
)
from cptv_ao.simulation.layer_inputs import layer_inputs
from cptv_ao.simulation.products import Convolution, Linear, Transposed
from cptv_ao.simulation.qtensor import dequantize
from cptv_ao.simulation.twin import Twin

COLUMNS = 8


def rows_of(columns: int, seed: int) -> Tensor:
    """Inputs whose columns have to do with one another."""
    return nets.images(512, columns, seed=seed) @ (
        torch.eye(columns) + 0.5 * nets.images(columns, columns, seed=seed + 1)
    )


def error(codes: Tensor, steps: Tensor, rows: Tensor) -> Tensor:
    """Of each channel (C,)."""
    return ((codes - steps) @ rows.T).square().sum(1)


def test_it_is_near_to_the_best_of_all_roundings() -> None:
    steps, rows = 3 * nets.images(20, COLUMNS, seed=3), rows_of(COLUMNS, seed=4)
    ends = torch.full_like(steps, 100.0)
    found = error(rounded_in_turn(steps, -ends, ends, rows.T @ rows), steps, rows)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=COLUMNS)))
    best = torch.stack([error(steps.floor() + choice, steps, rows) for choice in choices]).amin(0)
    nearest = error(steps.round(), steps, rows)
    assert bool((found >= best - 1e-3).all())
    assert float(found.sum()) < 1.25 * float(best.sum())
    assert float(found.sum()) < 0.8 * float(nearest.sum())


def test_each_code_is_one_of_two_and_within_the_ends() -> None:
    steps, rows = 6 * nets.images(16, 300, seed=5), rows_of(300, seed=6)
    low, high = torch.full_like(steps, -4.0), torch.full_like(steps, 3.0)
    codes = rounded_in_turn(steps, low, high, rows.T @ rows)
    assert bool(((codes >= low) & (codes <= high)).all())
    inside = (steps > -4) & (steps < 3)
    assert bool(((codes - steps).abs()[inside] < 1).all())
    assert bool((codes[steps > 3] == 3).all()) and bool((codes[steps < -4] == -4).all())
    assert torch.equal(codes, codes.round())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    steps, rows = nets.images(4, COLUMNS, seed=7), rows_of(COLUMNS, seed=8)
    rows[:, 2] = 0.0
    ends = torch.full_like(steps, 9.0)
    assert bool(rounded_in_turn(steps, -ends, ends, rows.T @ rows).isfinite().all())
    assert bool(rounded_in_turn(steps, -ends, ends, torch.zeros(COLUMNS, COLUMNS)).isfinite().all())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [(3,), (3, 2), (1, 2, 3)])
def test_the_rows_of_a_convolution_are_what_its_weights_meet(groups: int, size: tuple[int, ...]) -> None:
    dims = len(size)
    weight = nets.images(6, 6 // groups, *size, seed=1)
    value = nets.images(2, 6, *(7, 8, 9)[:dims], seed=2)
    stride, padding, dilation = (2, 1, 1)[:dims], (1, 0, 2)[:dims], (1, 2, 1)[:dims]
    product = Convolution(stride, padding, dilation, groups)
    wanted = torch.convolution(value, weight, None, stride, padding, dilation, False, (0,) * dims, groups)
    rows = product.rows(value, weight, 10**6)
    assert rows is not None
    found = torch.cat([own @ part.flatten(1).T for own, part in zip(rows, weight.chunk(groups), strict=True)], 1)
    assert torch.allclose(found, wanted.movedim(1, -1).flatten(0, -2), atol=1e-4)
    few = product.rows(value, weight, 5)
    assert few is not None
    assert few.shape == (groups, 5, weight[0].numel())
    assert torch.equal(few[:, 0], rows[:, 0])


def test_the_rows_of_a_linear_layer_are_its_inputs() -> None:
    value = nets.images(2, 5, 4, seed=1)
    rows = Linear().rows(value, nets.images(3, 4), 100)
    assert rows is not None
    assert torch.equal(rows, value.reshape(1, 10, 4))


def test_a_transposed_convolution_has_no_rows() -> None:
    product = Transposed((1,), (0,), (1,), 1, output_padding=(0,))
    assert product.rows(nets.images(2, 3, 5), nets.images(3, 4, 2), 100) is None


def test_a_search_gains_by_the_roundings_of_few_bits(vit_w2: Case) -> None:
    """Unseen images, too: they are of the inputs of each layer, not of the loss."""
    config = small_config(population=("output_error",), passes=0)
    nearest = small_config(population=("output_error",), passes=0, rounding_rate=0)
    losses = []
    for one in (config, nearest):
        refined = cptv_ao.refine(
            vit_w2.converted, vit_w2.batches, float_model=vit_w2.float_model, config=one, inplace=False, progress=False
        )
        report = cptv_ao.report(refined)
        losses.append((report.after.search, report.after.holdout))
        rounds = [stage for stage in report.stages if stage.startswith("weights rounded")]
        assert len(rounds) == (one is config)
    assert all(ours < 0.8 * theirs for ours, theirs in zip(*losses, strict=True))


def test_weights_of_eight_bits_come_nearer_too(conv: Case) -> None:
    backend = backend_of(Case(conv.float_model, *nets.quantize(conv.float_model, conv.batches), conv.batches))
    twin = Twin(backend)
    twin.reround_weights()
    batch = Batch((conv.batches[0],), {}, len(conv.batches[0]))
    eight = {site.name for site in backend.sites.values() if site.kind == "weight" and site.qmax - site.qmin > 127}
    found = sequential_roundings(twin, eight, [batch])
    assert eight and set(found) == eight
    ratios = []
    for layer, value in layer_inputs(twin, batch).items():
        name, weight, rows = layer.weight.site.name, layer.weight.weight, layer.rows(dequantize(value), 16_384)
        if name not in eight or not isinstance(weight, Tensor) or rows is None or len(rows) > 1:
            continue
        errors = []
        for qparams in (backend.read(name), found[name]):
            steps = round_weight(weight, qparams, backend.sites[name]).float()
            apart = (steps * along_axis(qparams.scale, 0, weight.dim()) - weight).flatten(1).float()
            errors.append(float((rows[0] @ apart.T).square().mean()))
        ratios.append(errors[1] / errors[0])
    assert ratios and sum(ratios) / len(ratios) < 0.9, ratios


@pytest.mark.parametrize("most", [5120, 12])
def test_layers_of_the_model_come_nearer_to_what_they_gave(
    vit_w2: Case, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of many columns part by part, too: a Gram matrix of all of them may take more memory than there is."""
    sizes = list[int]()

    def seen(steps: Tensor, low: Tensor, high: Tensor, gram: Tensor) -> Tensor:
        sizes.append(len(gram))
        return rounded_in_turn(steps, low, high, gram)

    monkeypatch.setattr(sequential_rounding, "_COLUMNS", most)
    monkeypatch.setattr(sequential_rounding, "rounded_in_turn", seen)
    backend = backend_of(vit_w2)
    twin = Twin(backend)
    twin.reround_weights()
    batch = Batch((torch.cat(vit_w2.batches),), {}, 128)
    names = [site.name for site in backend.sites.values() if site.kind == "weight"]
    found = sequential_roundings(twin, names, [batch])
    assert set(found) == set(names) and max(sizes) <= most
    assert (len(sizes) > len(names)) == (most == 12)
    with torch.no_grad(), twin.in_float(twin.names):
        inputs = layer_inputs(twin, batch)
    for layer, value in inputs.items():
        name = layer.weight.site.name
        if not isinstance(layer.weight.weight, Tensor) or layer.weight.weight.dim() != 2:
            continue
        rows = value.dequantize().flatten(0, -2)
        wanted = functional.linear(rows, layer.weight.weight)
        before = (functional.linear(rows, layer.weight.dequantize()) - wanted).square().sum()
        twin.sites.set(name, found[name])
        after = (functional.linear(rows, layer.weight.dequantize()) - wanted).square().sum()
        assert float(after) < 0.8 * float(before), name


def test_few_operations_pay_for_columns_in_small_parts() -> None:
    """A ViT-S is never cut in half a minute of a slow core; how small parts get has an end."""
    small, wide = [(384, 384), (1536, 384), (384, 1536), (384, 3, 14, 14)] * 12, [(4096, 512 * 7 * 7)]
    assert affordable_columns(small, 3e11) >= 1536
    parts = [affordable_columns(wide, flops) for flops in (math.inf, 1e12, 3e11, 0.0)]
    assert parts == sorted(parts, reverse=True) and len(set(parts)) == 4 and parts[-1] >= 64
    for most in parts:
        columns = torch.arange(512 * 7 * 7)
        found = column_parts(columns, most)
        assert torch.equal(torch.cat(found), columns)
        assert max(map(len, found)) <= most
