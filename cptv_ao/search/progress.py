"""How far a search is: one of the loop's listeners moves the progress bar of a refine."""

from __future__ import annotations

from cptv_ao.core.config import RefineConfig
from cptv_ao.core.events import Callback, Event
from cptv_ao.core.formatting import number
from cptv_ao.core.progress import Advance
from cptv_ao.search.search_space import SearchSpace


def steps(config: RefineConfig, space: SearchSpace) -> int | None:
    """Steps of the descent and evaluations of the block visits, at most; None where the seconds decide."""
    if config.max_seconds is not None:
        return None
    return config.gradient_steps + config.passes * len(space.blocks) * config.evaluations


def advancing(advance: Advance, limit: float | None) -> Callback:
    """A listener that moves a bar, with the loss and what is left of the seconds."""

    def see(event: Event) -> None:
        left = "" if limit is None else f", {max(0.0, limit - event.seconds):.0f} s left"
        told = f"{event.name} loss {number(event.best)}{left}"
        advance(told, int(event.kind in ("candidate", "step")))

    return see
