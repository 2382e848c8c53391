"""Scoring scales: the loss between the model's outputs and the teacher's, on the model's own kernels.

Only the tail of the graph, from the searched block on, runs per candidate (`TailRunner`), and a candidate that shows
itself to be worse on the way is not scored to the end (`cptv_ao.evaluation.race`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.losses import Loss
from cptv_ao.core.tensors import Select, first_floating
from cptv_ao.evaluation.batch_losses import BatchLosses
from cptv_ao.evaluation.race import WAVES, margin, waves_of
from cptv_ao.evaluation.tail_runner import TailRunner

DEFAULT_CACHE_BYTES = 2 << 30


class Evaluator:
    """Loss of the scales that are in the model now, on one set of images.

    Args:
        model: the lowered model in eval mode; it is run, never written.
        batches: the images.
        teacher: the teacher's output per batch, (N, ...).
        loss: `(candidate (N, C), teacher (N, C)) -> scalar`, averaged over batches weighted by their images.
        select: picks the compared tensor from what the model returns.
        cache_bytes: what the cached block entries may hold; batches beyond it run the whole model.
        world: the ranks that share the batches; each holds the losses of all.
    """

    def __init__(
        self,
        model: GraphModule,
        batches: Sequence[Batch],
        teacher: Sequence[Tensor],
        loss: Loss,
        select: Select = first_floating,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        world: World = ALONE,
    ) -> None:
        self._batches = tuple(batches)
        #: runs the model, and holds what is cached
        self.runner = TailRunner(model, self._batches, cache_bytes, world.mine)
        self._losses = BatchLosses(self.runner, self._batches, teacher, loss, select, world)
        self._last: tuple[float, ...] | None = None  # losses per batch of the last candidate scored in full
        self._parent: tuple[float, ...] | None = None
        #: races so far
        self.raced = 0
        self.images = sum(batch.images for batch in self._batches)

    @property
    def image_forwards(self) -> int:
        """Images scored so far by this rank, each counted as one forward whether the whole model ran or a tail."""
        return self._losses.image_forwards

    def plan(self, blocks: Iterable[Sequence[str]]) -> None:
        """Say which blocks (nodes of each) will be entered, so that the code of each is generated once."""
        self.runner.plan(blocks)

    def enter(self, nodes: Sequence[str]) -> None:
        """From now on run the tail that begins with the first of these nodes, as far as that can be: see
        `TailRunner.enter`."""
        self.runner.enter(nodes)

    def leave(self) -> None:
        """`score` runs the whole model again. The entries stay, for the next block to start from."""
        self.runner.leave()

    def invalidate(self) -> None:
        """Drop the cached entries. Writes to the model are noticed by themselves; this frees their memory."""
        self.runner.clear()

    def keep(self) -> None:
        """Make the candidate that was last scored in full the parent that `score(race=True)` races against."""
        self._parent = self._last

    def go_on_from(self, raced: int) -> None:
        """Count on from so many races, which decide what batch the next one begins with."""
        self.raced = raced

    def score(self, threshold: float = math.inf, race: bool = False, check: bytes = b"") -> float:
        """Loss on all images; `inf` as soon as the partial sum shows that it is not below `threshold`.

        Early rejection is exact for losses that are never negative. With `race` a candidate is also dropped once it
        is behind the parent (see `keep`) on the images seen so far: an accepted candidate was still scored on all
        images, but one that would have caught up may be lost.

        Args:
            threshold: of the rejection.
            race: whether to race against the parent.
            check: what is scored, in bytes: must be the same on all ranks.
        """
        parent = self._parent if race else None
        # Partial sums are added in another order than the total: leave room for their rounding.
        limit = threshold * self.images * (1 + 1e-9)
        losses = [0.0] * len(self._batches)
        so_far = parents = 0.0
        self.raced += parent is not None
        # In a race another batch comes first each time, so that no batch alone decides what the search sees.
        first = 0 if parent is None else self.raced
        never = parent is None and math.isinf(limit)
        waves = waves_of(len(losses), first, most=1 if never else WAVES)
        for seen, wave in enumerate(waves, start=1):
            for index, loss in zip(wave, self._losses.sums(wave, check), strict=True):
                losses[index] = loss
                so_far += loss
            if so_far >= limit:
                return math.inf
            if parent is not None:
                parents += sum(parent[index] for index in wave)
                if so_far - parents > margin(seen, len(waves)) * abs(parents):
                    return math.inf
        total = sum(losses) / self.images
        if total >= threshold:
            return math.inf
        self._last = tuple(losses)
        return total

    def outputs(self) -> list[Tensor]:
        """The compared outputs per batch, (N, C) each; of this rank's batches."""
        return self._losses.outputs()

    def check(self) -> None:
        """Look at the outputs of the scales that are in the model now, see `BatchLosses.check`."""
        self._losses.check()

    def first_by_output(self) -> Tensor:
        """The losses (outputs,) of each of several outputs that `check` has seen, on every rank."""
        return self._losses.first_by_output()
