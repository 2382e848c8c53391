"""Proposals for the whole model: the initial population, saturation, and the descent on the twin."""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import pytest
import torch
import workloads
from helpers import nets
from helpers.cases import Case, backend_of
from helpers.quick import some
from helpers.search import KL, small_config, step_images
from torch import Tensor, nn

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import kl
from cptv_ao.core.qparams import rescaled
from cptv_ao.core.tensors import first_floating
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.search.proposals.gradient import GradientDescent, Schedule
from cptv_ao.search.proposals.initial_scales import HALF_CONTAINER, output_error_scales
from cptv_ao.search.scale_space import ScaleSpace
from cptv_ao.simulation.saturation import saturating_inputs
from cptv_ao.simulation.twin import Twin


def test_fbgemm_saturates_in_depthwise_convolutions_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.abs_()
        model[1].weight.fill_(0.5)  # every code 127, so that products add up
    images = torch.rand(16, 3, 8, 8)
    _, converted = workloads.quantize(model, [images], reduce_range=False, engine="fbgemm")
    backend = Backend(converted)
    found = saturating_inputs(converted, Twin(backend), Batch((images,), {}, 16))
    assert set(found) == {"0.output"} and found["0.output"] > 200
    for site in backend.sites.values():  # below code 128 no kernel saturates
        if site.affine:
            backend.write(site.name, rescaled(backend.read(site.name), 1 / HALF_CONTAINER, site))
    assert saturating_inputs(converted, Twin(backend), Batch((images,), {}, 16)) == {}


def test_scales_of_least_output_error_are_those_of_an_exhaustive_search(vit_w3: Case) -> None:
    backend = backend_of(vit_w3)
    twin = Twin(backend)
    twin.reround_weights()
    name = "blocks.1.mlp.fc1.weight"
    images = vit_w3.batches[0]
    layer = vit_w3.float_model.get_submodule("blocks.1.mlp.fc1")
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        vit_w3.float_model(images)
    hook.remove()
    found = output_error_scales(twin, [name], Batch((images,), {}, len(images)))[name].scale
    given = backend.read(name).scale

    def errors(scale: torch.Tensor) -> torch.Tensor:
        weight = layer.weight.detach().double()
        codes = (weight / scale[:, None]).round().clamp(-4, 3)
        return ((seen[0].double() @ (codes * scale[:, None] - weight).T) ** 2).sum(0)

    best = torch.stack([errors(given * 10**x) for x in np.linspace(-0.45, 0.1, 23)]).amin(0)
    assert torch.allclose(errors(found), best, rtol=0.02)
    assert float(errors(found).sum()) < 0.9 * float(errors(given).sum())


def test_a_descent_lowers_the_loss_on_the_kernels(vit_w2: Case) -> None:
    backend = backend_of(vit_w2)
    batches = [Batch((x,), {}, len(x)) for x in vit_w2.batches]
    teacher = teacher_outputs(vit_w2.float_model, batches)
    evaluator = Evaluator(vit_w2.converted, batches, teacher, kl)
    before = evaluator.score()
    rng = np.random.default_rng(0)
    descent = GradientDescent(Twin(backend), backend.movable(), KL, activation_rate=3.0, rng=rng)
    losses: list[float] = []
    *_, (name, scales) = descent.run(step_images(batches, teacher), Schedule(20, 0.03, marks=(0.5, 1.0)), losses.append)
    assert name == "gradient, 20 steps"
    assert len(losses) == descent.steps == 20
    space = ScaleSpace(backend, backend.movable())
    space.write(space.repair(space.from_assignment(scales())))
    assert evaluator.score() < 0.5 * before


@pytest.mark.parametrize(("bits", "share"), [pytest.param(3, 1.0, marks=pytest.mark.slow), (4, 1.0), (8, 0.26)])
def test_weights_of_many_codes_move_slower(vit: nn.Module, digits: workloads.Images, bits: int, share: float) -> None:
    images = digits.train[:20]
    vit = copy.deepcopy(vit)  # prepare_fx leaves its qconfig on the modules
    prepared, converted = workloads.quantize(vit, [images], weight_bits=bits)
    backend = backend_of(Case(vit, prepared, converted, [images]))
    batches = [Batch((images,), {}, len(images))]
    rng = np.random.default_rng(0)
    descent = GradientDescent(Twin(backend), backend.movable(), KL, activation_rate=3.0, rng=rng)
    images_of = step_images(batches, teacher_outputs(vit, batches))
    next(iter(descent.run(images_of, Schedule(2, 0.03, marks=(0.5, 1.0)))))
    moved = {"weight": 0.0, "activation": 0.0}
    for name, qparams in descent.scales.assignment().items():
        step = (qparams.scale / backend.read(name).scale).log().abs().max()
        kind = backend.sites[name].kind
        moved[kind] = max(moved[kind], float(step))
    assert moved["weight"] == pytest.approx(moved["activation"] * share / 3, rel=0.02)  # Adam's first step is the rate


