"""How far a refine is: a listener of the loop, which also tells of what is done before it."""

from __future__ import annotations

import math

from cptv_ao.core.config import RefineConfig
from cptv_ao.core.events import Event
from cptv_ao.core.formatting import number
from cptv_ao.core.progress import Bar
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.evaluation.cost import SCORED_FORWARDS
from cptv_ao.search.budget import Budget
from cptv_ao.search.verdict import Verdict

# What is done before the first result, in forwards of one image, beside those of the images that are scored; how many
# times as long a search is worth its preparation; and how many times the seconds of a call may pass until then, as far
# as that is known, for anything to be tried.
_BEFORE_FIRST, _WORTH, _PAST = 40, 5, 1.25


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

    def begun(self, calibration: Calibration, given: int) -> list[str]:
        """Say what the search works with, once it is known, and when its first result is due.

        Args:
            given: images in the loader.

        Returns:
            What the report is to say of it: whether the seconds are too few.
        """
        cost, limit = calibration.cost, self._budget.max_seconds
        count = f"{calibration.images} of {given}" if calibration.images < given else str(calibration.images)
        told = f"refine: {count} images are scored, {cost.flops / 1e9:.3g} GFLOP a forward"
        if limit is None:
            self._bar.say(told)
            return []
        due = self._budget.seconds + _before_first(calibration)
        told += f", {number(cost.seconds)} s in float; the first result is due after {due:.0f} of {limit:g} s"
        self._bar.say(told)
        if due < limit or calibration.config.accept_on is not None:  # of which `priced` tells
            return []
        return [f"max_seconds={limit:g} is too short for this model on this machine: {_would(due)}"]

    def priced(self, calibration: Calibration, verdict: Verdict) -> str:
        """Say what `accept_on` takes of the seconds, once it was called.

        Returns:
            Why there is no search: the seconds do not pay for a first result, or for what it takes to judge one.
            Nothing where they do.
        """
        limit, price = self._budget.max_seconds, verdict.seconds
        if limit is None:
            return ""
        now, before = self._budget.now, _before_first(calibration)
        if calibration.config.accept_on is None:
            due = now + before - calibration.cost.kernel_seconds * calibration.images  # which have been scored once
            short = f"not searched: max_seconds={limit:g} pays for nothing here: {_would(due)}"
            return "" if due <= _PAST * limit else short
        told = f"accept_on takes {price:.1f} s a call"
        if now + before + price < limit:
            self._bar.say(f"refine: {told}, {limit - now - price:.0f} of {limit:g} s are left for the search")
            return ""
        would = 2 * price + _WORTH * (now - price + before)
        return f"not searched: {told}, max_seconds={limit:g} pays for none after a search; {would:.0f} s are worth it"

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


def _would(due: float) -> str:
    """When a first result is due, and what would do."""
    return f"the first scales are tried after about {math.ceil(due)} s; {math.ceil(_WORTH * due)} s are worth it"


def _before_first(calibration: Calibration) -> float:
    """Seconds until the first result is due."""
    cost = calibration.cost
    return SCORED_FORWARDS * cost.kernel_seconds * calibration.images + _BEFORE_FIRST * cost.seconds
