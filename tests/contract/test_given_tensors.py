"""Nothing that was only given to read is written, and after an exception the very tensors are back that were given."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.forms import BATCHES, FORMS, Injected, exported, lowered, made, referred, refine
from helpers.quick import each_value, some
from helpers.search import small_config
from helpers.state import everything, same_bits
from torch import Tensor, nn
from torch.ao.quantization import default_dynamic_qconfig
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.reference import lower
from cptv_ao.backends.scale_slots import BufferScaleSlot


def tensors(*models: nn.Module) -> dict[str, Tensor]:
    """Every tensor object that models hold, by where."""
    return {
        f"{index}: {path}.{name}": value
        for index, model in enumerate(models)
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers, vars(module))
        for name, value in held.items()
        if isinstance(value, Tensor)
    }


def fail(event: cptv_ao.Event) -> None:
    if event.kind == "block":
        raise Injected


@pytest.mark.parametrize(("form", "with_float_model"), each_value(FORMS, [True, False]))
def test_no_tensor_that_was_given_is_written(form: Any, with_float_model: bool) -> None:
    """Not even those of the model itself: whoever holds one, too, keeps it as it was."""
    model, converted, others = made(form)
    given = tensors(model, converted, *others)
    before = {where: tensor.detach().clone() for where, tensor in given.items()}
    report = refine(converted, model if with_float_model else None)
    assert {move.kind for move in report.moves} >= {"activation"}
    changed = [where for where, tensor in given.items() if not same_bits(tensor, before[where])]
    assert changed == []


@pytest.mark.parametrize(("form", "mode"), each_value(FORMS, [torch.no_grad, torch.inference_mode]))
def test_an_exception_leaves_the_very_tensors(form: Any, mode: Any) -> None:
    model, converted, _ = made(form, mode)
    before, given, output = tensors(converted), everything(converted), converted(BATCHES[0])
    with pytest.raises(Injected):
        refine(converted, model, callback=fail)
    assert everything(converted) == given
    after = tensors(converted)
    assert after.keys() == before.keys() and all(after[where] is tensor for where, tensor in before.items())
    assert torch.equal(converted(BATCHES[0]), output)


@pytest.mark.parametrize("form", some(lowered, exported, others=FORMS))
def test_a_model_that_was_converted_in_inference_mode_is_refined(form: Any) -> None:
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        model, converted, _ = made(form, mode)
        report = refine(converted, model)
        assert report.after.search < report.before.search
        with torch.no_grad():
            results.append(converted(BATCHES[0]))
    assert torch.equal(*results)


@pytest.mark.parametrize("form", FORMS)
def test_what_did_not_move_is_the_tensor_that_was_given(form: Any) -> None:
    model, converted, _ = made(form)
    given = tensors(converted)
    report = refine(converted, model, passes=0, gradient_steps=0, population=(), equalize=False)
    assert not report.moves
    assert all(tensor is given[where] for where, tensor in tensors(converted).items())


def test_a_reference_model_with_a_shared_weight_lowers_to_what_was_scored() -> None:
    """Each layer's weight is what its own codes need; nothing else that holds the weight follows."""
    model, reference, _ = made(referred)
    weight = model.get_parameter("one.weight").detach().clone()
    assert reference.get_parameter("one.weight").data_ptr() == reference.get_parameter("two.weight").data_ptr()
    report = refine(reference, model, gradient_steps=40)
    again = lower(reference)
    with torch.no_grad():
        errors = [float((again(batch) - model(batch)).square().mean()) for batch in BATCHES]
    assert sum(errors) / 4 == pytest.approx(report.after.search, rel=1e-4)
    assert torch.equal(model.get_parameter("one.weight"), weight)


