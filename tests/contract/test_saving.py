"""Saving and copying a refined model: what torch can, bit for bit; what it cannot, which the report tells, and the way
around."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.quick import some
from helpers.saved_nets import SHAPES, Linears, Plain, SoftmaxModule, made
from helpers.search import small_config
from helpers.state import everything, same_bits, weights
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao


def refined(case: Case) -> Tensor:
    """Refine the case's model; its outputs."""
    config = small_config(evaluations=12, gradient_steps=20, holdout=0)
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    assert cptv_ao.report(case.converted).moves
    return case.converted(case.batches[0])


def notes(model: GraphModule) -> str:
    return "\n".join(cptv_ao.report(model).notes)


def through_file(write: Callable[[Any], None], read: Callable[[Any], Any]) -> Any:
    file = io.BytesIO()
    write(file)
    file.seek(0)
    return read(file)


def pickled(model: GraphModule) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: GraphModule) -> Any:
    return through_file(lambda f: torch.save(model, f), lambda f: torch.load(f, weights_only=False))


def traced(model: GraphModule, images: Tensor) -> Any:
    return through_file(lambda f: torch.jit.save(torch.jit.trace(model, images), f), torch.jit.load)


def scripted(model: GraphModule) -> Any:
    return through_file(lambda f: torch.jit.save(torch.jit.script(model), f), torch.jit.load)


def state_dict_file(model: GraphModule, **how: Any) -> Any:
    return through_file(lambda f: torch.save(model.state_dict(), f), lambda f: torch.load(f, **how))


# What torch can

CASES = ["conv", "functional", "conv per tensor", "functional per tensor", "vit"]


@pytest.mark.parametrize("case", some("conv", others=CASES), indirect=True)
def test_a_deepcopy(case: Case) -> None:
    wanted = refined(case)
    copied = copy.deepcopy(case.converted)
    assert same_bits(copied(case.batches[0]), wanted)
    assert everything(copied) == everything(case.converted)
    assert cptv_ao.report(copied) == cptv_ao.report(case.converted)


@pytest.mark.parametrize("case", some("functional", others=CASES), indirect=True)
def test_a_state_dict_into_a_fresh_conversion(case: Case) -> None:
    fresh = case.copy().converted
    wanted = refined(case)
    assert not same_bits(fresh(case.batches[0]), wanted)
    fresh.load_state_dict(case.converted.state_dict())
    assert same_bits(fresh(case.batches[0]), wanted)
    assert weights(fresh) == weights(case.converted)


@pytest.mark.parametrize("case", some("conv", others=CASES), indirect=True)
def test_a_state_dict_in_a_file(case: Case) -> None:
    fresh = case.copy().converted
    wanted = refined(case)
    fresh.load_state_dict(state_dict_file(case.converted, weights_only=False))
    assert same_bits(fresh(case.batches[0]), wanted)


@pytest.mark.parametrize("case", some("functional", others=CASES), indirect=True)
def test_jit_trace(case: Case) -> None:
    wanted = refined(case)
    again = traced(case.converted, case.batches[0])
    assert same_bits(again(case.batches[0]), wanted)
    fewer = case.batches[1][:3]
    assert same_bits(again(fewer), case.converted(fewer)), "for another number of images too"


@pytest.mark.parametrize("kind", [Plain, Linears, SoftmaxModule])
def test_jit_script(kind: type[nn.Module]) -> None:
    case = made(kind)
    wanted = refined(case)
    assert same_bits(scripted(case.converted)(case.batches[0]), wanted)


@pytest.mark.slow
def test_jit_script_of_a_vit(vit_w3: Case) -> None:
    wanted = refined(vit_w3)
    assert same_bits(scripted(vit_w3.converted)(vit_w3.batches[0]), wanted)


def test_a_model_that_torch_can_save_in_every_way_gets_no_note() -> None:
    case = made(Linears)
    wanted = refined(case)
    assert "saving" not in notes(case.converted)
    for again in (saved(case.converted), pickled(case.converted)):
        assert same_bits(again(case.batches[0]), wanted)
        with pytest.raises(ValueError, match="no report"):  # torch drops it with the graph module
            cptv_ao.report(again)


# What torch cannot: the note is there where it fails, and only there


def works(way: Callable[[], Any], images: Tensor, wanted: Tensor) -> bool:
    try:
        return same_bits(way()(images), wanted)
    except (AttributeError, RuntimeError, pickle.UnpicklingError):
        return False


@pytest.mark.parametrize("kind", some(*[*SHAPES][:2], others=SHAPES))
def test_the_notes_tell_what_fails_and_nothing_else(kind: type[nn.Module]) -> None:
    case, other = made(kind), made(kind, gain=3.0)
    wanted, images = refined(case), case.batches[0]
    model, told = case.converted, notes(case.converted)

    def another_conversion() -> GraphModule:
        fresh = copy.deepcopy(other.converted)
        fresh.load_state_dict(model.state_dict())
        return fresh

    def safe_file() -> GraphModule:
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(state_dict_file(model, weights_only=True))
        return fresh

    assert ("torch.save(model) and pickle" not in told) == works(lambda: saved(model), images, wanted)
    assert ("torch.save(model) and pickle" not in told) == works(lambda: pickled(model), images, wanted)
    assert ("a state_dict does not hold the scale" not in told) == works(another_conversion, images, wanted)
    assert ("weights_only=False" not in told) == works(safe_file, images, wanted)
    assert ("torch.jit.script cannot" not in told) == works(lambda: scripted(model), images, wanted)


