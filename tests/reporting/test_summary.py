"""The line that says what was gained, and what to try where nothing was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cptv_ao.core.outcome import Losses, Outcome, SiteMove, Status
from cptv_ao.reporting.summary import gained, what_to_try

MOVE = SiteMove("head.output", "activation", "head", 1, 1, 1.0, 3, 1.0, 1.0)
NOTHING = Outcome(
    status=Status.UNCHANGED,
    loss="kl",
    before=Losses(0.25, 0.5),
    after=Losses(0.25, 0.5),
    blocks=(),
    moves=(),
    stages=(),
    sites=74,
    evaluations=55,
    image_forwards=44000,
    images=(800, 200),
    seconds=12.0,
    seed=0,
    threads=1,
)


def test_what_was_gained_is_told_of_images_that_the_search_never_saw() -> None:
    found = replace(NOTHING, status=Status.BUDGET, moves=(MOVE,), after=Losses(0.1, 0.4))
    assert gained(found) == "kl loss -20.0 % on held-out images"
    alone = replace(found, before=Losses(0.25, None), after=Losses(0.1, None))
    assert gained(alone) == "kl loss -60.0 % on search images"
    assert gained(NOTHING) == "The model is as it was given"
    assert what_to_try(found) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "cptv_ao.plan"),
        ({"before": Losses(4e-4, 5e-4)}, "nearly those of float"),
        ({"evaluations": 0}, "no proposal was scored"),
        ({"status": Status.BUDGET}, "the budget ended first"),
        ({"status": Status.REJECTED}, "more varied"),
        ({"images": (64, 16)}, "64 search images are few: about 1,000"),
    ],
)
def test_where_nothing_was_found_the_reason_is_told(changes: dict[str, object], told: str) -> None:
    found = what_to_try(replace(NOTHING, **changes))  # type: ignore[arg-type]
    assert len(found) == 1
    assert found[0].startswith("to try: ") and told in found[0]


def test_who_has_stopped_it_is_told_nothing() -> None:
    assert what_to_try(replace(NOTHING, status=Status.STOPPED)) == []