class Twice(nn.Module):
    """A weight that a functional op uses twice: one place in a reference model, two in a lowered one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight, self.head = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8) / 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.conv(x).relu().mean((2, 3)), self.weight).relu()
        return self.head(nn.functional.linear(x, self.weight).relu())


def test_weights_with_one_place_in_a_reference_model_stay() -> None:
    model = nets.seeded(Twice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference, _ = referred(copy.deepcopy(model))
    report = refine(reference, model, gradient_steps=40)
    again = lower(reference)
    with torch.no_grad():
        errors = [float((again(batch) - model(batch)).square().mean()) for batch in BATCHES]
    assert sum(errors) / 4 == pytest.approx(report.after.search, rel=1e-4)
    assert report.after.search < report.before.search


@pytest.mark.parametrize("failures", [1, 1000])
def test_an_undo_that_fails_goes_on_and_hides_nothing(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale cannot be put back by itself, once or ever: the rest is, and the first exception is the one that is
    seen."""
    model, converted, _ = made(lowered)
    given, left, undoing = everything(converted), [failures], [False]
    restore = BufferScaleSlot.restore

    def failing(self: BufferScaleSlot, state: Any) -> None:
        if undoing[0] and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("no restore")
        restore(self, state)

    def stop(event: cptv_ao.Event) -> None:
        if event.kind == "block":
            undoing[0] = True
            raise Injected("first")

    monkeypatch.setattr(BufferScaleSlot, "restore", failing)
    with pytest.raises(Injected, match="first") as caught:
        refine(converted, model, callback=stop)
    assert everything(converted) == given
    told = getattr(caught.value, "__notes__", [])
    if hasattr(caught.value, "add_note"):
        assert bool(told) == (failures > 1) and all("no restore" in note for note in told)


@pytest.mark.parametrize("form", [lowered, exported])
def test_scales_are_loaded_into_a_model_of_inference_mode_or_not_at_all(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, converted, _ = made(form)
    fresh = made(form, torch.inference_mode)[1]
    refine(converted, model)
    cptv_ao.save_scales(converted, tmp_path / "scales")
    given, before = everything(fresh), tensors(fresh)
    write, left = Backend.write_exactly, [4]

    def failing(self: Backend, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Injected
        write(self, *arguments)

    monkeypatch.setattr(Backend, "write_exactly", failing)
    with pytest.raises(Injected):
        cptv_ao.load_scales(fresh, tmp_path / "scales")
    assert everything(fresh) == given
    assert all(tensor is before[where] for where, tensor in tensors(fresh).items())
    with torch.inference_mode():
        cptv_ao.load_scales(fresh, tmp_path / "scales")
    with torch.no_grad():
        assert torch.equal(fresh(BATCHES[0]), converted(BATCHES[0]))
    refine(fresh, model)


class Counting(nn.Module):
    """Counts how often it was run, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.runs.add_(1)
        return x


def test_buffers_that_a_forward_writes_are_left_as_they_were() -> None:
    float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Counting(), nn.Linear(8, 4)))
    batches, custom = list(nets.images(24, 6).split(6)), PrepareCustomConfig()
    custom.set_non_traceable_module_classes([Counting])
    with torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(float_model), nets.mapping(3), (batches[0],), custom)
        for batch in batches:
            prepared(batch)
        model = convert_fx(prepared)
    given = [(counter.runs, float(counter.runs)) for counter in (float_model[2], model.get_submodule("2"))]
    config = small_config(evaluations=4, gradient_steps=4)
    cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    assert cptv_ao.report(model).moves
    cptv_ao.diagnose(model, batches, float_model=float_model, progress=False)
    assert [float(runs) for runs, _ in given] == [before for _, before in given]
    assert model.get_submodule("2").runs is given[1][0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.head = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.lstm(self.first(x))
        return self.head(found[:, -1])


def test_layers_that_are_made_draw_nothing() -> None:
    """Of a dynamic layer the twin makes one in float."""
    float_model, batches = nets.seeded(Recurrent), list(nets.images(24, 5, 6).split(6))
    mapping = nets.mapping().set_object_type(nn.LSTM, default_dynamic_qconfig)
    _, model = nets.quantize(float_model, batches, mapping=mapping)
    before = torch.get_rng_state()
    cptv_ao.refine(model, batches, float_model=float_model, config=small_config(gradient_steps=4), progress=False)
    cptv_ao.diagnose(model, batches, float_model=float_model, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
