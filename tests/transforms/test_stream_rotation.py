"""Residual streams that refine rotates in lowered models: equal in float, and nearer to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of, in_float
from helpers.state import everything
from helpers.streams import (
    Bare,
    Crossed,
    Cut,
    Functions,
    Headless,
    NoBias,
    NormTwice,
    Pooled,
    Returned,
    Rows,
    Scaled,
    SharedLayer,
    Sized,
    SquareHead,
    Stream,
    Text,
    TiedText,
    Towers,
    WithRelu,
    images,
)
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import cptv_ao

TURNED = "residual stream of 3 sums rotated"
SMALL = cptv_ao.RefineConfig(max_evaluations=4, gradient_steps=0)
# The output is of a token of its own, or of fewer images than a hundred.
pytestmark = pytest.mark.filterwarnings("ignore:the float network's output is the same for all")


def quantized(make: Any, seed: int = 0, batches: list[Tensor] | None = None) -> Case:
    model = nets.seeded(make, seed)
    batches = [images(16, i) for i in range(4)] if batches is None else batches
    return Case(model, *nets.quantize(model, batches), batches)


def refined(case: Case, config: cptv_ao.RefineConfig = SMALL) -> list[str]:
    """What the report says of rotations."""
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    return [note for note in cptv_ao.report(case.converted).notes if "sums rotated" in note]


@torch.no_grad()
def error(case: Case, test: Tensor, loss: str) -> float:
    """How far a model is from the float one, as this loss sees it."""
    found, wanted = case.converted(test), case.float_model(test)
    if loss == "kl":
        found, wanted = found.log_softmax(-1), wanted.log_softmax(-1)
    return float((found - wanted).square().mean())


@pytest.mark.parametrize("make", [Stream, SquareHead, Headless, Bare, Pooled, Functions, Sized, NoBias, Rows])
def test_a_stream_is_rotated_and_the_function_stays(make: Any) -> None:
    case, plain = quantized(make), quantized(make)
    given, test = copy.deepcopy(case.float_model.state_dict()), images(32, seed=9)
    (note,) = refined(case)
    loss = str(cptv_ao.report(case.converted).loss)
    assert TURNED in note
    assert error(case, test, loss) < 0.3 * error(plain, test, loss)
    backend = backend_of(case)  # finds the float weights again
    with torch.no_grad():
        torch.testing.assert_close(in_float(backend, test), case.float_model(test), rtol=2e-3, atol=2e-3)
    assert all(torch.equal(value, given[name]) for name, value in case.float_model.state_dict().items())


@pytest.mark.parametrize("make", [WithRelu, Returned, NormTwice, Scaled, Cut, Crossed], ids=lambda make: make.__name__)
def test_what_is_read_or_written_otherwise_stays(make: Any) -> None:
    case = quantized(make)
    keys, code = set(case.converted.state_dict()), case.converted.code
    assert not refined(case)
    assert set(case.converted.state_dict()) == keys and case.converted.code == code


def test_a_layer_at_two_places_stays_the_same_at_both() -> None:
    case, test = quantized(SharedLayer), images(32, seed=9)
    refined(case)
    with torch.no_grad():
        torch.testing.assert_close(in_float(backend_of(case), test), case.float_model(test), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [Text, TiedText])
def test_words_are_rotated(make: Any) -> None:
    words = [(torch.arange(80) * (7 + i) % 11).reshape(16, 5) for i in range(4)]
    case = quantized(make, batches=words)
    table = case.float_model.words.weight.detach().clone()
    (note,) = refined(case)
    assert "residual stream of" in note
    with torch.no_grad():
        got, wanted = case.converted(words[0]), case.float_model(words[0])
        assert float((got - wanted).square().mean()) < 1e-3 * float(wanted.var())
    assert torch.equal(case.float_model.words.weight, table), "what was only given was written"


def test_what_has_no_outliers_stays() -> None:
    case = quantized(lambda: Headless(0.0))
    code = case.converted.code
    assert not refined(case) and case.converted.code == code


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_that_stays_in_float_is_rotated_where_it_has_a_bias(bias: bool) -> None:
    model, batches = nets.seeded(Stream if bias else NoBias), [images(16, i) for i in range(4)]
    mapping = nets.mapping(8).set_module_name("head", None)
    prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
    for batch in batches:
        prepared(batch)
    case, test = Case(model, prepared, convert_fx(prepared), batches), images(32, seed=9)
    assert type(case.converted.head) is nn.Linear
    head = case.converted.head.weight.detach().clone()
    assert len(refined(case)) == int(bias)
    assert torch.equal(case.converted.head.weight, head) is not bias
    with torch.no_grad():
        torch.testing.assert_close(in_float(backend_of(case), test), case.float_model(test), rtol=2e-3, atol=2e-3)


def test_where_a_norm_is_returned_a_linear_layer_turns_back() -> None:
    case = quantized(Headless)
    keys = set(case.converted.state_dict())
    refined(case)
    assert set(case.converted.state_dict()) - keys == {"rotated_back.weight", "rotated_back.bias"}
    assert type(case.converted.rotated_back) is nn.Linear
    again = copy.deepcopy(case.converted)
    test = images(8, seed=9)
    assert torch.equal(again(test), case.converted(test))


def test_each_of_two_towers_is_rotated_alone() -> None:
    case, test = quantized(Towers), images(32, seed=9)
    assert len(refined(case)) == 2
    with torch.no_grad():
        for got, wanted in zip(case.converted(test), case.float_model(test), strict=True):
            assert float((got - wanted).square().mean()) < 0.01 * float(wanted.var())


def test_a_name_that_is_taken_is_left() -> None:
    case = quantized(Headless)
    case.converted.rotated_back = nn.Identity()
    refined(case)
    assert type(case.converted.rotated_back_1) is nn.Linear


def test_on_an_error_the_model_is_as_it_was() -> None:
    case = quantized(Headless)
    state, code = everything(case.converted), case.converted.code

    def stop(_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cptv_ao.refine(
            case.converted, case.batches, float_model=case.float_model, config=SMALL, callback=stop, progress=False
        )
    assert everything(case.converted) == state and case.converted.code == code


def test_where_the_form_is_not_kept_no_layer_is_left() -> None:
    """A second refine on images that the first one knows has the form; a copy of the model is not written."""
    case = quantized(Headless)
    state, code = everything(case.converted), case.converted.code
    found = cptv_ao.refine(
        case.converted, case.batches, float_model=case.float_model, config=SMALL, progress=False, inplace=False
    )
    assert "rotated_back" in found.code
    assert everything(case.converted) == state and case.converted.code == code
    with pytest.raises(cptv_ao.FloatModelMismatchError):
        cptv_ao.refine(case.converted, case.batches, float_model=nets.seeded(Headless, 1), progress=False)
    assert everything(case.converted) == state and case.converted.code == code


@pytest.mark.parametrize("make", [Stream, Headless, Functions])
def test_it_is_refined_again(make: Any) -> None:
    case = quantized(make)
    refined(case)
    known, keys = cptv_ao.report(case.converted).after, set(case.converted.state_dict())
    assert not refined(case), "it is rotated once"
    report = cptv_ao.report(case.converted)
    assert report.before == known and not report.after.worse_than(known)
    assert set(case.converted.state_dict()) == keys


@pytest.mark.parametrize("make", [Stream, Headless, Text])
def test_its_scales_go_into_another_conversion_and_back(make: Any, tmp_path: Path) -> None:
    batches = [torch.arange(80).reshape(16, 5) % 11] if make is Text else None
    case, other = (quantized(make, batches=batches) for _ in range(2))
    test, before = case.batches[0], other.converted(case.batches[0])
    cptv_ao.save_scales(other.converted, tmp_path / "given")
    (_,) = refined(case)
    cptv_ao.save_scales(case.converted, tmp_path / "refined")
    code = other.converted.code
    cptv_ao.load_scales(other.converted, tmp_path / "refined")
    assert torch.equal(other.converted(test), case.converted(test))
    assert not refined(other), "it knows the float weights"
    cptv_ao.load_scales(other.converted, tmp_path / "given")
    assert torch.equal(other.converted(test), before) and other.converted.code == code


def test_a_file_of_another_model_changes_nothing(tmp_path: Path) -> None:
    case, other = quantized(Headless), quantized(Bare)
    refined(case)
    cptv_ao.save_scales(case.converted, tmp_path / "refined")
    state, code = everything(other.converted), other.converted.code
    with pytest.raises(cptv_ao.ScalesFileError):
        cptv_ao.load_scales(other.converted, tmp_path / "refined")
    taken = quantized(Headless)
    taken.converted.rotated_back = nn.Identity()
    with pytest.raises(cptv_ao.ScalesFileError, match="rotated_back"):
        cptv_ao.load_scales(taken.converted, tmp_path / "refined")
    assert everything(other.converted) == state and other.converted.code == code


def test_the_prepared_model_gives_float_weights_too() -> None:
    case = quantized(Headless)
    prepared = prepare_fx(copy.deepcopy(case.float_model), nets.mapping(8), (case.batches[0],))
    for batch in case.batches:
        prepared(batch)
    (_,) = refined(Case(prepared, prepared, case.converted, case.batches))
    assert not refined(Case(prepared, prepared, case.converted, case.batches)), "it is rotated once"


def test_a_search_on_the_simulation_ships_it() -> None:
    case = quantized(Headless)
    config = cptv_ao.RefineConfig(max_evaluations=4, gradient_steps=2, score_on="simulation")
    (_,) = refined(case, config)
    report = cptv_ao.report(case.converted)
    assert report.after.search < 0.3 * report.before.search and "rotated_back" in case.converted.code


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    config, events = cptv_ao.RefineConfig(max_evaluations=12, gradient_steps=4, seed=1), list[Any]()
    whole, parts = quantized(Headless), quantized(Headless)
    refined(whole, config)

    def interrupt(event: Any) -> None:
        events.append(event)
        if len(events) == 8:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"float_model": parts.float_model, "config": config, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        cptv_ao.refine(parts.converted, parts.batches, checkpoint=tmp_path / "search", callback=interrupt, **arguments)
    assert "rotated_back" not in parts.converted.code
    cptv_ao.refine(parts.converted, parts.batches, checkpoint=tmp_path / "search", **arguments)
    test = images(8, seed=9)
    assert torch.equal(parts.converted(test), whole.converted(test))


def test_an_embedding_stays_one() -> None:
    case = quantized(Headless)
    refined(case)
    assert cptv_ao.report(case.converted).loss == "cosine"
    refined(case)
    assert cptv_ao.report(case.converted).loss == "cosine"
