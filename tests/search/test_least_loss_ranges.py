"""Activation ranges by what the outputs make of errors: the histogram against looking at every value, and a search."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from helpers.search import small_config
from helpers.state import in_double
from torch import Tensor, nn

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.qparams import Assignment, QParams, rescaled
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.tensors import first_floating
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.evaluation.cost import Cost
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.error_histogram import ErrorHistogram
from cptv_ao.search.proposals.least_loss_ranges import LeastLossRanges, SiteErrors
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.activations import steps_and_gradients
from cptv_ao.simulation.twin import Twin

Groups = Mapping[str, tuple[ScaleSite, ...]]
NOW = QParams(torch.tensor(0.05, dtype=torch.float64), torch.tensor(100))


@pytest.fixture
def site(conv: Case) -> ScaleSite:
    """One of an activation, 0..255."""
    sites = cptv_ao.find_sites(conv.converted).values()
    return next(one for one in sites if one.kind == "activation" and one.affine)


def error(values: Tensor, gradients: Tensor, qparams: QParams, site: ScaleSite) -> float:
    """Of values one by one, that have nothing to do with one another."""
    scale, zero = qparams.scale.float(), qparams.zero_point
    codes = ((values / scale).round() + zero).clamp(site.qmin, site.qmax)
    return float((gradients * ((codes - zero) * scale - values)).square().sum())


def histogram(values: Tensor, gradients: Tensor, now: QParams = NOW) -> ErrorHistogram:
    """Each row of values is a direction of its own."""
    found = ErrorHistogram()
    for row, own in zip(values, gradients, strict=True):
        found.begin()
        found.add(row / now.scale.float(), own)
    return found


def drawn(seed: int, tail: float) -> tuple[Tensor, Tensor]:
    """Values with a tail to one side, and gradients of either sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16, 4096, generator=generator)
    values = torch.where(values > 2, values * tail, values)
    return values, torch.randn(16, 4096, generator=generator)


@pytest.mark.parametrize("tail", [1.0, 8.0, 60.0])
@pytest.mark.parametrize("start", [0.03, 1.0, 20.0])
def test_what_is_found_is_as_good_as_any_of_a_grid(site: ScaleSite, tail: float, start: float) -> None:
    values, gradients = drawn(0, tail)
    now = QParams(NOW.scale * start, NOW.zero_point)
    found = histogram(values, gradients, now).least_error(site, now)
    grid = [
        QParams(torch.tensor(share * float(values.max()) / (255 - zero), dtype=torch.float64), torch.tensor(zero))
        for share in torch.linspace(0.05, 1, 40).tolist()
        for zero in range(5, 255, 10)
    ]
    least = min(error(values, gradients, one, site) for one in grid)
    assert error(values, gradients, found, site) < 1.1 * least
    assert error(values, gradients, found, site) <= error(values, gradients, now, site)


def test_the_default_dtype_finds_no_other_range(site: ScaleSite) -> None:
    values, gradients = drawn(0, 4.0)
    sums = histogram(values, gradients)
    found = sums.least_error(site, NOW)
    with in_double():
        others = histogram(values, gradients)
        other = others.least_error(site, NOW)
    assert others.squares.dtype == sums.squares.dtype and torch.equal(others.squares, sums.squares)
    assert torch.equal(other.scale, found.scale) and torch.equal(other.zero_point, found.zero_point)


def test_outliers_that_nobody_sees_are_clipped_and_others_kept(site: ScaleSite) -> None:
    values, gradients = drawn(1, 1.0)
    values[:, 0] = 200.0
    unseen, seen = gradients.clone(), gradients.clone()
    unseen[:, 0], seen[:, 0] = 0.0, 10.0
    ends = [
        float((site.qmax - found.zero_point) * found.scale)
        for found in (histogram(values, own).least_error(site, NOW) for own in (unseen, seen))
    ]
    assert 2 < ends[0] < 8
    assert 150 < ends[1] < 210


def test_what_is_clipped_together_counts_together(site: ScaleSite) -> None:
    """Many values whose gradients have one sign move the outputs by the sum of their errors, not by its root."""
    values, gradients = drawn(2, 1.0)
    values[:, :40] = 30.0
    apart, together = gradients.clone(), gradients.clone()
    apart[:, :40] = 0.01 * apart[:, :40].sign()
    together[:, :40] = 0.01
    ends = [
        float((site.qmax - found.zero_point) * found.scale)
        for found in (histogram(values, own).least_error(site, NOW) for own in (apart, together))
    ]
    assert ends[0] < ends[1]


