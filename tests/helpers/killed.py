"""A refine with a checkpoint that ends in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cptv_ao
from helpers.cases import Case
from helpers.search import small_config

CONFIG = small_config(passes=2, evaluations=4, gradient_steps=8, population=("output_error", "ranges", "biases"))


class Killed(Exception):
    pass


def refine(case: Case, path: Path | None, *, kill_at: int | None = None, **changes: Any) -> list[cptv_ao.Event]:
    """Refine with a checkpoint; raise at an event of the search."""
    events: list[cptv_ao.Event] = []

    def watch(event: cptv_ao.Event) -> None:
        events.append(event)
        if kill_at is not None and len(events) > kill_at:
            raise Killed

    cptv_ao.refine(
        case.converted,
        changes.pop("batches", case.batches),
        float_model=case.float_model,
        config=replace(CONFIG, **changes),
        callback=watch,
        checkpoint=path,
        progress=False,
    )
    return events
