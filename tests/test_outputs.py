"""Outputs and losses of any make: right, or an error that says what to do; never a loss that sees nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import nets
import numpy as np
import pytest
import torch
from small import small_config
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.outputs import compared
from cptv_ao.report import Losses, Report, Status

GRADIENT: dict[str, Any] = {
    "gradient_steps": 8, "loss": "auto", "population": ("output_error", "ranges", "biases"), "evaluations": 4,
}  # fmt: skip


class Net(nn.Module):
    """Two linear layers; its output is made of theirs by a function."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.end = nn.Linear(12, 24), nn.Linear(24, 6), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.second(functional.relu(self.first(x))))


def quantized(
    end: Callable[[Tensor], Any] = lambda y: y, rows: int = 12
) -> tuple[nn.Module, GraphModule, list[Tensor]]:
    net = nets.seeded(lambda: Net(end))
    batches = list(nets.images(4 * rows, 12).split(rows))
    return net, nets.quantize(net, batches, weight_bits=3)[1], batches


def refined(
    end: Callable[[Tensor], Any] = lambda y: y, *, alone: bool = False, rows: int = 12, **changes: Any
) -> Report:
    net, model, batches = quantized(end, rows)
    config = small_config(**(GRADIENT | changes))
    cptv_ao.refine(model, batches, float_model=None if alone else net, config=config, progress=False)
    report = cptv_ao.report(model)
    json.dumps(report.to_dict(), allow_nan=False)
    return report


ENDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "(N,)": (lambda y: y.mean(1), "mse"),
    "(N, 1)": (lambda y: y[:, :1], "mse"),
    "(N,) in a tuple": (lambda y: (y.sum(1), y), "mse"),
    "bfloat16": (lambda y: y.bfloat16(), "kl"),
    "half in a dict": (lambda y: {"a": y.half()}, "kl"),
    "double": (lambda y: y.double(), "kl"),
    "double (N,)": (lambda y: y.mean(1).double(), "mse"),
}


@pytest.mark.filterwarnings("ignore:refine without float_model")
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_outputs_of_any_shape_and_dtype(name: str, alone: bool) -> None:
    end, loss = ENDS[name]
    report = refined(end, alone=alone)
    assert report.loss == loss
    assert report.before.search > 0
    assert report.after.search < report.before.search or (alone and report.after == report.before)
    assert any(stage.startswith("gradient") for stage in report.stages)
    assert any("mse, for the output is one number" in note for note in report.notes) == (loss == "mse")
    assert report.settings["loss"] == "'auto'", "as it was given"


def test_diagnose_sees_single_numbers() -> None:
    net, model, batches = quantized(lambda y: y[:, :1])
    found = cptv_ao.diagnose(model, batches, float_model=net, progress=False)
    with torch.no_grad():
        wanted = functional.mse_loss(model(torch.cat(batches)), net(torch.cat(batches)))
    assert found.loss_name == "mse"
    assert found.loss == pytest.approx(float(wanted), rel=1e-4)
    assert any("mse, for the output" in note for note in found.notes)


def test_the_dtype_of_a_pt2e_graph(pt2e: Any) -> None:
    for end, loss in (ENDS["(N,)"], ENDS["bfloat16"]):
        net, _, batches = quantized(end)
        exported = torch.export.export(copy.deepcopy(net), (batches[0],)).module()
        prepared = pt2e.pt2e.prepare_pt2e(exported, pt2e.x86())
        for batch in batches:
            prepared(batch)
        model = pt2e.pt2e.convert_pt2e(prepared)
        cptv_ao.refine(model, batches, float_model=net, config=small_config(**GRADIENT), progress=False)
        report = cptv_ao.report(model)
        assert report.loss == loss
        assert 0 < report.after.search <= report.before.search
        assert any(stage.startswith("gradient") for stage in report.stages)