def test_without_gradients_nothing_moves(site: ScaleSite) -> None:
    values, gradients = drawn(3, 1.0)
    assert histogram(values, 0 * gradients).least_error(site, NOW) is NOW


def test_a_site_without_a_free_zero_point_keeps_it(site: ScaleSite) -> None:
    values, gradients = drawn(4, 30.0)
    signed, now = replace(site, affine=False, qmin=-128, qmax=127), replace(NOW, zero_point=torch.tensor(0))
    found = histogram(values, gradients, now).least_error(signed, now)
    assert int(found.zero_point) == 0
    assert error(values, gradients, found, signed) < 0.5 * error(values, gradients, now, signed)


def test_codes_stay_where_kernels_do_not_saturate(site: ScaleSite) -> None:
    """Of 127 codes the range takes what it needs, not of 255."""
    values, gradients = drawn(5, 1.0)
    found = histogram(values, gradients).least_error(replace(site, qmax=127), NOW)
    codes = (values / found.scale.float()).round() + found.zero_point
    assert float(codes.quantile(0.999)) < 130
    assert error(values, gradients, found, replace(site, qmax=127)) < error(
        values, gradients, rescaled(NOW, 2.0, site), site
    )


def _ranges(twin: Twin, groups: Groups, parts: Sequence[tuple[Batch, int]]) -> Assignment:
    errors = SiteErrors(twin, groups, "kl", first_floating)
    for part, directions in parts:
        errors.add(part, directions)
    return errors.ranges(groups)


def test_what_the_twin_holds_later_changes_nothing(vit_w3: Case) -> None:
    """Some images before the ranges of the first are in use, some after."""
    backend = backend_of(vit_w3)
    groups = {lead: group for lead, group in backend.movable().items() if group[0].kind == "activation"}
    parts = [Batch((image,), {}, 2) for image in vit_w3.batches[0][:12].split(2)]
    wanted = _ranges(Twin(backend), groups, [(part, 1) for part in parts])
    twin = Twin(backend)
    errors = SiteErrors(twin, groups, "kl", first_floating)
    for part in parts[:3]:
        errors.add(part, 1)
    for name, qparams in errors.ranges(groups).items():
        twin.sites.set(name, qparams)
    for part in parts[3:]:
        errors.add(part, 1)
    found = errors.ranges(groups)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].scale, wanted[name].scale) for name in wanted)
    assert all(torch.equal(found[name].zero_point, wanted[name].zero_point) for name in wanted)


def test_values_and_gradients_are_those_of_the_float_network(vit_w3: Case) -> None:
    twin = Twin(backend_of(vit_w3))
    twin.reround_weights()
    model, outputs = vit_w3.float_model, dict[str, Tensor]()
    batch = vit_w3.batches[0]
    direction = nets.images(*model(batch).shape, seed=7)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [m.register_forward_hook(lambda _, __, y, name=n: outputs.update({name: y})) for n, m in linear.items()]
    number = (model(batch) * direction).sum()
    for hook in hooks:
        hook.remove()
    gradients = dict(zip(outputs, torch.autograd.grad(number, list(outputs.values())), strict=True))
    scales = {f"{name}.output": twin.sites.get(f"{name}.output").scale for name in linear}
    found = steps_and_gradients(twin, scales, Batch((batch,), {}, len(batch)), lambda y: (y * direction).sum())
    for name in linear:
        ((steps, pull),) = found[f"{name}.output"]
        scale = twin.sites.get(f"{name}.output").scale.float()
        assert torch.allclose(steps * scale, outputs[name], atol=1e-4)
        assert torch.allclose(pull / scale, gradients[name], atol=1e-5 * float(gradients[name].abs().max()) + 1e-5)
        assert not steps.requires_grad


def test_a_search_gains_where_a_range_is_far_too_wide(conv: Case) -> None:
    """By these ranges alone: no descent, no visits."""
    backend = backend_of(conv)
    for name, site in backend.sites.items():
        if site.kind == "activation" and site.affine:
            backend.write(name, rescaled(backend.read(name), 12.0, site))
    config = small_config(population=("curvature",), passes=0)
    cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False)
    report = cptv_ao.report(conv.converted)
    assert any(stage.startswith("activation ranges of least loss: accepted") for stage in report.stages)
    assert report.after.search < 0.2 * report.before.search


