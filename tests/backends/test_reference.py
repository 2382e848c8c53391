"""Reference models: lowered, changed, written back, lowered again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import workloads
from helpers import nets
from helpers.quick import some
from helpers.search import loss_of, small_config
from helpers.state import everything
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends import reference as reference_backend
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights, weight_ranges
from cptv_ao.backends.reference import is_reference, lower, write_back
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.core.qparams import QParams
from cptv_ao.simulation.twin import unquantized

NETS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "conv": lambda: (nets.seeded(nets.ConvNet), list(nets.images(8, 3, 16, 16).split(4))),
    "functional": lambda: (nets.seeded(nets.FunctionalNet), list(nets.images(8, 3, 8, 8).split(4))),
    "vit": lambda: _vit(),
}
# The networks that hold every kind of slot, and beside them, where there is time, one that is deep.
TRIED = ["conv", "functional", pytest.param("vit", marks=pytest.mark.slow)]


def _vit() -> tuple[nn.Module, list[Tensor]]:
    pytest.importorskip("timm", reason="its blocks are timm's")
    return workloads.trained("digits_vit"), list(workloads.digits().calibration(32, 0).split(16))


def _reference(name: str, per_tensor: bool, engine: str = "x86") -> tuple[GraphModule, GraphModule, list[Tensor]]:
    """A reference model, what convert_fx makes of the same prepared model, and batches: the caller's own."""
    torch.backends.quantized.engine = engine
    return copy.deepcopy(_converted(name, per_tensor, engine))


@cache
def _converted(name: str, per_tensor: bool, _: str) -> tuple[GraphModule, GraphModule, list[Tensor]]:
    model, batches = NETS[name]()
    mapping = QConfigMapping().set_global(nets.qconfig(3, per_tensor))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        both = []
        for convert in (convert_to_reference_fx, convert_fx):
            prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
            for batch in batches:
                prepared(batch)
            both.append(convert(prepared))
    return both[0], both[1], batches


def _shaken(backend: Backend) -> None:
    """Write other scales and zero_points, weights included."""
    generator = torch.Generator().manual_seed(0)
    for group in backend.movable().values():
        now = backend.read(group[0].name)
        factor = torch.rand(group[0].shape, generator=generator, dtype=torch.float64) * 0.5 + 0.7
        for site in group:
            zero_point = now.zero_point + 3 if site.affine else now.zero_point
            backend.write(site.name, QParams(now.scale * factor, zero_point))


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", TRIED)
def test_lowered_copy_is_what_convert_fx_returns(name: str, per_tensor: bool) -> None:
    reference, converted, batches = _reference(name, per_tensor)
    lowered = lower(reference)
    with torch.no_grad():
        assert all(torch.equal(lowered(b), converted(b)) for b in batches)
    assert list(Backend(lowered).sites) == list(Backend(converted).sites)
    assert is_reference(reference)
    assert not is_reference(lowered)


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", TRIED)
def test_written_back_scales_lower_to_the_same_model(name: str, per_tensor: bool, engine: str) -> None:
    reference, _, batches = _reference(name, per_tensor, engine)
    lowered = lower(reference)
    backend = Backend(lowered, weight_ranges(reference))
    attach_float_weights(backend, reference)
    assert all(site.qmin == -4 for site in backend.sites.values() if site.kind == "weight" and "functional" not in name)
    with torch.no_grad():
        before = [lowered(b) for b in batches]
        _shaken(backend)
        expected = [lowered(b) for b in batches]
        write_back(lowered, reference)
        again = lower(reference)
        outputs = [again(b) for b in batches]
    assert not any(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    repeated = Backend(again)
    for site in backend.sites.values():
        assert torch.equal(repeated.read(site.name).scale, backend.read(site.name).scale), site.name
        if site.kind == "weight":
            codes = backend.weight(site.name).int_repr()
            assert torch.equal(repeated.weight(site.name).int_repr(), codes)
            assert int(codes.max()) <= site.qmax
            assert int(codes.min()) >= site.qmin


def test_writing_back_unchanged_scales_changes_nothing() -> None:
    reference, _, _ = _reference("conv", False)
    before = copy.deepcopy(reference.state_dict())
    write_back(lower(reference), reference)
    after = reference.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], Tensor))


def test_reference_model_still_runs_and_follows_its_lowered_copy() -> None:
    reference, _, batches = _reference("vit", False)
    lowered = lower(reference)
    backend = Backend(lowered, weight_ranges(reference))
    attach_float_weights(backend, reference)
    with torch.no_grad():
        before = reference(batches[0])
        _shaken(backend)
        write_back(lowered, reference)
        after, kernels = reference(batches[0]), lowered(batches[0])
    assert float((after - kernels).norm()) < 0.5 * float((before - kernels).norm())


def test_float_and_lowered_models_are_not_reference_models(conv: object) -> None:
    model, _ = NETS["conv"]()
    assert not is_reference(model)
    assert not is_reference(torch.fx.symbolic_trace(model))
    with pytest.raises(UnsupportedModelError, match="convert_to_reference_fx returns, got ConvNet"):
        lower(model)  # type: ignore[arg-type]


def test_copy_of_another_model_is_refused_and_nothing_is_written() -> None:
    reference, _, _ = _reference("conv", False)
    other, _, _ = _reference("functional", False)
    before = copy.deepcopy(reference.state_dict())
    with pytest.raises(UnsupportedModelError, match="no place for this scale"):
        write_back(lower(other), reference)
    after = reference.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], Tensor))


