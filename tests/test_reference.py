"""Reference models: lowered, changed, written back, lowered again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import nets
import pytest
import torch
import workloads
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx import GraphModule

from cptv_ao.backends.lowered import LoweredBackend
from cptv_ao.backends.reference import is_reference, lower, write_back
from cptv_ao.errors import UnsupportedModelError
from cptv_ao.sites import QParams
from cptv_ao.weights import find_float_weights, weight_ranges

NETS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "conv": lambda: (nets.seeded(nets.ConvNet), list(nets.images(8, 3, 16, 16).split(4))),
    "functional": lambda: (nets.seeded(nets.FunctionalNet), list(nets.images(8, 3, 8, 8).split(4))),
    "vit": lambda: (workloads.trained("digits_vit"), list(workloads.digits().calibration(32, 0).split(16))),
}


def _reference(name: str, per_tensor: bool, engine: str = "x86") -> tuple[GraphModule, GraphModule, list[Tensor]]:
    """A reference model, what convert_fx makes of the same prepared model, and batches."""
    model, batches = NETS[name]()
    mapping = QConfigMapping().set_global(nets.qconfig(3, per_tensor))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = engine
        both = []
        for convert in (convert_to_reference_fx, convert_fx):
            prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
            for batch in batches:
                prepared(batch)
            both.append(convert(prepared))
    return both[0], both[1], batches


def _shaken(backend: LoweredBackend) -> None:
    """Write other scales and zero_points, weights included."""
    generator = torch.Generator().manual_seed(0)
    for group in backend.movable().values():
        now = backend.read(group[0].name)
        factor = torch.rand(group[0].shape, generator=generator, dtype=torch.float64) * 0.5 + 0.7
        for site in group:
            zero_point = now.zero_point + 3 if site.affine else now.zero_point
            backend.write(site.name, QParams(now.scale * factor, zero_point))


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_lowered_copy_is_what_convert_fx_returns(name: str, per_tensor: bool) -> None:
    reference, converted, batches = _reference(name, per_tensor)
    lowered = lower(reference)
    with torch.no_grad():
        assert all(torch.equal(lowered(b), converted(b)) for b in batches)
    assert list(LoweredBackend(lowered).sites) == list(LoweredBackend(converted).sites)
    assert is_reference(reference) and not is_reference(lowered)


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_written_back_scales_lower_to_the_same_model(name: str, per_tensor: bool, engine: str) -> None:
    reference, _, batches = _reference(name, per_tensor, engine)
    lowered = lower(reference)
    backend = LoweredBackend(lowered, weight_ranges(reference))
    find_float_weights(backend, reference)
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
    repeated = LoweredBackend(again)
    for site in backend.sites.values():
        assert torch.equal(repeated.read(site.name).scale, backend.read(site.name).scale), site.name
        if site.kind == "weight":
            codes = backend.weight(site.name).int_repr()
            assert torch.equal(repeated.weight(site.name).int_repr(), codes)
            assert int(codes.max()) <= site.qmax and int(codes.min()) >= site.qmin


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
    backend = LoweredBackend(lowered, weight_ranges(reference))
    find_float_weights(backend, reference)
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
