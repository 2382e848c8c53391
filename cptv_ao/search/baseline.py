"""The model that was given, where the search starts from an equivalent form of it: what it is judged against, and how
it comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.errors import NonFiniteError
from cptv_ao.core.image_subsets import first_images
from cptv_ao.core.outcome import Losses, Outcome, Status
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.evaluation.scoring import SplitEvaluators
from cptv_ao.simulation.nothing_rounded import NothingRounded
from cptv_ao.transforms.equalize import equalize

_Measured = TypeVar("_Measured")


@dataclass(frozen=True)
class Baseline:
    """The model that was given, where there is an equivalent form of it in its place.

    Attributes:
        losses, state: of the model that was given.
        done: to it since, one line each.
        score: makes what scores the form that is there now, whose tensors are others.
    """

    losses: Losses
    state: Mapping[str, Any]
    done: tuple[str, ...]
    score: Callable[[], SplitEvaluators]

    @cached_property
    def scoring(self) -> SplitEvaluators:
        """Scores the form that is there now; it is run as soon as this is asked for."""
        return self.score()

    def judge(self, report: Outcome, backend: Backend) -> Outcome:
        """What a search on the simulation made of the equivalent form; it goes if it is worse than what was given."""
        if not report.after.worse_than(self.losses):
            return replace(report, before=self.losses, status=Status.IMPROVED)
        backend.restore_all(self.state)
        return replace(report, status=Status.REJECTED, before=self.losses, after=self.losses, moves=())


def equalized_baseline(
    backend: Backend, given: Losses, calibration: Calibration, own: NothingRounded, scored: bool
) -> Baseline | None:
    """Make an equivalent form of a model.

    Args:
        backend: of the model, which is written.
        given: its losses, those that count.
        calibration: as for `SplitEvaluators`.
        own: the model in float, on the first of the search images.
        scored: whether the form is scored at once.

    Returns:
        The model that was given; None where there is no other form, or none that computes numbers.
    """
    state = backend.snapshot()

    @cache
    def losses() -> Losses:
        return at_state(backend, state, lambda: SplitEvaluators(backend.model, calibration).losses())

    def confirmed() -> bool:
        scoring = _scoring(backend, calibration)
        return scoring is not None and not scoring.losses().worse_than(losses())

    few = first_images(calibration.search.batches, calibration.cost.images(64, forwards=4, share=0.03))
    done = equalize(backend, few, calibration.world, confirmed, own)
    if not done:
        return None
    if not scored:
        return Baseline(given, state, tuple(done), partial(SplitEvaluators, backend.model, calibration))
    scoring = _scoring(backend, calibration)
    if scoring is None:
        backend.restore_all(state)
        return None
    return Baseline(given, state, tuple(done), lambda: scoring)


def at_state(store: ScaleStore, state: Mapping[str, Any], measured: Callable[[], _Measured]) -> _Measured:
    """What is measured of a model in a state that it was in."""
    now = store.snapshot()
    store.restore_all(state)
    found = measured()
    store.restore_all(now)
    return found


def _scoring(backend: Backend, calibration: Calibration) -> SplitEvaluators | None:
    """Of the model as it is now; None on all ranks where one finds no numbers in its outputs."""
    scoring = None
    with suppress(NonFiniteError):
        scoring = SplitEvaluators(backend.model, calibration)
    return None if calibration.world.most(float(scoring is None))[0] else scoring
