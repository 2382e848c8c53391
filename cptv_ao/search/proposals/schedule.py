"""How long a descent lasts and how fast it goes, and where it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.formatting import percent

_WARM_UP = 0.1


@dataclass(frozen=True)
class Schedule:
    """How long a descent lasts: `steps` steps, or `seconds` if these are over first, with proposals on the way.

    `marks`: shares of it after which what was found is tried on the kernels.
    """

    steps: int
    learning_rate: float
    seconds: float = math.inf
    marks: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    world: World = ALONE
    started: float = field(default_factory=time.monotonic)

    def progress(self, step: int) -> float:
        """Share of the descent that is over before a step, 0 to 1; the ranks must ask together."""
        done = step / self.steps
        if math.isinf(self.seconds):
            return done
        return max(done, self.world.first(time.monotonic() - self.started) / self.seconds)

    def marks_passed(self, step: int) -> int:
        """How many marks lie behind so many steps; the ranks must ask together."""
        progress = self.progress(step)
        return sum(progress >= mark for mark in self.marks)

    def rate(self, progress: float) -> float:
        """Learning rate: linear warm-up, then a cosine down to zero (Loshchilov & Hutter 2017)."""
        if progress < _WARM_UP:
            return self.learning_rate * (progress + 0.01) / (_WARM_UP + 0.01)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))


@dataclass
class DescentProgress:
    """Where a descent is between two steps, beside what it moves and Adam's moments.

    Attributes:
        steps: so far.
        order: batches of the steps that are next, the last one first.
        proposals, proposed_at: marks of the schedule that are behind the last one, and after how many steps it was.
        caution: what is left of the learning rate after it was sent back.
        feature_pull: what the distance of the features counts.
        accepted: whether anything of it was.
        young: whether less than a quarter of it was over when something was last proposed.
        halvings: how often it has gone half of the way back from what was last proposed, since that was refused.
        over: whether it has come to its end.
    """

    steps: int = 0
    order: list[int] = field(default_factory=list)
    proposals: int = 0
    proposed_at: int = 0
    caution: float = 1.0
    feature_pull: float = 0.0
    accepted: bool = False
    young: bool = False
    halvings: int = 0
    over: bool = False

    def next_batch(self, rng: np.random.Generator, batches: int) -> int:
        """Which of so many batches the next step is on: each once in an order that is drawn, then in another one."""
        if not self.order:
            self.order = [int(index) for index in rng.permutation(batches)]
        return self.order.pop()

    def proposed(self, marks: int) -> str:
        """Remember a proposal behind so many marks; its name."""
        self.proposals, self.proposed_at = marks, self.steps
        return self.name

    @property
    def name(self) -> str:
        """Of what is proposed now."""
        part = f", {percent(self.share)} of the way" if self.halvings else ""
        return f"gradient, {self.steps} steps{part}"

    @property
    def share(self) -> float:
        """Of the way to what was proposed last, that is left behind the halvings."""
        return float(0.5**self.halvings)