@pytest.mark.parametrize("loss", ["kl", "cosine", "infonce", "soft_infonce"])
@pytest.mark.parametrize("verb", ["refine", "diagnose"])
def test_a_named_loss_that_cannot_see_the_output(loss: str, verb: str) -> None:
    net, model, batches = quantized(lambda y: y[:, :1])
    with pytest.raises(ValueError, match=rf"RefineConfig.loss: .* one number per image, got '{loss}'.*use 'mse'"):
        getattr(cptv_ao, verb)(
            model, batches, float_model=net, config=small_config(loss=loss, gradient_steps=2), progress=False
        )


@pytest.mark.parametrize(
    ("end", "match"),
    [
        (lambda y: y.mean(), "one row per image .*, got a single number for the whole batch"),
        (lambda y: torch.complex(y, y), "expected an output that holds a floating tensor"),
    ],
)
def test_outputs_that_cannot_be_compared(end: Callable[[Tensor], Tensor], match: str) -> None:
    with pytest.raises(cptv_ao.UnsupportedModelError, match=match):
        refined(end)


def test_what_is_picked_must_be_a_real_tensor() -> None:
    with pytest.raises(cptv_ao.UnsupportedModelError, match=r"RefineConfig.output: expected it to pick a tensor"):
        refined(output=lambda y: 3.0)
    with pytest.raises(cptv_ao.UnsupportedModelError, match="real numbers in a dense tensor"):
        refined(output=lambda y: torch.complex(y, y))
    assert compared(torch.ones(3, dtype=torch.float64), lambda y: y).shape == (3, 1)


# Losses of one's own


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


# Around


@pytest.mark.parametrize("score_on", ["kernels", "simulation"])
def test_autocast_and_the_default_dtype_change_nothing(score_on: Any) -> None:
    def found(around: Any) -> tuple[Any, ...]:
        net, model, batches = quantized()
        config = small_config(**GRADIENT, score_on=score_on)
        with around:
            cptv_ao.refine(model, batches, float_model=net, config=config, progress=False)
            diagnosis = cptv_ao.diagnose(model, batches, float_model=net, progress=False)
            left = torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
        report = cptv_ao.report(model)
        return left, (report.before, report.after, report.moves, diagnosis.loss, diagnosis.simulated)

    _, plain = found(nullcontext())
    assert found(torch.autocast("cpu", dtype=torch.bfloat16)) == ((True, torch.float32), plain)
    assert found(in_double()) == ((False, torch.float64), plain)


@contextmanager
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:77"])
@pytest.mark.parametrize("verb", ["refine", "diagnose"])
def test_a_device_that_is_not_there(device: str, verb: str) -> None:
    net, model, _ = quantized()
    config = small_config(score_on="simulation", device=device)

    def loader() -> Any:
        raise AssertionError("before any work")
        yield

    with pytest.raises(ValueError, match=rf"RefineConfig.device: expected a device .*, got '{device}': .*'cpu' always"):
        getattr(cptv_ao, verb)(model, loader(), float_model=net, config=config, progress=False)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y - y.mean(0), "softmax": lambda y: y.softmax(0), "earlier rows": lambda y: y.cumsum(0) / 10,
    "later rows": lambda y: y.flip(0).cumsum(0).flip(0) / 10, "not by image": lambda y: y.t(),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_a_batch_is_not_cut_where_outputs_depend_on_other_rows(name: str) -> None:
    """The steps of the descent would else compare parts of a batch with targets of the whole one."""
    seen: list[tuple[int, ...]] = []

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        seen.append(tuple(candidate.shape))
        return mse(candidate, teacher)

    report = refined(MIXING[name], rows=160, loss=loss)
    assert set(seen) == {(6, 160) if name == "not by image" else (160, 6)}
    assert any("batches are run whole" in note for note in report.notes)
    assert report.after.search < report.before.search


def test_a_batch_is_cut_where_it_may_be() -> None:
    seen: set[int] = set()

    def loss(candidate: Tensor, teacher: Tensor) -> Tensor:
        seen.add(len(candidate))
        return mse(candidate, teacher)

    assert not any("batches are run whole" in note for note in refined(rows=160, loss=loss).notes)
    assert seen == {160, 80}
