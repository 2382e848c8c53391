"""With a GPU, the descent goes on while the kernels judge what it proposed. None is needed to see that: a device that
is said to be no CPU is the CPU under another name."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from helpers.cases import Case

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.evaluation import evaluator
from cptv_ao.search.proposals import confirmed_descent, population, proposer

STEPS = 20


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proposals are made where the kernels are not."""
    for room in (proposer, population, confirmed_descent):
        monkeypatch.setattr(room, "is_cpu", lambda _: False)


def refined(case: Case, callback: Any = None, **changes: Any) -> tuple[list[torch.Tensor], cptv_ao.Report]:
    """The scales that were found, and the report."""
    settings = {"gradient_steps": STEPS, "passes": 0, "population": (), "holdout": 0.0, "loss": "kl", **changes}
    model = cptv_ao.refine(
        copy.deepcopy(case.converted), case.batches, float_model=case.float_model, progress=False, callback=callback,
        config=cptv_ao.RefineConfig(**settings),
    )  # fmt: skip
    backend = Backend(model)
    return [backend.read(name).scale for name in backend.sites], cptv_ao.report(model)


def test_it_finds_the_same_each_time_in_as_many_steps(vit_w3: Case, elsewhere: None) -> None:
    events: list[cptv_ao.Event] = []
    threads: set[int] = set()

    def see(event: cptv_ao.Event) -> None:
        events.append(event)
        threads.add(threading.get_ident())

    first, report = refined(vit_w3, see)
    again, _ = refined(vit_w3)
    assert all(map(torch.equal, first, again))
    assert report.after.search < report.before.search
    told = [event.name for event in events if event.kind in ("step", "proposal")]
    assert told.count("gradient") == STEPS
    proposed = told.index(f"gradient, {STEPS // 4} steps")
    assert told[:proposed].count("gradient") == STEPS // 4 + 2, "it went on beside its own proposal"
    assert threads == {threading.get_ident()}, "listeners are called where refine was"


def test_a_descent_that_a_simulation_judges_waits_for_it(vit_w3: Case, elsewhere: None) -> None:
    """Both would be on the same GPU."""
    told: list[str] = []
    refined(vit_w3, lambda event: told.append(event.name), score_on="simulation")
    proposed = told.index(f"gradient, {STEPS // 4} steps")
    assert told[:proposed].count("gradient") == STEPS // 4


def test_the_judge_is_done_before_anything_else_is_written(
    vit_w3: Case, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging = threading.Event()
    score, write = evaluator.Evaluator.score, Backend.write

    def slow(self: Any, *arguments: Any) -> float:
        judging.set()
        try:
            threading.Event().wait(0.02)
            return score(self, *arguments)
        finally:
            judging.clear()

    def watched(self: Any, *arguments: Any) -> None:
        assert not judging.is_set(), "written while it is judged"
        write(self, *arguments)

    monkeypatch.setattr(evaluator.Evaluator, "score", slow)
    monkeypatch.setattr(Backend, "write", watched)
    assert refined(vit_w3)[1].moves


def test_what_fails_meanwhile_is_raised_and_leaves_the_model(vit_w3: Case, elsewhere: None) -> None:
    model = copy.deepcopy(vit_w3.converted)
    before = model(vit_w3.batches[0])
    seen = 0

    def fail(event: cptv_ao.Event) -> None:
        nonlocal seen
        seen += event.kind == "step"
        if seen > STEPS // 4 + 1:  # beside the first proposal
            raise KeyError("mine")

    config = cptv_ao.RefineConfig(gradient_steps=STEPS, passes=0, population=(), holdout=0.0)
    with pytest.raises(KeyError, match="mine"):
        cptv_ao.refine(
            model, vit_w3.batches, float_model=vit_w3.float_model, config=config, callback=fail, progress=False
        )
    assert torch.equal(model(vit_w3.batches[0]), before)


def test_with_seconds_it_goes_on_until_it_is_judged(
    vit_w3: Case, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, told = evaluator.Evaluator.score, list[str]()

    def slow(self: Any, *arguments: Any) -> float:
        if "gradient" in told:
            threading.Event().wait(0.5)
        return score(self, *arguments)

    def see(event: cptv_ao.Event) -> Any:
        told.append(event.name)
        return cptv_ao.STOP if event.kind == "proposal" and event.name.startswith("gradient, ") else None

    monkeypatch.setattr(evaluator.Evaluator, "score", slow)
    refined(vit_w3, see, gradient_steps=10**6, max_seconds=20.0)
    at_the_mark = int(told[-1].removeprefix("gradient, ").removesuffix(" steps"))
    assert told.count("gradient") > at_the_mark


@pytest.mark.slow
def test_behind_a_checkpoint_it_finds_the_same(vit_w3: Case, elsewhere: None, tmp_path: Any) -> None:
    """Killed in the middle of the descent, and begun again."""
    whole, _ = refined(vit_w3)
    seen = 0

    def kill(event: cptv_ao.Event) -> None:
        nonlocal seen
        seen += 1
        if seen == STEPS // 2 + 4:
            raise KeyboardInterrupt

    settings = {"gradient_steps": STEPS, "passes": 0, "population": (), "holdout": 0.0, "loss": "kl"}
    for callback in (kill, None):
        model = copy.deepcopy(vit_w3.converted)
        try:
            cptv_ao.refine(
                model, vit_w3.batches, float_model=vit_w3.float_model, config=cptv_ao.RefineConfig(**settings),
                callback=callback, checkpoint=tmp_path / "search", progress=False,
            )  # fmt: skip
        except KeyboardInterrupt:
            continue
    backend = Backend(model)
    assert all(map(torch.equal, whole, [backend.read(name).scale for name in backend.sites]))
