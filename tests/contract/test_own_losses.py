"""Losses of the user's own: right, or an error that says what to do; and losses that are no number."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.output_nets import quantized, refined
from helpers.search import small_config
from torch import Tensor
from torch.nn import functional

import cptv_ao
from cptv_ao.core.outcome import Losses, Status


def mse(candidate: Tensor, teacher: Tensor) -> Tensor:
    return functional.mse_loss(candidate, teacher)


def in_place(candidate: Tensor, teacher: Tensor) -> Tensor:
    candidate.sub_(teacher)
    teacher.zero_()
    return candidate.square().mean()


def numbers(candidate: Tensor, teacher: Tensor) -> Any:
    return np.square(candidate.numpy() - teacher.numpy()).mean()


def mistakes(candidate: Tensor, teacher: Tensor) -> Tensor:
    return (candidate.argmax(1) != teacher.argmax(1)).sum()


@pytest.mark.parametrize("loss", [in_place, lambda c, t: mse(c, t).reshape(1, 1)])
def test_a_loss_that_writes_into_its_arguments_or_keeps_dimensions(loss: Any) -> None:
    wanted, found = refined(loss=mse), refined(loss=loss)
    assert (found.before, found.after, found.stages) == (wanted.before, wanted.after, wanted.stages)


@pytest.mark.parametrize("loss", [lambda c, t: float(mse(c, t)), numbers, lambda c, t: mse(c.detach(), t), mistakes])
@pytest.mark.parametrize("score_on", ["kernels", "simulation"])
def test_a_loss_that_cannot_be_differentiated(loss: Any, score_on: str) -> None:
    found = refined(loss=loss, score_on=score_on, feature_weight=3.0)
    assert any("gradient steps follow the inputs of the layers alone" in note for note in found.notes)
    assert any(stage.startswith("gradient") for stage in found.stages)
    assert sum(block.evaluations for block in found.blocks) > 0
    assert found.after.search <= found.before.search
    without = refined(loss=loss, score_on=score_on, feature_weight=0.0)
    assert any("no gradient steps" in note for note in without.notes)
    assert not any(stage.startswith("gradient") for stage in without.stages)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (
            lambda c, t: (c - t).square().mean(1),
            TypeError,
            r"one real number, got a tensor of shape \(12,\); return its",
        ),
        (lambda c, t: None, TypeError, "one real number, got NoneType"),
        (lambda c, t: torch.complex(mse(c, t), mse(c, t)), TypeError, "one real number"),
        (lambda c, t: c.sum() * 0, ValueError, "higher for worse outputs, got <lambda>, which is"),
        (lambda c, t: functional.kl_div(c[:, :1].log_softmax(1), t[:, :1].softmax(1)), ValueError, "higher for worse"),
        (lambda c, t: mse(c, t) * float("nan"), cptv_ao.NonFiniteError, "the model that was given is NaN or inf"),
    ],
)
def test_a_loss_that_is_none(loss: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        refined(loss=loss)


def test_what_a_loss_raises_comes_out_as_it_is() -> None:
    def wrong(candidate: Tensor, teacher: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        refined(loss=wrong)


# What is not finite


def test_a_held_out_loss_that_is_not_finite() -> None:
    net, model, batches = quantized()
    with torch.no_grad():
        held_out = net(batches[-1])

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        return mse(candidate, teacher) * (float("nan") if torch.equal(teacher, held_out) else 1.0)

    with pytest.raises(cptv_ao.NonFiniteError, match=r"NaN or inf on the calibration images \(held-out ones\)"):
        cptv_ao.refine(model, batches, float_model=net, config=small_config(loss=loss), progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_a_candidate_whose_held_out_loss_is_no_number_is_not_kept(bad: float) -> None:
    net, model, batches = quantized()
    with torch.no_grad():
        held_out, given = net(batches[-1]), model(batches[-1])

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        moved = teacher.equal(held_out) and not candidate.equal(given) and len(seen) > 0
        seen.append(1)
        return mse(candidate, teacher) * (bad if moved else 1.0)

    seen: list[int] = []
    config = small_config(loss=loss, evaluations=8, gradient_steps=0)
    cptv_ao.refine(model, batches, float_model=net, config=config, progress=False)
    report = cptv_ao.report(model)
    assert report.status is Status.REJECTED
    assert report.after == report.before
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_loss_that_is_no_number_is_worse_than_any() -> None:
    for bad in (float("nan"), float("-inf"), float("inf")):
        assert Losses(bad, 1.0).worse_than(Losses(2.0, 2.0))
        assert Losses(1.0, bad).worse_than(Losses(2.0, 2.0))
    assert not Losses(1.0, 1.0).worse_than(Losses(1.0, 1.0))
