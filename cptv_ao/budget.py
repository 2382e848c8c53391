"""How long a search may go on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cptv_ao.report import Status
from cptv_ao.world import ALONE, World


@dataclass
class Budget:
    """Counts evaluations and seconds against the limits of the config; all ranks stop when one is asked to."""

    max_evaluations: int | None
    max_seconds: float | None
    world: World = ALONE
    started: float = field(default_factory=time.monotonic)
    evaluations: int = 0
    stopped: Status | None = None

    def stop(self, by: Status = Status.STOPPED) -> None:
        """End the search after what is running now; who says so first is told."""
        self.stopped = self.stopped or by

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> bool:
        """Whether to go on; the ranks must ask together."""
        may_score, seconds = self._state()
        return may_score and (self.max_seconds is None or seconds < self.max_seconds)

    @property
    def may_score(self) -> bool:
        """Whether what took the seconds to find may still be scored; the ranks must ask together."""
        return self._state()[0]

    def _state(self) -> tuple[bool, float]:
        """Whether neither a stop nor the count of evaluations ends it, and the seconds so far."""
        reasons = [None, *Status]
        reason, seconds = self.world.most(float(reasons.index(self.stopped)), self.seconds)
        self.stopped = reasons[int(reason)]
        in_count = self.max_evaluations is None or self.evaluations < self.max_evaluations
        return not self.stopped and in_count, seconds
