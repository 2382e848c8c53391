"""What the kernels refuse of a descent is tried again nearer to where it came from."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
from helpers.cases import Case, backend_of
from helpers.search import KL, small_config

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.search.proposals import confirmed_descent, proposer, step_images
from cptv_ao.search.proposals.gradient import GradientDescent
from cptv_ao.search.proposals.schedule import Schedule
from cptv_ao.simulation.twin import Twin


def refined(case: Case, seed: int) -> cptv_ao.Report:
    """With steps that are far too large."""
    model = copy.deepcopy(case.converted)
    config = small_config(gradient_steps=4, learning_rate=1.0, passes=0, holdout=0, seed=seed)
    cptv_ao.refine(model, case.batches, float_model=case.float_model, config=config, progress=False)
    return cptv_ao.report(model)


def left(reports: list[cptv_ao.Report]) -> float:
    """Mean share of the loss."""
    return sum(report.after.search / report.before.search for report in reports) / len(reports)


def parts(report: cptv_ao.Report) -> list[str]:
    return [stage for stage in report.stages if "of the way" in stage]


def test_a_part_of_the_way_is_kept_where_the_whole_of_it_is_refused(
    conv: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with and without parts: .30 and .86 of the loss."""
    with_parts = [refined(conv, seed) for seed in range(5)]
    monkeypatch.setattr(confirmed_descent, "_HALVINGS", 0)
    without = [refined(conv, seed) for seed in range(5)]
    kept = [any("accepted" in stage for stage in parts(report)) for report in with_parts]
    assert sum(kept) > 2, kept
    assert not any(map(parts, without))
    assert left(with_parts) < 0.7 * left(without)


@pytest.mark.parametrize(("judging", "tried"), [(1.0, True), (10.0, False)])
def test_parts_are_tried_where_seconds_are_counted_if_judging_costs_little_beside_the_steps(
    conv: Case, monkeypatch: pytest.MonkeyPatch, judging: float, tried: bool
) -> None:
    skipped, clock = 0.0, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + skipped)

    def take_time(event: cptv_ao.Event) -> None:
        nonlocal skipped
        skipped += {"step": 10.0, "proposal": judging}.get(event.kind, 0.0)

    config = small_config(gradient_steps=8, learning_rate=0.03, passes=0, holdout=0, max_seconds=10_000)
    cptv_ao.refine(
        conv.converted, conv.batches, float_model=conv.float_model, config=config, callback=take_time, progress=False
    )
    assert bool(parts(cptv_ao.report(conv.converted))) is tried


@pytest.mark.parametrize("seconds", [None, 10_000])
@pytest.mark.parametrize(("worth", "steps"), [(1e30, 10), (0.0, 2)])
def test_steps_of_few_images_are_shorter_and_more_where_they_are_not_too_dear(
    conv: Case, monkeypatch: pytest.MonkeyPatch, seconds: float | None, worth: float, steps: int
) -> None:
    """A forward is as dear as if it left four images of a hundred to a step."""
    asked: list[tuple[int, float]] = []

    def schedule(steps: int, rate: float, *others: Any) -> Schedule:
        asked.append((steps, rate))
        return Schedule(1, rate, *others)

    monkeypatch.setattr(confirmed_descent, "Schedule", schedule)
    monkeypatch.setattr(proposer, "_STEP_FLOPS", 0.0)
    monkeypatch.setattr(proposer, "_STEP_LEAST", 4)
    monkeypatch.setattr(step_images, "_DESCENT", worth)
    config = small_config(gradient_steps=2, learning_rate=0.05, passes=0, holdout=0, max_seconds=seconds)
    cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False)
    assert asked == [(steps, pytest.approx(0.05 * 0.2))]


def far(descent: GradientDescent, backend: Backend) -> float:
    """How far its scales are from those of the model, on a logarithmic scale: at most."""
    found = descent.scales.assignment()
    return max(float((found[name].scale / backend.read(name).scale).log().abs().max()) for name in found)


def test_a_descent_goes_on_from_a_part_of_its_way_with_smaller_steps(conv: Case) -> None:
    backend = backend_of(conv)
    descent = GradientDescent(Twin(backend), backend.movable(), KL, rng=np.random.default_rng(0))
    descent.scales.rescale({group[0].tied: 2.0 for group in backend.movable().values()})
    gone = far(descent, backend)
    for share in (0.5, 0.25):
        descent.go_half_back_to(backend.read)
        assert far(descent, backend) == pytest.approx(share * gone, rel=1e-3)
    descent.go_on(backend.read)
    assert far(descent, backend) == pytest.approx(0.25 * gone, rel=1e-3)
    course = descent.state()[1]["course"]
    assert (course["caution"], course["halvings"]) == (0.25, 0)
    assert course["accepted"], "two refusals behind it are not its end"


@pytest.mark.parametrize(("young", "share", "caution"), [(True, 1.0, 1.0), (False, 0.0, 0.5)])
def test_a_descent_of_which_no_part_is_accepted_is_sent_back_unless_it_is_young(
    conv: Case, young: bool, share: float, caution: float
) -> None:
    backend = backend_of(conv)
    descent = GradientDescent(Twin(backend), backend.movable(), KL, rng=np.random.default_rng(0))
    tensors, state = descent.state()
    descent.set_state((tensors, {**state, "course": {**state["course"], "young": young}}))
    descent.scales.rescale({group[0].tied: 2.0 for group in backend.movable().values()})
    gone = far(descent, backend)
    for _ in range(2):
        descent.go_half_back_to(backend.read)
    descent.go_back_to(backend.read)
    assert far(descent, backend) == pytest.approx(share * gone, rel=1e-3, abs=1e-6)
    course = descent.state()[1]["course"]
    assert (course["caution"], course["halvings"]) == (caution, 0)
