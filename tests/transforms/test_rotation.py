"""Residual streams that the recipe rotates, at no change of the function, and those that it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.streams import (
    Bare,
    Begun,
    BegunByFunction,
    Constant,
    Crossed,
    Cut,
    Functions,
    Headless,
    NoBias,
    NormTwice,
    Pooled,
    PostNorm,
    Returned,
    Rows,
    Scaled,
    SharedLayer,
    SharedTensor,
    Sized,
    SquareHead,
    Stream,
    Text,
    TiedText,
    Towers,
    WithRelu,
    images,
)
from torch import nn

import cptv_ao
from cptv_ao.backends.open import open_model
from cptv_ao.core.rotations import rotation
from cptv_ao.transforms.equalize import rotatable


def rotated(model: nn.Module) -> tuple[cptv_ao.Recipe, bool]:
    ready = cptv_ao.recipe(model, (images(),))
    return ready, "residual stream" in str(ready)


@pytest.mark.parametrize("width", [2, 3, 16, 384])
def test_the_rotation_is_one_and_leaves_the_mean(width: int) -> None:
    turn, ones = rotation(width), torch.ones(width, dtype=torch.float64)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn @ ones, ones, atol=1e-12)
    assert torch.equal(turn, rotation(width))


@pytest.mark.parametrize("make", [Stream, Begun, Headless, Bare, Pooled, Functions, Sized, NoBias])
def test_the_function_stays_and_the_outliers_go(make: Any) -> None:
    model = nets.seeded(make)
    state, test = copy.deepcopy(model.state_dict()), images(5, seed=3)
    ready, done = rotated(model)
    assert done, str(ready)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the given model changed"
    with torch.no_grad():
        torch.testing.assert_close(ready.model(test), model(test), rtol=1e-4, atol=1e-4)
        rows = [make.rows(any_model, test).abs().max() for any_model in (model, ready.model)]
    assert rows[1] < rows[0] / 2
    found = ready.model.state_dict()
    assert bool((found["first.norm.weight"] == 1).all() and (found["first.norm.bias"] == 0).all())
    assert bool((found["second.gamma"] == 1).all())


def test_where_the_norm_is_returned_a_layer_rotates_back() -> None:
    assert type(rotated(nets.seeded(Headless))[0].model.neck) is nn.Linear
    behind: Any = rotated(nets.seeded(Bare))[0].model.norm
    assert [type(part) for part in behind] == [nn.LayerNorm, nn.Linear]
    assert "a linear layer at neck rotates back" in str(rotated(nets.seeded(Headless))[0])
    assert type(rotated(nets.seeded(Stream))[0].model.neck) is nn.Identity


def test_where_a_norm_begins_the_stream_a_layer_does() -> None:
    ready, _ = rotated(nets.seeded(Begun))
    start: Any = ready.model.start
    assert [type(part) for part in start] == [nn.LayerNorm, nn.Linear]
    assert bool((start[0].weight == 1).all() and (start[0].bias == 0).all())
    assert "a residual stream of 4 sums rotated" in str(ready)
    assert "a linear layer at start, in float, begins it" in str(ready)
    assert dict(ready.qconfig_mapping.module_name_qconfigs) == {"start": None}


@pytest.mark.parametrize(
    "make",
    [
        WithRelu,
        Returned,
        NormTwice,
        SharedLayer,
        SharedTensor,
        Scaled,
        Constant,
        Cut,
        Crossed,
        PostNorm,
        BegunByFunction,
    ],
    ids=lambda make: make.__name__,
)
def test_what_is_read_or_written_otherwise_stays(make: Any) -> None:
    model = nets.seeded(make)
    ready, done = rotated(model)
    assert not done
    assert torch.equal(ready.model.state_dict()["first.fc2.weight"], model.state_dict()["first.fc2.weight"])


@pytest.mark.parametrize("make", [Text, TiedText])
def test_words_are_rotated_where_they_are_no_head(make: Any) -> None:
    model, ids = nets.seeded(make), torch.arange(40).reshape(8, 5) % 11
    ready = cptv_ao.recipe(model, (ids,))
    assert ("residual stream" in str(ready)) == (make is Text)
    with torch.no_grad():
        torch.testing.assert_close(ready.model(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_each_of_two_streams_is_rotated() -> None:
    model, test = nets.seeded(Towers), images(5, seed=3)
    ready, _ = rotated(model)
    assert [str(ready).count(f"a linear layer at {side}.norm rotates back") for side in ("left", "right")] == [1, 1]
    with torch.no_grad():
        torch.testing.assert_close(ready.model(test), model(test), rtol=1e-4, atol=1e-4)


def test_without_outliers_nothing_is_rotated() -> None:
    _, done = rotated(nets.seeded(lambda: Stream(0.0)))
    assert not done


def test_what_a_rotation_may_help_is_told_of_a_quantized_model() -> None:
    _, converted = nets.quantize(nets.seeded(Rows), [images()])
    backend = open_model(converted)
    sums = {node.name for node in converted.graph.nodes if node.target is torch.ops.quantized.add}
    assert {backend.sites[name].nodes[0] for name in rotatable(backend)} == sums and len(sums) == 3
    _, converted = nets.quantize(nets.seeded(nets.ConvNet), [nets.images(4, 3, 16, 16)])
    assert not rotatable(open_model(converted))


def streams_told(model: nn.Module, float_model: nn.Module | None) -> list[str]:
    """What the report on a refined model says of its residual stream."""
    _, converted = nets.quantize(model, [images(64)])
    config = cptv_ao.RefineConfig(passes=0, gradient_steps=0)
    cptv_ao.refine(converted, [images(64)], float_model=float_model, config=config, progress=False)
    return [note for note in cptv_ao.report(converted).notes if "residual stream" in note]


@pytest.mark.filterwarnings("ignore:refine without float_model")
def test_refine_tells_of_outliers_that_are_left() -> None:
    model = nets.seeded(Rows)
    (note,) = streams_told(model, None)
    assert "3 of 3 sums" in note and "given float_model" in note
    (note,) = streams_told(model, model)
    assert "a residual stream of 3 sums rotated" in note
    ready = rotated(model)[0].model
    assert not streams_told(ready, ready), "the recipe has spread them"
    plain = nets.seeded(lambda: Rows(0.0))
    assert not streams_told(plain, plain), "none stands out"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [Rows, Begun])
def test_a_quantized_stream_loses_less(make: Any, seed: int) -> None:
    model, calibration, test = nets.seeded(make, seed), images(64, seed), images(64, seed + 10)
    wanted, errors = model(test).detach(), list[float]()
    config = cptv_ao.RefineConfig(passes=0, equalize=False)  # which rotates, too
    for one in (model, rotated(model)[0].model):
        _, converted = nets.quantize(one, [calibration])
        cptv_ao.refine(converted, [calibration], float_model=one, config=config, progress=False)
        errors.append(float((converted(test) - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.filterwarnings("ignore:the float network's output is the same for all")  # it is of a token of its own
@pytest.mark.parametrize(("make", "loss"), [(Headless, "cosine"), (Stream, "kl"), (SquareHead, "kl")])
def test_what_rotates_back_makes_no_logits(make: Any, loss: str) -> None:
    ready, _ = rotated(nets.seeded(make))
    _, converted = nets.quantize(ready.model, [images(32)])
    config = cptv_ao.RefineConfig(max_evaluations=1, gradient_steps=0, passes=0)
    cptv_ao.refine(converted, [images(32)] * 2, float_model=ready.model, config=config, progress=False)
    assert cptv_ao.report(converted).loss == loss
