"""A search whose seconds do not pay for all images: it scores some, learns from all, and goes on with the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from helpers.cases import Case
from helpers.search import small_config

import cptv_ao
from cptv_ao.core.events import Event
from cptv_ao.evaluation import cost
from cptv_ao.search.proposals.feature_matching import LayerInputTargets


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of which a forward takes a second, in float and quantized: 100 seconds pay for few of the images."""
    monkeypatch.setattr(cost, "_seconds", lambda model, few: 1.0)
    monkeypatch.setattr(cost, "_LEAST", 4)


def config(**changes: Any) -> cptv_ao.RefineConfig:
    return small_config(gradient_steps=6, max_seconds=100, passes=0, **changes)


@pytest.mark.usefixtures("dear")
def test_some_are_scored_and_all_are_learned_from(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is asked for the first batch, and then the network in float, which gives the same."""
    import cptv_ao.evaluation.teacher as teacher

    taught: list[int] = []
    shown: list[int] = []
    outputs, in_float = teacher.teacher_outputs, LayerInputTargets.outputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        taught.append(sum(batch.images for batch in args[1]))
        return outputs(*args, **kwargs)

    def counted_in_float(self: LayerInputTargets, select: Any, batch: Any) -> Any:
        shown.append(batch.images)
        return in_float(self, select, batch)

    monkeypatch.setattr(teacher, "teacher_outputs", counted)
    monkeypatch.setattr(LayerInputTargets, "outputs", counted_in_float)
    refined = cptv_ao.refine(
        conv.converted, conv.batches, float_model=conv.float_model, config=config(), progress=False
    )
    report = cptv_ao.report(refined)
    given = sum(len(batch) for batch in conv.batches)
    assert sum(report.images) < given == 16
    assert min(report.images) >= 2
    assert taught == [4]
    assert sum(shown) == given - 4, "the pool in the steps: all but the held-out batch, each once"


@pytest.mark.usefixtures("dear")
def test_it_goes_on_with_the_images_that_it_began_with(
    conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search"

    def stop(event: Event) -> Any:
        return cptv_ao.STOP if event.kind == "step" and event.seconds > 0 else None

    stopped = copy.deepcopy(conv.converted)
    arguments: dict[str, Any] = {"float_model": conv.float_model, "config": config(), "progress": False}
    cptv_ao.refine(stopped, conv.batches, checkpoint=path, callback=stop, **arguments)
    first = cptv_ao.report(stopped)
    monkeypatch.setattr(cost, "_seconds", lambda model, few: 1e-6)  # the machine is idle now
    cptv_ao.refine(conv.converted, conv.batches, checkpoint=path, **arguments)
    found = cptv_ao.report(conv.converted)
    assert (found.images, found.before) == (first.images, first.before)
    assert all(stage.startswith("equal forms") for stage in first.stages)
    assert found.stages[-1].startswith("gradient, 6 steps")
