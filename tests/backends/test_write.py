"""Writing scales: what is written is what is read, what runs, and what a state_dict keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.cases import Case, backend_of
from helpers.state import same_bits, weights
from torch import Tensor

from cptv_ao import InvalidScaleError, QParams, ScaleSite


def moved(now: QParams, site: ScaleSite, factor: float = 2.6) -> QParams:
    """Other qparams that the site can hold."""
    step = (now.zero_point + 9).clamp(site.qmin, site.qmax) if site.affine else now.zero_point
    return QParams(now.scale * factor, step)


def output(case: Case) -> Tensor:
    with torch.inference_mode():
        return case.converted(torch.cat(case.batches)[:16])


def test_read_gives_what_was_written_and_the_output_changes(case: Case) -> None:
    backend, given = backend_of(case), output(case)
    for name, site in backend.sites.items():
        state, wanted = backend.state(name), moved(backend.read(name), site)
        backend.write(name, wanted)
        got = backend.read(name)
        assert torch.equal(got.scale, wanted.scale.float().double()), name
        assert torch.equal(got.zero_point, wanted.zero_point), name
        assert not same_bits(output(case), given), name
        backend.restore(name, state)
        assert same_bits(output(case), given), name


def test_a_zero_point_alone_changes_the_output(case: Case) -> None:
    backend, given = backend_of(case), output(case)
    affine = [site for site in backend.sites.values() if site.affine]
    assert affine
    for site in affine:
        state, now = backend.state(site.name), backend.read(site.name)
        backend.write(site.name, QParams(now.scale, torch.tensor(230 if now.zero_point < 128 else 20)))
        assert not same_bits(output(case), given), site.name
        backend.restore(site.name, state)


def test_restore_is_exact(case: Case) -> None:
    backend, given = backend_of(case), weights(case.converted)
    snapshot = backend.snapshot()
    for name, site in backend.sites.items():
        backend.write(name, moved(backend.read(name), site))
    assert weights(case.converted) != given
    backend.restore_all(snapshot)
    assert weights(case.converted) == given


def test_state_dict_round_trip_is_bit_equal(case: Case) -> None:
    fresh = copy.deepcopy(case.converted)
    backend = backend_of(case)
    for name, site in backend.sites.items():
        backend.write(name, moved(backend.read(name), site, 1.1234567))
    fresh.load_state_dict(case.converted.state_dict())
    with torch.inference_mode():
        assert same_bits(fresh(case.batches[0]), case.converted(case.batches[0]))


@pytest.mark.parametrize("factor", [0.5, 0.93, 1.0, 1.3])
def test_weight_codes_are_rounded_from_the_float_weight_and_clamped(case: Case, factor: float) -> None:
    backend = backend_of(case)
    for name, site in backend.sites.items():
        if site.kind != "weight":
            continue
        assert (site.qmin, site.qmax) == (-4, 3), name
        scale = (backend.read(name).scale * factor).float()
        backend.write(name, moved(backend.read(name), site, factor))
        codes = backend.weight(name).int_repr()
        per_channel = scale.reshape([-1 if d == site.axis else 1 for d in range(codes.dim())])
        wanted = torch.round(backend.float_weights[name] / per_channel).clamp(-4, 3)
        assert torch.equal(codes.float(), wanted), name
        if factor == 0.5:
            assert int(codes.min()) == -4 and int(codes.max()) == 3, name


def test_a_bias_survives_a_new_weight_scale(case: Case) -> None:
    def biases() -> list[bytes]:
        modules = [m for m in case.converted.modules() if hasattr(m, "_weight_bias")]
        packed = [v for v in vars(case.converted).values() if isinstance(v, torch.ScriptObject)]
        assert modules or packed
        found = [m._weight_bias()[1] for m in modules] + [p.unpack()[1] for p in packed]
        return [bias.detach().numpy().tobytes() for bias in found]

    backend, given = backend_of(case), biases()
    for name, site in backend.sites.items():
        backend.write(name, moved(backend.read(name), site))
    assert biases() == given


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), 1e-60])
def test_a_scale_that_no_kernel_can_use_is_refused(conv: Case, value: float) -> None:
    backend, given = backend_of(conv), weights(conv.converted)
    for name in ("conv1.weight", "fc1.output", "scale_4", "swish.output"):
        now = backend.read(name)
        scale = now.scale.clone()
        scale.view(-1)[-1] = value
        with pytest.raises(InvalidScaleError, match=f"{name}: .* scale must be finite and > 0, got ") as caught:
            backend.write(name, QParams(scale, now.zero_point))
        assert caught.value.site == name
    assert weights(conv.converted) == given


def test_the_channel_of_a_bad_scale_is_named(conv: Case) -> None:
    backend = backend_of(conv)
    now = backend.read("conv1.weight")
    now.scale[5] = -0.0021
    with pytest.raises(InvalidScaleError, match=r"conv1.weight: weight scale .* got -0.0021 in channel 5"):
        backend.write("conv1.weight", now)


@pytest.mark.parametrize("zero_point", [-1, 256])
def test_a_zero_point_outside_its_range_is_refused(conv: Case, zero_point: int) -> None:
    backend = backend_of(conv)
    now = backend.read("fc1.output")
    with pytest.raises(InvalidScaleError, match=rf"fc1.output: zero_point must be in 0..255, got {zero_point}"):
        backend.write("fc1.output", QParams(now.scale, torch.tensor(zero_point)))


def test_qparams_of_another_shape_are_refused(conv: Case) -> None:
    backend = backend_of(conv)
    now = backend.read("conv1.weight")
    with pytest.raises(InvalidScaleError, match=r"conv1.weight: expected .* shape \(8,\), got \(7,\) and \(7,\)"):
        backend.write("conv1.weight", QParams(now.scale[:7], now.zero_point[:7]))


def test_what_was_read_does_not_change_with_the_model(case: Case) -> None:
    backend = backend_of(case)
    read = {name: backend.read(name) for name in backend.sites}
    kept = {name: (q.scale.clone(), q.zero_point.clone()) for name, q in read.items()}
    for name, site in backend.sites.items():
        backend.write(name, moved(read[name], site))
    for name, (scale, zero_point) in kept.items():
        assert torch.equal(read[name].scale, scale) and torch.equal(read[name].zero_point, zero_point), name


def test_neither_what_was_read_nor_what_was_written_is_shared_with_the_model(case: Case) -> None:
    backend = backend_of(case)
    for name, site in backend.sites.items():
        given = weights(case.converted)
        read = backend.read(name)
        read.scale.fill_(7.0)
        read.zero_point.fill_(7)
        assert weights(case.converted) == given, name
        written = moved(backend.read(name), site)
        backend.write(name, written)
        given = weights(case.converted)
        written.scale.fill_(7.0)
        written.zero_point.fill_(7)
        assert weights(case.converted) == given, name
