"""Codes of weights stay what they are where the gradient moves their scales, if there are neither few nor many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from helpers.search import KL, step_images
from torch import nn

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.weight_rounding import round_weight
from cptv_ao.search.proposals.gradient import GradientDescent
from cptv_ao.search.proposals.schedule import Schedule
from cptv_ao.simulation.twin import Twin

IMAGES = list(nets.images(24, 16).split(8))


def opened(bits: int) -> Case:
    model = nets.seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)))
    prepared, converted = nets.quantize(model, IMAGES, weight_bits=bits)
    return Case(model, prepared, converted, IMAGES)


def descent_of(backend: Backend) -> GradientDescent:
    return GradientDescent(Twin(backend), backend.movable(), KL, rounding_rate=0.1, rng=np.random.default_rng(0))


def codes(backend: Backend, descent: GradientDescent) -> dict[str, torch.Tensor]:
    """Those that the weights get by what it proposes now."""
    found, floats = descent.scales.assignment(), backend.float_weights
    return {name: round_weight(floats[name], found[name], backend.sites[name]) for name in floats}


def move_scales(descent: GradientDescent, by: float) -> None:
    with torch.no_grad():
        for group in descent.scales.groups:
            if group.shift is not None:
                group.log_scale.add_(by)


@pytest.mark.parametrize("by", [0.06, -0.04])
@pytest.mark.parametrize(("bits", "stay"), [(2, False), (4, True), (6, True), (8, False)])
def test_some_codes_stay_where_a_scale_moves(bits: int, stay: bool, by: float) -> None:
    backend = backend_of(opened(bits))
    descent = descent_of(backend)
    before = codes(backend, descent)
    move_scales(descent, by / (5 if bits == 6 else 1))
    after, scales = codes(backend, descent), descent.scales.assignment()
    turned = sum(int((after[name] != before[name]).sum()) for name in before)
    total = sum(weight.numel() for weight in before.values())
    assert all(not torch.equal(scales[name].scale, backend.read(name).scale) for name in before)
    assert (turned == 0) == stay, f"{turned} of {total}"


def test_they_stay_through_what_is_accepted_and_what_is_refused() -> None:
    backend = backend_of(opened(4))
    descent = descent_of(backend)
    with torch.no_grad():
        for group in descent.scales.groups:
            if group.shift is not None:
                group.shift.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    before = codes(backend, descent)
    move_scales(descent, 0.02)
    for name, qparams in descent.scales.assignment().items():
        backend.write(name, qparams)
    descent.go_on(backend.read)
    assert all(torch.equal(found, before[name]) for name, found in codes(backend, descent).items())
    move_scales(descent, -0.03)
    assert all(torch.equal(found, before[name]) for name, found in codes(backend, descent).items())
    descent.go_half_back_to(backend.read)
    descent.go_back_to(backend.read)
    found = descent.scales.assignment()
    for name in before:
        assert torch.equal(round_weight(backend.float_weights[name], found[name], backend.sites[name]), before[name])
        assert found[name].scale.tolist() == pytest.approx(backend.read(name).scale.tolist(), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_proposed_has_the_codes_that_the_steps_had(bits: int) -> None:
    """But for those that are a 254th of a step from a tie, for a shift is rounded to such parts when it is written."""
    case = opened(bits)
    backend, images = backend_of(case), case.batches[0]
    twin, teacher = Twin(backend), [case.float_model(images).detach()]
    descent = GradientDescent(twin, backend.movable(), KL, rounding_rate=0.3, rng=np.random.default_rng(0))
    schedule = Schedule(20, 0.02, marks=tuple((step + 1) / 20 for step in range(20)))
    given, turned, other, total = codes(backend, descent), 0, 0, 0
    for number, _ in enumerate(descent.run(step_images([Batch((images,), {}, 8)], teacher), schedule)):
        proposed = codes(backend, descent)
        values = {site.name: group.values() for group in descent.scales.groups for site in group.sites}
        with twin.sites.replaced(values), torch.no_grad():
            had = {name: twin.sites.modules[name]().to(proposed[name]) for name in proposed}
        other += sum(int((proposed[name] != had[name]).sum()) for name in had)
        turned += sum(int((proposed[name] != given[name]).sum()) for name in had)
        total += sum(one.numel() for one in had.values())
        if number % 3 == 0:
            for name, qparams in descent.scales.assignment().items():
                backend.write(name, qparams)
            descent.go_on(backend.read)
    assert other < 0.01 * total and turned > 2 * other
