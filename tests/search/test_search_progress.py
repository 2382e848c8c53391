"""What a refine says of how far it is."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cptv_ao import RefineConfig
from cptv_ao.core.batches import Batch
from cptv_ao.core.events import Event
from cptv_ao.core.outcome import Losses
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.evaluation.cost import Cost
from cptv_ao.search.budget import Budget
from cptv_ao.search.progress import SearchProgress, bar_total
from cptv_ao.search.verdict import Verdict


class Shown:
    """A bar that remembers what it was told."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, int]] = []
        self.lines: list[str] = []

    def __call__(self, told: str, steps: int = 1, /) -> None:
        self.moves.append((told, steps))

    def say(self, line: str) -> None:
        self.lines.append(line)


def event(kind: Any) -> Event:
    model: Any = SimpleNamespace()
    return Event(kind, "blocks.0", 0, 1, 0.5, 0.25, 1.0, model)


def test_without_a_limit_steps_and_candidates_move_it() -> None:
    shown = Shown()
    progress = SearchProgress(shown, Budget())
    progress.stage("equal forms")
    for kind in ("step", "candidate", "block"):
        progress(event(kind))
    assert [steps for _, steps in shown.moves] == [0, 1, 1, 0]
    assert "loss 0.25" in shown.moves[1][0]
    assert bar_total(RefineConfig(gradient_steps=10, passes=2, evaluations=3), blocks=5) == 40


def test_with_a_limit_its_seconds_do_from_the_start_of_the_call() -> None:
    shown = Shown()
    budget = Budget(None, 60.0, started=time.monotonic() - 40.5)
    progress = SearchProgress(shown, budget)
    progress.stage("equal forms")
    progress(event("step"))
    assert [steps for _, steps in shown.moves] == [40, 0]
    assert "19 s left" in shown.moves[0][0]
    assert bar_total(RefineConfig(max_seconds=59.6), blocks=5) == 60


@pytest.mark.parametrize(("given", "said"), [(4, "refine: 4 images"), (400, "refine: 4 of 400 images")])
def test_the_first_line_says_what_it_works_with(given: int, said: str) -> None:
    shown, batch = Shown(), Batch((torch.zeros(4, 3),), {}, 4)
    calibration = Calibration(
        RefineConfig(),
        Images((batch,), (torch.zeros(4, 2),)),
        cost=Cost(11e9, seconds=0.083, kernel_seconds=0.05, limit=60.0),
    )
    assert SearchProgress(shown, Budget(None, 60.0)).begun(calibration, given) == []
    (line,) = shown.lines
    assert line.startswith(said) and "11 GFLOP" in line and "0.083 s" in line and "due after 4 of 60 s" in line
    (note,) = SearchProgress(shown, Budget(None, 2.0)).begun(calibration, given)
    assert note.startswith("max_seconds=2 is too short") and "after about 4 s; 20 s are worth it" in note
    assert SearchProgress(shown, Budget()).begun(calibration, given) == [], "without a limit there is time"
    ships = replace(calibration, config=RefineConfig(accept_on=lambda model: model))
    assert SearchProgress(shown, Budget(None, 2.0)).begun(ships, given) == [], "`priced` tells, with what that takes"


class Kernels:
    """They need no time."""

    def losses(self) -> Losses:
        return Losses(1.0, None)


def priced(limit: float | None, price: float, spent: float = 0.0, **changes: Any) -> tuple[str, list[str]]:
    """What is said of a judge whose call takes so many seconds of a call that has spent some."""
    budget, shown = Budget(None, limit, started=time.monotonic() - spent), Shown()
    batch = Batch((torch.zeros(4, 3),), {}, 4)
    images = Images((batch,), (torch.zeros(4, 2),))
    calibration = Calibration(RefineConfig(**changes), images, cost=Cost(11e9, 0.025, 0.0, limit=limit))  # 1 s before
    verdict = Verdict(Kernels(), Kernels(), budget, price)
    return SearchProgress(shown, budget).priced(calibration, verdict), shown.lines


def test_what_accept_on_takes_is_told_and_what_it_leaves() -> None:
    ships = {"accept_on": lambda model: model}
    assert priced(60.0, 20.0, spent=22.0, **ships) == (
        "",
        ["refine: accept_on takes 20.0 s a call, 18 of 60 s are left for the search"],
    )
    told, lines = priced(30.0, 20.0, spent=22.0, **ships)
    assert told.startswith(
        "not searched: accept_on takes 20.0 s a call, max_seconds=30 pays for none after a search; 5"
    )
    assert told.endswith(" s are worth it")
    assert lines == []
    assert priced(56.0, 20.0, spent=22.0, **ships)[0] == "", "what it says would do does"
    assert priced(None, 20.0, spent=1e6, **ships) == ("", []), "without a limit there is time"
    assert priced(30.0, 20.0, spent=29.0) == ("", []), "the model's own kernels are planned for before"


def test_nothing_is_tried_where_even_the_first_result_is_far_beyond_the_seconds() -> None:
    assert priced(30.0, 0.0, spent=36.0) == ("", [])
    told, lines = priced(30.0, 0.0, spent=37.0)
    assert told.startswith("not searched: max_seconds=30 pays for nothing here: the first scales are tried after about")
    assert told.endswith(" s are worth it") and lines == []
    assert priced(None, 0.0, spent=1e6) == ("", []), "without a limit there is time"
