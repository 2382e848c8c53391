"""What a search has found, as the report tells it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cptv_ao.core.outcome import Outcome, Status
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
    config, moves = calibration.config, loop.space.moves(given)
    return Outcome(
        status=_status(loop, bool(moves)),
        loss=config.loss_name,
        before=loop.start,
        after=loop.best,
        blocks=tuple(loop.results),
        moves=moves,
        stages=tuple(loop.stages),
        sites=len(given),
        evaluations=loop.budget.evaluations,
        image_forwards=0,
        images=(calibration.search.count, calibration.holdout.count),
        seconds=loop.budget.seconds,
        seed=config.seed,
        threads=torch.get_num_threads(),
        notes=tuple(notes),
        history=tuple(loop.history),
        settings=settings,
    )


def _status(loop: Loop, moved: bool) -> Status:
    if stopped := loop.budget.stopped:
        return stopped
    if not loop.budget.left:
        return Status.BUDGET
    if moved:
        return Status.IMPROVED
    return Status.REJECTED if loop.rejected else Status.UNCHANGED
