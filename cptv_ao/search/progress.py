"""How far a refine is: a listener of the loop, which also tells of what is done before it."""

from __future__ import annotations

from cptv_ao.core.config import RefineConfig
from cptv_ao.core.events import Event
from cptv_ao.core.formatting import number
from cptv_ao.core.progress import Bar
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget


def bar_total(config: RefineConfig, blocks: int) -> int:
    """Seconds where they are limited; else steps of the descent and evaluations of the block visits, at most."""
    if config.max_seconds is not None:
        return round(config.max_seconds)
    return config.gradient_steps + config.passes * blocks * config.evaluations


class SearchProgress:
    """Moves a bar: by the seconds where they are limited, else by the steps of the descent and the evaluations.

    Args:
        bar: that is moved.
        budget: of the whole call.
    """

    def __init__(self, bar: Bar, budget: Budget) -> None:
        self._bar, self._budget, self._shown = bar, budget, 0

    def stage(self, told: str) -> None:
        """Say what is done now, before there is a loop."""
        self._move(told, 0)

    def begun(self, calibration: Calibration, given: int) -> None:
        """Say what the search works with, once it is known.

        Args:
            given: images in the loader.
        """
        cost = calibration.cost
        count = f"{calibration.images} of {given}" if calibration.images < given else str(calibration.images)
        told = f"refine: {count} images"
        told += f", {cost.flops / 1e9:.3g} GFLOP a forward"
        if cost.seconds:
            told += f", {number(cost.seconds)} s in float on this machine"
        self._bar.say(told)

    def __call__(self, event: Event) -> None:
        self._move(f"{event.name} loss {number(event.best)}", int(event.kind in ("candidate", "step")))

    def _move(self, told: str, steps: int) -> None:
        limit = self._budget.max_seconds
        if limit is not None:
            seconds = self._budget.seconds
            now = min(round(limit), int(seconds))
            steps, self._shown = now - self._shown, now
            told += f", {max(0.0, limit - seconds):.0f} s left"
        self._bar(told, steps)
