"""The model that was given, where the search starts from an equivalent form of it: what it is judged against, and how
it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cptv_ao.backends.backend import Backend
from cptv_ao.equalize import equalize
from cptv_ao.errors import NonFiniteError
from cptv_ao.report import Losses, Report, Status
from cptv_ao.scoring import Calibration, Scoring, Shipped


@dataclass(frozen=True)
class Given:
    """Losses and state of the model that was given, and what was done to it since, one line each."""

    losses: Losses
    state: Mapping[str, Any]
    done: tuple[str, ...]

    def judge(self, report: Report, backend: Backend) -> Report:
        """What a search on the simulation made of the equivalent form; it goes if it is worse than what was given."""
        if not report.after.worse_than(self.losses):
            return replace(report, before=self.losses, status=Status.IMPROVED)
        backend.restore_all(self.state)
        return replace(report, status=Status.REJECTED, before=self.losses, after=self.losses, moves=())


def equalized(backend: Backend, judge: Scoring | Shipped, calibration: Calibration) -> tuple[Given, Scoring] | None:
    """Make an equivalent form of a model.

    Args:
        backend: of the model, which is written.
        judge: gives the losses that count.
        calibration: as for `Scoring`.

    Returns:
        The model that was given, and what scores the one that is there now, whose tensors are others; None where there
        is no other form, or none that computes numbers.
    """
    state = backend.snapshot()
    done = equalize(backend, calibration.search.batches, calibration.world)
    if not done:
        return None
    now = backend.snapshot()
    backend.restore_all(state)
    given = Given(judge.losses(), state, tuple(done))
    backend.restore_all(now)
    try:
        scoring = Scoring(backend.model, calibration)
    except NonFiniteError:
        scoring = None
    if calibration.world.most(float(scoring is None))[0] or scoring is None:  # each rank looks at its own images
        backend.restore_all(state)
        return None
    return given, scoring
