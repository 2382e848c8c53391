"""What the last `refine` did to a model, as a value that prints as the table a person wants."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from torch import nn

from cptv_ao.table import table

META_KEY = "cptv_ao"


class Status(Enum):
    """How a refine ended; the value is the sentence that the report shows."""

    IMPROVED = "improved: the refined scales are in the model"
    UNCHANGED = "unchanged: no better scales were found, the model is as it was given"
    REJECTED = (
        "rejected: better in the search, worse on the held-out images or on the kernels; the model is as it was given"
    )
    STOPPED = "stopped by Ctrl-C: the best scales found until then are in the model"
    BUDGET = "budget ended: the best scales found until then are in the model"


@dataclass(frozen=True)
class SiteMove:
    """How far one site moved: largest |log2(new / old)| of its scales, largest zero_point step."""

    name: str
    kind: str
    block: str
    scales: int
    moved: int
    log2: float
    zero_point: int


@dataclass(frozen=True)
class BlockResult:
    """One visit of a block: loss on the search images before and after."""

    name: str
    visit: int
    evaluations: int
    accepted: int
    before: float
    after: float


@dataclass(frozen=True)
class Losses:
    """Losses on the search images and on the held-out ones (None without held-out images)."""

    search: float
    holdout: float | None

    @property
    def mean(self) -> float:
        """Mean of both: few held-out images are noisy, and the search images are overfitted."""
        return self.search if self.holdout is None else (self.search + self.holdout) / 2


@dataclass(frozen=True)
class Report:
    """Result of one `refine`; `str()` is a table, `to_dict()` is JSON-safe."""

    status: Status
    loss: str
    before: Losses
    after: Losses
    blocks: tuple[BlockResult, ...]
    moves: tuple[SiteMove, ...]
    stages: tuple[str, ...]
    sites: int
    evaluations: int
    image_forwards: int
    images: tuple[int, int]
    seconds: float
    seed: int
    threads: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        data = asdict(self)
        data["status"] = self.status.name
        data["message"] = self.status.value
        return data

    def __str__(self) -> str:
        lines = [f"cptv_ao.refine: {self.status.value}", ""]
        lines += table(
            [
                ("loss", "before", "after", "change"),
                (f"{self.loss}, {self.images[0]} search images", *_change(self.before.search, self.after.search)),
            ]
            + (
                [(f"{self.loss}, {self.images[1]} held-out images", *_change(self.before.holdout, self.after.holdout))]
                if self.before.holdout is not None and self.after.holdout is not None
                else []
            )
        )
        lines += ["", *self.stages] if self.stages else []
        if self.blocks:
            rows = [("block", "visits", "evaluations", "accepted", "loss before", "after")]
            for name in dict.fromkeys(block.name for block in self.blocks):
                visits = [block for block in self.blocks if block.name == name]
                rows.append(
                    (
                        name,
                        str(len(visits)),
                        str(sum(v.evaluations for v in visits)),
                        str(sum(v.accepted for v in visits)),
                        f"{visits[0].before:.5g}",
                        f"{visits[-1].after:.5g}",
                    )
                )
            lines += ["", *table(rows)]
        lines += ["", f"{len(self.moves)} of {self.sites} sites moved"]
        if self.moves:
            lines[-1] += "; the farthest:"
            far = sorted(self.moves, key=lambda m: -m.log2)[:8]
            moved = [("site", "scales moved", "largest factor", "zero_point step")]
            moved += [(m.name, f"{m.moved} of {m.scales}", f"{2**m.log2:.3f}", str(m.zero_point)) for m in far]
            lines += table(moved)
        lines += ["", *self.notes] if self.notes else []
        lines.append("")
        lines.append(
            f"{self.evaluations} evaluations, {self.image_forwards} image-forwards, {self.seconds:.1f} s, "
            f"{self.threads} thread{'s' if self.threads != 1 else ''}, seed {self.seed}"
        )
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """The report of the last `refine` of this model.

    Raises:
        ValueError: the model was not refined (or lost its `meta` when it was copied or reloaded).
    """
    found = getattr(model, "meta", {}).get(META_KEY)
    if not isinstance(found, Report):
        raise ValueError("no report: expected a model that cptv_ao.refine returned; call refine(model, ...) first")
    return found


def _change(before: float, after: float) -> tuple[str, str, str]:
    change = f"{100 * (after / before - 1):+.1f} %" if before > 0 else "-"
    return f"{before:.5g}", f"{after:.5g}", change
