"""How long a search may go on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.outcome import Status

# How many times its seconds a call may last before what follows the search is left out.
_LATE = 1.1


@dataclass
class Budget:
    """Counts evaluations and seconds against the limits of the config; all ranks stop when one is asked to."""

    max_evaluations: int | None = None
    max_seconds: float | None = None
    world: World = ALONE
    started: float = field(default_factory=time.monotonic)
    evaluations: int = 0
    reserved: float = 0.0
    _earlier: float = 0.0
    _asked: Status | None = None

    def stop(self, by: Status = Status.STOPPED) -> None:
        """End the search after what is running now; who says so first is told.

        A signal handler may call it at any time, while the ranks ask each other, too.
        """
        self._asked = self._asked or by

    def reserve(self, seconds: float) -> None:
        """Keep some for what follows the search."""
        self.reserved += seconds

    def count(self) -> None:
        """One more evaluation."""
        self.evaluations += 1

    def go_on_from(self, evaluations: int, seconds: float) -> None:
        """Count on from what was spent on this search before."""
        self.evaluations = evaluations
        self.started -= seconds
        self._earlier = seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def now(self) -> float:
        """The seconds so far, as rank 0 counts them; the ranks must ask together."""
        return self.world.first(self.seconds)

    @property
    def search_seconds(self) -> float | None:
        """Of the call, those until the search must be over; None where they are not limited."""
        return None if self.max_seconds is None else max(self.max_seconds - self.reserved, 0.0)

    def pays(self, seconds: float) -> bool:
        """Whether this call, without those that it goes on from, may take so many more until it has its seconds and a
        tenth behind it; the ranks must ask together."""
        now = self.world.most(self.seconds - self._earlier)[0]
        return self.max_seconds is None or now + seconds <= _LATE * self.max_seconds

    @property
    def stopped(self) -> Status | None:
        """Why all ranks end, where one was asked to; the ranks must ask together."""
        return self._agreed()[0]

    @property
    def left(self) -> bool:
        """Whether to go on; the ranks must ask together."""
        return self.left_until(math.inf)

    def left_until(self, seconds: float) -> bool:
        """Whether to go on, and so many of the seconds are not over; the ranks must ask together, with the same."""
        stopped, now = self._agreed()
        limit = math.inf if self.search_seconds is None else self.search_seconds
        return not stopped and self._in_count and now < min(limit, seconds)

    def end_of(self, share: float) -> float:
        """The seconds of the call at which a stage ends that begins now and has such a share; the ranks must ask
        together."""
        return math.inf if self.max_seconds is None else self.now + share * self.max_seconds

    @property
    def may_score(self) -> bool:
        """Whether what took the seconds to find may still be scored; the ranks must ask together."""
        return not self.stopped and self._in_count

    @property
    def _in_count(self) -> bool:
        return self.max_evaluations is None or self.evaluations < self.max_evaluations

    def _agreed(self) -> tuple[Status | None, float]:
        """Why to end, and the seconds so far: those of the rank that has more of them."""
        reasons = [None, *Status]
        reason, seconds = self.world.most(float(reasons.index(self._asked)), self.seconds)
        return reasons[int(reason)], seconds
