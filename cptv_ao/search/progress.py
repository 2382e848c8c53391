"""The progress bar of a refine: one of the loop's listeners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from cptv_ao.core.events import Event
from cptv_ao.core.formatting import number
from cptv_ao.search.loop import Loop


@contextmanager
def progress_bar(loop: Loop, enabled: bool) -> Iterator[None]:
    """A tqdm bar over the steps of the descent and the evaluations of the block visits, with the loss."""
    if not enabled:
        yield
        return
    from tqdm.auto import tqdm

    limit = loop.budget.max_seconds
    with tqdm(total=loop.steps if limit is None else None, desc="refine", unit="step") as bar:
        loop.listeners.append(partial(_advance, bar, limit))
        yield


def _advance(bar: Any, limit: float | None, event: Event) -> None:
    if event.kind in ("candidate", "step"):
        bar.update(1)
    left = "" if limit is None else f", {max(0.0, limit - event.seconds):.0f} s left"
    bar.set_postfix_str(f"{event.name} loss {number(event.best)}{left}", refresh=False)
