"""What a refine came to, in a line, and what to try where it came to nothing."""

from __future__ import annotations

from cptv_ao.core.formatting import change, number
from cptv_ao.core.outcome import Outcome, Status

# Images to search on of which a person is told that they are few, and what a good number is; and the losses from which
# on the outputs are those of float but for details, where a loss has a scale of its own.
_FEW, _GOOD = 200, 1000
_SMALL = {"kl": 1e-3, "cosine": 1e-3}


def gained(report: Outcome) -> str:
    """In words: how much of the loss is gone, on the images that the search never saw where there are some."""
    if not report.moves and report.after == report.before:
        return "The model is as it was given"
    before, after, images = report.before.holdout, report.after.holdout, "held-out images"
    if before is None or after is None:
        before, after, images = report.before.search, report.after.search, "search images"
    told = change(before, after) if before > 0 else f"{number(before)} to {number(after)}"
    return f"{report.loss} loss {told} on {images}"


def what_to_try(report: Outcome) -> list[str]:
    """Sentences: why nothing was found, as far as the report shows it, and what may help; none where something was."""
    if report.moves or report.status in (Status.STOPPED, Status.CALLBACK):
        return []
    told, small = [], _SMALL.get(report.loss)
    worst = max(report.before.search, report.before.holdout or 0.0)
    if small is not None and worst < small:
        told.append(f"a {report.loss} of {number(worst)} leaves little to gain: outputs are nearly those of float")
    if not report.evaluations:
        told.append("no proposal was scored: see the notes for what stood in the way")
    if report.status is Status.BUDGET:
        told.append("the budget ended first: more seconds or evaluations, or none of these limits")
    if report.status is Status.REJECTED:
        told.append(
            "what was better on the search images was not on the others: more, and more varied, images that are like "
            "those that the model will see"
        )
    if report.images[0] < _FEW:
        told.append(f"{report.images[0]} search images are few: about {_GOOD:,} are a good number")
    if not told:
        told.append(
            "scales may not be what is missing: cptv_ao.diagnose tells which layer costs most, cptv_ao.plan which to "
            "leave in float"
        )
    return [f"to try: {one}" for one in told]