def _config(**changes: Any) -> cptv_ao.RefineConfig:
    """Biases are asked for, and not corrected: a reference model keeps its own."""
    return small_config(**({"evaluations": 6, "holdout": 0.5, "population": ("biases",)} | changes))


@pytest.mark.parametrize("score_on", some("kernels", others=["simulation"]))
@pytest.mark.parametrize("teacher", ["float model", "twin"])
@pytest.mark.parametrize("name", TRIED)
def test_a_refined_reference_model_lowers_to_what_was_scored(name: str, teacher: str, score_on: Any) -> None:
    reference, converted, batches = _reference(name, False)
    float_model = NETS[name]()[0] if teacher == "float model" else None
    given = everything(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cptv_ao.CptvWarning)  # float weights are known
        refined = cptv_ao.refine(
            reference, batches, float_model=float_model, config=_config(score_on=score_on), progress=False
        )
    assert refined is reference
    assert everything(reference)["state_dict"] != given["state_dict"]
    assert {k: v for k, v in everything(reference).items() if k not in ("state_dict", "meta")} == {
        k: v for k, v in given.items() if k not in ("state_dict", "meta")
    }
    report = cptv_ao.report(reference)
    assert report.moves
    assert report.sites == len(cptv_ao.find_sites(reference))
    again = lower(reference)
    target = float_model
    if target is None:
        backend = Backend(converted)
        attach_float_weights(backend, NETS[name]()[0])
        target = unquantized(backend).module
    half = len(batches) // 2
    for part, before, after in (
        (batches[:half], report.before.search, report.after.search),
        (batches[half:], report.before.holdout, report.after.holdout),
    ):
        assert loss_of(converted, target, part) == pytest.approx(before, rel=1e-4)
        assert loss_of(again, target, part) == pytest.approx(after, rel=1e-4)
    assert report.after.search < report.before.search


@pytest.mark.parametrize("name", TRIED)
def test_a_reference_model_is_refined_as_what_it_lowers_to(name: str) -> None:
    """The same search as on what convert_fx returns: the outputs are equal bit for bit."""
    reference, converted, batches = _reference(name, False)
    float_model = NETS[name]()[0]
    sites = cptv_ao.find_sites(reference)
    assert list(sites) == list(cptv_ao.find_sites(converted))
    for model in (reference, converted):
        # What convert_fx returns has its biases corrected, and other forms.
        config = _config(weight_range=(-4, 3), population=(), equalize=False)
        cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    assert cptv_ao.report(reference).moves == cptv_ao.report(converted).moves != ()
    again = lower(reference)
    with torch.no_grad():
        assert all(torch.equal(again(b), converted(b)) for b in batches)


def test_a_copy_of_a_reference_model_is_refined_and_the_original_untouched() -> None:
    reference, _, batches = _reference("conv", False)
    given = everything(reference)
    refined = cptv_ao.refine(reference, batches, config=_config(), progress=False, inplace=False)
    assert refined is not reference
    assert everything(reference) == given
    assert cptv_ao.report(refined).moves
    assert everything(refined)["state_dict"] != given["state_dict"]
    cptv_ao.refine(reference, batches, config=_config(), progress=False)
    assert everything(reference)["state_dict"] == everything(refined)["state_dict"]


def test_refining_a_reference_model_twice() -> None:
    reference, _, batches = _reference("conv", False)
    arguments: dict[str, Any] = {"float_model": NETS["conv"]()[0], "progress": False}
    first = cptv_ao.report(cptv_ao.refine(reference, batches, config=_config(), **arguments))
    second = cptv_ao.report(cptv_ao.refine(reference, batches, config=_config(seed=1), **arguments))
    assert second.before == first.after
    assert second.after.search <= second.before.search


@pytest.mark.parametrize("where", ["callback", "write", "written"])
def test_a_reference_model_is_restored_on_any_exception(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, _, batches = _reference("conv", False)
    reference.train()
    reference.meta["mine"] = "kept"
    given = everything(reference)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    settle = reference_backend._settle

    def partly(place: Any, codes: Tensor) -> None:
        settle(place, codes)
        if everything(reference)["state_dict"] != given["state_dict"]:
            fail()

    def written(*arguments: Any) -> None:
        write_back(*arguments)
        assert everything(reference)["state_dict"] != given["state_dict"]
        fail()

    if where == "write":
        monkeypatch.setattr("cptv_ao.backends.reference._settle", partly)
    if where == "written":
        monkeypatch.setattr("cptv_ao.backends.open.write_back", written)
    callback = fail if where == "callback" else None
    with pytest.raises(KeyboardInterrupt):
        cptv_ao.refine(reference, batches, config=_config(), callback=callback, progress=False)
    assert everything(reference) == given


def test_a_reference_model_inside_inference_mode() -> None:
    states = []
    for mode in (torch.enable_grad, torch.inference_mode):
        reference, _, batches = _reference("conv", False)
        with mode():
            cptv_ao.refine(reference, batches, config=_config(), progress=False)
        states.append(everything(reference)["state_dict"])
    assert states[0] == states[1]


def test_float_model_of_another_reference_model_is_refused() -> None:
    reference, _, batches = _reference("conv", False)
    given = everything(reference)
    with pytest.raises(cptv_ao.FloatModelMismatchError, match="its weights are not those"):
        cptv_ao.refine(reference, batches, float_model=nets.seeded(nets.ConvNet, 1), config=_config(), progress=False)
    assert everything(reference) == given
