"""What a search has found, as the report tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cptv_ao.core.outcome import Losses, Outcome, Point, Status
from cptv_ao.core.qparams import Assignment
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.loop import Loop


def outcome_of(
    loop: Loop, given: Assignment, calibration: Calibration, settings: dict[str, str], notes: Sequence[str]
) -> Outcome:
    """Of a loop that has run; all ranks together.

    Args:
        given: what was at the sites before.
        settings: the config as it was given, in words.
        notes: what is to be told beside.

    Returns:
        The outcome, with losses of what was searched, and no image-forwards yet.
    """
    moves = loop.space.moves(given)
    start = unsearched(loop.best.start, len(given), calibration, settings, notes, loop.budget.seconds)
    return replace(
        start,
        status=_status(loop, bool(moves)),
        after=loop.best.losses,
        blocks=tuple(loop.results),
        moves=moves,
        stages=tuple(loop.stages),
        evaluations=loop.budget.evaluations,
        history=tuple(loop.best.history),
    )


def unsearched(
    given: Losses, sites: int, calibration: Calibration, settings: dict[str, str], notes: Sequence[str], seconds: float
) -> Outcome:
    """Of a model that was not searched, and is as it was given.

    Args:
        given: its losses.
        sites: of it.
        settings, notes: as above.
        seconds: so far.
    """
    return Outcome(
        status=Status.UNCHANGED,
        loss=calibration.config.loss_name,
        before=given,
        after=given,
        blocks=(),
        moves=(),
        stages=(),
        sites=sites,
        evaluations=0,
        image_forwards=0,
        images=(calibration.search.count, calibration.holdout.count),
        seconds=seconds,
        seed=calibration.config.seed,
        threads=torch.get_num_threads(),
        notes=tuple(notes),
        history=(Point(0, seconds, given.search, given.holdout, True),),
        settings=settings,
    )


def _status(loop: Loop, moved: bool) -> Status:
    if stopped := loop.budget.stopped:
        return stopped
    if not loop.budget.left:
        return Status.BUDGET
    if moved:
        return Status.IMPROVED
    return Status.REJECTED if loop.best.rejected else Status.UNCHANGED