@pytest.mark.parametrize("over", [False, True])
def test_without_seconds_left_it_looks_at_the_least_images(vit_w3: Case, over: bool) -> None:
    backend = backend_of(vit_w3)
    batches = [Batch((batch,), {}, len(batch)) for batch in vit_w3.batches[:2]]
    search = Images.of(batches, vit_w3.float_model, RefineConfig())
    calibration = Calibration(RefineConfig(max_seconds=60.0), search, cost=Cost(limit=60.0))
    budget = Budget(None, 60.0, started=time.monotonic() - (61.0 if over else 0.0))
    found = LeastLossRanges(Twin(backend), backend.movable(), StepImages(calibration, 8), calibration, budget)
    assert found.assignment(backend, ())
    assert found.done is not over
    assert (found.image_forwards == 3 * 8) is over, found.image_forwards


def test_sites_on_one_scale_get_one(vit_w3: Case) -> None:
    backend = backend_of(vit_w3)
    twin, groups = Twin(backend), {}
    twin.reround_weights()
    for group in backend.movable().values():
        if group[0].kind == "activation":
            groups[group[0].name] = group
    parts = [Batch((image,), {}, 2) for image in vit_w3.batches[0][:16].split(2)]
    found = _ranges(twin, groups, [(part, 1) for part in parts])
    assert set(found) == {site.name for group in groups.values() for site in group if site.name in twin.names}
    assert all(
        found[site.name] is found[group[0].name] for group in groups.values() for site in group if site.name in found
    )


@pytest.mark.slow
def test_directions_of_one_run_are_those_of_runs_of_their_own(vit_w3: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU runs them; in directions that depend on the image alone."""

    def direction(loss: object, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return (outputs * torch.sin(1e3 * outputs.detach())).sum()

    monkeypatch.setattr("cptv_ao.search.proposals.least_loss_ranges.random_direction", direction)
    backend, images = backend_of(vit_w3), torch.cat(list(vit_w3.batches))[:8]
    whole = Batch((images,), {}, 8)
    twin = Twin(backend).checked(whole)
    groups = {lead: group for lead, group in backend.movable().items() if group[0].kind == "activation"}
    plans = {"apart": [(part, 1) for part, _ in whole.parts(4)], "together": [(whole, 4)], "in common": [(whole, 1)]}
    found = {name: _ranges(twin, groups, parts) for name, parts in plans.items()}

    def alike(other: str) -> float:
        pairs = [(found["apart"][name].scale, found[other][name].scale) for name in found["apart"]]
        return sum(abs(float(a / b) - 1) < 0.01 for a, b in pairs) / len(pairs)

    assert alike("together") > 0.9 > alike("in common")


class Joined(nn.Module):
    """A small value, and beside it, on its scale, large ones: a class token and the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 8), 0.01))
        self.patches, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.patches(x)
        return self.head(torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1))


@pytest.mark.parametrize("factor", [1.0, 1.01], ids=["moving together", "moving alone"])
def test_a_range_holds_what_joins_it(factor: float) -> None:
    """torch.cat puts everything on the scale of its first input: one for that alone would clip all others."""
    model, images = nets.seeded(Joined), nets.images(16, 6, 8)
    _, converted = nets.quantize(model, [images])
    given = Backend(converted)
    given.write("patches.output", rescaled(given.read("patches.output"), factor, given.sites["patches.output"]))
    backend, largest = Backend(converted), float(model.get_submodule("patches")(images).abs().max())
    twin, groups = Twin(backend), {lead: group for lead, group in backend.movable().items() if group[0].affine}
    assert ("scale_0" in groups) == (factor != 1)
    found = _ranges(twin, groups, [(Batch((part,), {}, 2), 1) for part in images.split(2)])
    for name in ("patches.output", "scale_0"):
        assert 0.4 * largest < float(found[name].scale) * 255 / 2 < 1.3 * largest
    scales = {name: twin.sites.get(name).scale for name in ("patches.output", "scale_0")}
    seen = steps_and_gradients(twin, scales, Batch((images[:2],), {}, 2), lambda output: output.sum())
    rows = {name: sum(len(steps.flatten()) for steps, _ in parts) // 8 for name, parts in seen.items()}
    assert rows == {"patches.output": 12, "scale_0": 2 if factor == 1 else 14}, "each value once"
