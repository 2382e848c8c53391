"""Outputs of any shape and dtype, and what is around a search: right, or an error that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import pt2e
from helpers.output_nets import GRADIENT, quantized, refined
from helpers.quick import each_value
from helpers.search import small_config
from helpers.state import in_double
from torch import Tensor
from torch.nn import functional

import cptv_ao
from cptv_ao.core.tensors import compared

ENDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "(N,)": (lambda y: y.mean(1), "mse"),
    "(N, 1)": (lambda y: y[:, :1], "mse"),
    "(N,) in a tuple": (lambda y: (y.sum(1), y.argmax(1)), "mse"),
    "bfloat16": (lambda y: y.bfloat16(), "kl"),
    "half in a dict": (lambda y: {"a": y.half()}, "kl"),
    "double": (lambda y: y.double(), "kl"),
    "double (N,)": (lambda y: y.mean(1).double(), "mse"),
}


@pytest.mark.filterwarnings("ignore:refine without float_model")
@pytest.mark.parametrize(("name", "alone"), each_value(ENDS, [False, True]))
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


def test_the_dtype_of_a_pt2e_graph() -> None:
    for end, loss in (ENDS["(N,)"], ENDS["bfloat16"]):
        net, _, batches = quantized(end)
        graph = pt2e.exported(copy.deepcopy(net), (batches[0],))
        prepared = pt2e.torchao().prepare_pt2e(graph, pt2e.x86())
        for batch in batches:
            prepared(batch)
        model = pt2e.torchao().convert_pt2e(prepared)
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


# Around


def mse(candidate: Tensor, teacher: Tensor) -> Tensor:
    return functional.mse_loss(candidate, teacher)


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
