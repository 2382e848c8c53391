"""What a search found, as values: status, losses, moves, points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

META_KEY = "cptv_ao"


class Status(Enum):
    """How a refine ended; the value is the sentence that the report shows."""

    IMPROVED = "improved: the refined scales are in the model"
    UNCHANGED = "unchanged: no better scales were found, the model is as it was given"
    REJECTED = (
        "rejected: better in the search, worse on the held-out images or on the kernels; the model is as it was given"
    )
    STOPPED = "stopped by Ctrl-C: the best scales found until then are in the model"
    CALLBACK = "stopped by the callback: the best scales found until then are in the model"
    BUDGET = "budget ended: the best scales found until then are in the model"


@dataclass(frozen=True)
class SiteMove:
    """How far one site moved, in a `Report`.

    Attributes:
        name, kind, block: of the site.
        scales: how many it has: 1 per tensor, C per channel.
        moved: how many of them have another value.
        log2: largest `|log2(new / old)|` of its scales: 1 is twice or half as large.
        zero_point: largest step of a zero_point, in codes.
        low, high: least and greatest log2(new / old) of its scales, with their signs.
        codes: of a weight: how many it has; 0 of an activation.
        turned: how many of these are not the nearest ones to the float weight, but those on its other side.
        corrected: whether its layer has another bias.
    """

    name: str
    kind: str
    block: str
    scales: int
    moved: int
    log2: float
    zero_point: int
    low: float
    high: float
    codes: int = 0
    turned: int = 0
    corrected: bool = False


@dataclass(frozen=True)
class BlockResult:
    """One visit of a block, in a `Report`.

    Attributes:
        name: of the block.
        visit: which pass over the blocks it belongs to; 0 is the first.
        evaluations: candidates that were scored in it.
        accepted: how many of them became the best so far.
        before, after: loss on the search images at its start and at its end.
    """

    name: str
    visit: int
    evaluations: int
    accepted: int
    before: float
    after: float


@dataclass(frozen=True)
class Losses:
    """Losses of one set of scales, in the unit of the loss that the report names.

    Attributes:
        search: mean over the images that are searched on.
        holdout: mean over those that only accept or reject; None without any.
    """

    search: float
    holdout: float | None

    @property
    def mean(self) -> float:
        """Mean of both: few held-out images are noisy, and the search images are overfitted."""
        return self.search if self.holdout is None else (self.search + self.holdout) / 2

    def worse_than(self, others: Losses) -> bool:
        """Whether one of both is higher, or no number."""
        pairs = [(self.search, others.search)]
        if self.holdout is not None and others.holdout is not None:
            pairs.append((self.holdout, others.holdout))
        return any(not (math.isfinite(own) and own <= other) for own, other in pairs)


@dataclass(frozen=True)
class OutputLoss:
    """What one output of the model lost, in a `Report`.

    Attributes:
        name: keys, fields and indices that lead to it, with dots between; `output` where it is all.
        loss: by which it is compared.
        before, after: of several outputs in `size`, so that their mean is the loss of all.
        size: what the best output would lose that is the same for all images; 1 where there is one output only.
    """

    name: str
    loss: str
    before: Losses
    after: Losses
    size: float = 1.0


@dataclass(frozen=True)
class Point:
    """The search at one moment: at its start, after a proposal, or at the end of a block visit.

    Attributes:
        evaluations: candidates that were scored until then.
        seconds: since the call of `refine`, with those before a checkpoint.
        search: the lowest loss on the search images so far.
        holdout: the loss of the same scales on the held-out images; None without any, or where it is no number.
        kept: whether these scales were accepted as the best state so far, held-out images included.
    """

    evaluations: int
    seconds: float
    search: float
    holdout: float | None
    kept: bool


@dataclass(frozen=True)
class Outcome:
    """What one `refine` did.

    `history` is the search on what it ran on: with `score_on="simulation"` the losses of the simulation, where
    `before` and `after` are those of the kernels. `settings` are those of the `RefineConfig`, in words. `outputs` are
    the outputs that are compared, each with its own losses.
    """

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
    history: tuple[Point, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    outputs: tuple[OutputLoss, ...] = ()


def per_block(blocks: Sequence[BlockResult]) -> list[tuple[str, int, int, int, float, float]]:
    """The visits of each block together: name, visits, evaluations, accepted, loss before the first, after the last."""
    rows = []
    for name in dict.fromkeys(block.name for block in blocks):
        visits = [block for block in blocks if block.name == name]
        evaluations, accepted = (sum(getattr(v, part) for v in visits) for part in ("evaluations", "accepted"))
        rows.append((name, len(visits), evaluations, accepted, visits[0].before, visits[-1].after))
    return rows