@pytest.mark.parametrize("kind", some(*[*SHAPES][2:4], others=SHAPES))
def test_what_the_notes_advise_works(kind: type[nn.Module], tmp_path: Path) -> None:
    case, other = made(kind), made(kind, gain=3.0)
    wanted, images = refined(case), case.batches[0]
    cptv_ao.save_scales(case.converted, tmp_path / "scales")
    assert not same_bits(other.converted(images), wanted)
    assert same_bits(cptv_ao.load_scales(other.converted, tmp_path / "scales")(images), wanted)
    assert same_bits(traced(case.converted, images)(images), wanted)


def test_the_notes_name_the_modules() -> None:
    convolutions, softmax, functional = made(nets.ConvNet), made(SoftmaxModule), made(nets.FunctionalNet)
    for case in (convolutions, softmax, functional):
        refined(case)
    assert "because of conv1 (ConvReLU2d) and 4 more: save with torch.jit.trace" in notes(convolutions.converted)
    assert "scale of soft (Softmax) and 1 more: save with torch.jit.trace" in notes(softmax.converted)
    assert "weights_only=False, because of _packed_weight_0 and 1 more" in notes(functional.converted)


def test_quantized_convolutions_do_not_come_back_from_a_pickle(conv: Case) -> None:
    refined(conv)
    # torch 2.13 does not even write it: this network's annotations are strings
    with pytest.raises(AttributeError, match=r"has no attribute '_(modules|_name__)'"):
        saved(conv.converted)


def test_the_scale_of_a_softmax_is_lost_in_a_state_dict() -> None:
    case, other = made(SoftmaxModule), made(SoftmaxModule, gain=3.0)
    wanted = refined(case)
    assert case.converted.soft.scale != other.converted.soft.scale
    other.converted.load_state_dict(case.converted.state_dict())
    assert not same_bits(other.converted(case.batches[0]), wanted)


def test_torch_export_does_not_take_packed_weights() -> None:
    case = made(Linears)
    refined(case)
    with pytest.raises(AttributeError, match="__obj_flatten__"):
        torch.export.export(case.converted, (case.batches[0],))


def test_a_note_does_not_touch_the_model(case: Case) -> None:
    from cptv_ao.reporting.saving_notes import saving_notes

    given = everything(case.converted)
    saving_notes(case.converted)
    assert everything(case.converted) == given


def with_dynamic_head(qconfig: Any) -> Case:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    float_model = nets.seeded(Linears)
    batches = list(nets.images(16, 6).split(4))
    prepared = prepare_fx(copy.deepcopy(float_model), nets.mapping(3).set_module_name("fc2", qconfig), (batches[0],))
    for batch in batches:
        prepared(batch)
    return Case(float_model, prepared, convert_fx(prepared), batches)


@pytest.mark.parametrize("qconfig", ["default", "per_channel", "float16"])
def test_models_with_dynamic_layers_are_refined_and_kept(qconfig: str, tmp_path: Path) -> None:
    case = with_dynamic_head(getattr(torch.ao.quantization, f"{qconfig}_dynamic_qconfig"))
    fresh = copy.deepcopy(case.converted)
    wanted = refined(case)
    cptv_ao.save_scales(case.converted, tmp_path / "scales")
    assert same_bits(cptv_ao.load_scales(fresh, tmp_path / "scales")(case.batches[0]), wanted)
    told = cptv_ao.find_sites(case.converted)
    assert ("fc2.weight (Linear, in float)" in told.weight_only) == (qconfig == "float16")


def test_scales_of_another_dynamic_layer_are_refused(tmp_path: Path) -> None:
    case = with_dynamic_head(torch.ao.quantization.default_dynamic_qconfig)
    cptv_ao.save_scales(case.converted, tmp_path / "scales")
    weight, bias = case.converted.fc2._weight_bias()
    other = torch.quantize_per_tensor(weight.dequantize(), 2 * weight.q_scale(), 0, torch.qint8)
    case.converted.fc2.set_weight_bias(other, bias)
    given = weights(case.converted)
    with pytest.raises(cptv_ao.ScalesFileError, match=r"another model: fc2\.weight has other scales there"):
        cptv_ao.load_scales(case.converted, tmp_path / "scales")
    assert weights(case.converted) == given


class Inner(nn.Module):
    """A functional op inside a module: torch gives its packed weight a name that it does not know again."""

    class Functional(nn.Linear):
        def forward(self, input):  # type: ignore[no-untyped-def]
            return nn.functional.linear(input, self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), self.Functional(6, 4)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.inner(self.first(x).relu())


class Parametrized(nn.Module):
    """A convolution in float whose weight is computed: it refuses to be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.fc(self.conv(x).mean((2, 3)))


def test_a_state_dict_that_no_model_loads_is_not_advised(tmp_path: Path) -> None:
    case = made(Inner, shape=(6,))
    fresh = case.copy().converted
    wanted = refined(case)
    assert "no model loads the state_dict, because of inner_packed_weight_0" in notes(case.converted)
    assert "weights_only" not in notes(case.converted)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict(case.converted.state_dict())
    cptv_ao.save_scales(case.converted, tmp_path / "scales")
    assert same_bits(cptv_ao.load_scales(fresh, tmp_path / "scales")(case.batches[0]), wanted)


def test_no_module_that_refuses_to_be_pickled_loses_what_was_found() -> None:
    case = made(Parametrized, shape=(3, 8, 8))
    refined(case)
    assert "torch.save(model) and pickle" in notes(case.converted)
