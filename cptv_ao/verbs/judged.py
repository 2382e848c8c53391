"""What a search has made of the model that ships, and what its kernels and its residual streams have to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from cptv_ao.backends.backend import Backend
from cptv_ao.core.outcome import Outcome
from cptv_ao.evaluation.calibration import PROBE_FORWARDS, Calibration
from cptv_ao.evaluation.output_scores import OutputScores
from cptv_ao.search.baseline import at_state
from cptv_ao.search.target import KernelTarget
from cptv_ao.simulation.kernel_agreement import agreement_notes, broken_kernels
from cptv_ao.transforms.stream_outliers import stream_notes

# Said where the seconds are over.
_UNSEEN = "max_seconds left no time to look where kernels saturate, and which channels of a residual stream stand out"


def judged(
    found: Outcome,
    target: KernelTarget,
    backend: Backend,
    given: Mapping[str, Any],
    calibration: Calibration,
    pays: bool,
) -> Outcome:
    """The report of what ships, and what kernels and streams have to say.

    Args:
        found: what the search reports.
        given: the state of the model as it was given.
        pays: whether the seconds leave time for the twin of that.
    """
    probe = calibration.probe
    looked = partial(agreement_notes, config=calibration.config) if pays else broken_kernels
    kernels = at_state(backend, given, lambda: looked(backend, probe))
    report = target.judged(replace(found, notes=(*found.notes, *kernels)))
    streams = stream_notes(backend, probe) if pays else [_UNSEEN]
    return replace(report, notes=(*report.notes, *streams))


def told_seconds(calibration: Calibration, scores: OutputScores) -> float:
    """What it takes to find what is told beside the verdict on a search."""
    cost = calibration.cost
    probes = 2 * PROBE_FORWARDS * calibration.probe.images * cost.seconds
    return probes + scores.verdict_forwards * cost.kernel_seconds