@torch.no_grad()
def test_what_the_descent_sees_is_what_it_proposes(conv: Case) -> None:
    """Zero_points behind a ReLU are 0 and are pulled below it, where there are no codes."""
    backend = backend_of(conv)
    images = conv.batches[0]
    batches, teacher = [Batch((images,), {}, len(images))], [conv.float_model(images).detach()]
    rng = np.random.default_rng(0)
    descent = GradientDescent(Twin(backend), backend.movable(), KL, activation_rate=10.0, rng=rng)
    other = Twin(backend)
    other.reround_weights()
    seen: list[float] = []
    proposed = []
    marks = tuple((step + 1) / 30 for step in range(30))
    for _ in descent.run(step_images(batches, teacher), Schedule(30, 0.03, marks=marks), seen.append):
        for name, qparams in descent.scales.assignment().items():
            other.sites.set(name, qparams)
        proposed.append(float(kl(first_floating(other(images)), teacher[0])))
    assert seen[1:] == pytest.approx(proposed[:-1], rel=1e-3)


@pytest.mark.parametrize(("accepted", "wanted"), [((), [5, 10]), ((0,), [5, 10, 15, 20]), ((1,), [5, 10, 15, 20])])
def test_a_descent_of_which_nothing_is_accepted_ends_at_the_second_time(
    conv: Case, accepted: tuple[int, ...], wanted: list[int]
) -> None:
    backend, images = backend_of(conv), conv.batches[0]
    batches, teacher = [Batch((images,), {}, len(images))], [conv.float_model(images).detach()]
    descent = GradientDescent(Twin(backend), backend.movable(), KL, rng=np.random.default_rng(0))
    proposed = []
    for number, _ in enumerate(descent.run(step_images(batches, teacher), Schedule(20, 0.03))):
        proposed.append(descent.steps)
        if number in accepted:
            descent.go_on(backend.read)
        else:
            descent.go_back_to(backend.read)
    assert proposed == wanted
    assert descent.over


def test_a_schedule_ends_with_its_steps_or_its_seconds() -> None:
    steps = Schedule(10, 0.1)
    assert [steps.progress(i) for i in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert steps.rate(0.1) == pytest.approx(0.1)
    assert steps.rate(1.0) == pytest.approx(0.0)
    assert Schedule(10**9, 0.1, seconds=1e-9).progress(1) >= 1.0
    assert math.isinf(Schedule(1, 0.1).seconds)


@pytest.mark.parametrize("passes", some(1, others=[0]))
def test_what_all_seconds_were_spent_on_is_tried(vit_w3: Case, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descent ends with the seconds (or leaves some for the visits); its last state is scored all the same."""
    steps, skipped, clock = 0, 0.0, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + skipped)

    def count(event: cptv_ao.Event) -> None:
        nonlocal steps, skipped
        steps += event.kind == "step"
        if steps == 5:
            skipped = 90.0 if passes else 100.0

    config = small_config(gradient_steps=10**6, passes=passes, holdout=0, max_seconds=100)
    float_model, batches = vit_w3.float_model, vit_w3.batches
    cptv_ao.refine(vit_w3.converted, batches, float_model=float_model, config=config, callback=count, progress=False)
    assert steps == 5
    assert cptv_ao.report(vit_w3.converted).stages[-1].startswith("gradient, 5 steps: ")


class InfinitePadding(nn.Module):
    """timm's MaxPool2dSame: what is padded with -inf is quantized, and the gradient of its scale is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.conv(x), (0, 1, 0, 1), value=float("-inf"))
        return self.fc(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    float_model = nets.seeded(InfinitePadding)
    batches = list(nets.images(16, 3, 7, 7).split(4))
    _, model = nets.quantize(float_model, batches, mapping=cptv_ao.qconfig_mapping(3))  # histograms
    config = small_config(gradient_steps=20, passes=0, holdout=0)
    cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    report = cptv_ao.report(model)
    assert report.after.search < report.before.search
    assert bool(torch.isfinite(model(batches[0])).all())
