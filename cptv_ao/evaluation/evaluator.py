"""Scoring scales: the loss between the model's outputs and the teacher's, on the model's own kernels.

Only the tail of the graph, from the searched block on, runs per candidate:

    Before: x -> stem -> blocks.0 -> ... -> blocks.k -> ... -> head -> logits
    After:  [cached values that cross the cut] -> blocks.k -> ... -> head -> logits

The tail is generated code that runs on the model itself (`cptv_ao.fx.segments`), so a scale that was written is seen at
once and nothing of the model is copied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import CalibrationDataError, FloatModelMismatchError, NonFiniteError
from cptv_ao.core.losses import Loss
from cptv_ao.core.tensors import Select, compared, first_floating
from cptv_ao.evaluation.entry_cache import EntryCache
from cptv_ao.fx.running import has_hooks, run
from cptv_ao.fx.segments import Segments, same_stamp

DEFAULT_CACHE_BYTES = 2 << 30
#: A raced candidate is dropped once its loss on the first wave is above the parent's by this fraction. With k of n
#: waves seen the fraction is lower by sqrt((n - k) / (k (n - 1))), as the error of a mean without replacement is.
RACE_MARGIN = 0.05
#: Rejection is decided after each wave of batches, about so many per candidate however the loader cuts its batches: the
#: decisions depend neither on that nor on how many ranks share a wave.
WAVES = 8


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
        self._model = model
        self._batches = tuple(batches)
        self._teacher = tuple(teacher)
        self._loss = loss
        self._select = select
        self._pieces = Segments(model)
        self._entries = EntryCache(self._pieces, self._batches, cache_bytes, world.mine)
        self._world = world
        self._entered = False
        self._last: tuple[float, ...] | None = None  # losses per batch of the last candidate scored in full
        self._parent: tuple[float, ...] | None = None
        self._ran: _Ran | None = None
        #: races so far
        self.raced = 0
        self.images = sum(batch.images for batch in self._batches)
        #: images scored so far by this rank, each counted as one forward whether the whole model ran or a tail
        self.image_forwards = 0
        #: images run so far to cache block entries
        self.image_entries = 0
        #: seconds spent inside the model so far
        self.forward_seconds = 0.0

    @property
    def entry_bytes(self) -> int:
        """Bytes that the cached block entries hold now."""
        return self._entries.bytes

    def plan(self, blocks: Iterable[Sequence[str]]) -> None:
        """Say which blocks (nodes of each) will be entered, so that the code of each is generated once."""
        for nodes in blocks:
            self._pieces.cut(nodes)

    def enter(self, nodes: Sequence[str]) -> None:
        """Cache what crosses the cut before the first of these nodes, with the scales that are in the model now.

        Not where hooks see the call of the model itself: what runs behind a cut does not call it.
        """
        if has_hooks(self._model):
            return
        started = time.perf_counter()
        self.image_entries += self._entries.move(self._pieces.cut(nodes))
        self._entered = True
        self.forward_seconds += time.perf_counter() - started

    def leave(self) -> None:
        """`score` runs the whole model again. The entries stay, for the next block to start from."""
        self._entered = False

    def invalidate(self) -> None:
        """Drop the cached entries. Writes to the model are noticed by themselves; this frees their memory."""
        self._entries.clear()
        self._entered = False

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
        waves = self._waves(parent, once=parent is None and math.isinf(limit))
        for seen, wave in enumerate(waves, start=1):
            for index, loss in zip(wave, self._losses(wave, check), strict=True):
                losses[index] = loss
                so_far += loss
            if so_far >= limit:
                return math.inf
            if parent is not None:
                parents += sum(parent[index] for index in wave)
                if so_far - parents > _margin(seen, len(waves)) * abs(parents):
                    return math.inf
        total = sum(losses) / self.images
        if total >= threshold:
            return math.inf
        self._last = tuple(losses)
        return total

    def outputs(self) -> list[Tensor]:
        """The compared outputs per batch, (N, C) each; of this rank's batches."""
        with torch.inference_mode():
            return [self._output(i).clone() for i in range(len(self._batches)) if self._world.mine(i)]

    def check(self) -> None:
        """Run this rank's batches once, and look at what comes out. `score` then knows the losses of the scales that
        are in the model now.

        Raises:
            FloatModelMismatchError: the model's output has another shape than the teacher's.
            NonFiniteError: the model's output is NaN or infinite.
        """
        losses: dict[int, float] = {}
        with torch.inference_mode():
            for index in filter(self._world.mine, range(len(self._batches))):
                losses[index] = self._loss_of(index, check=True)
        self._ran = _Ran(self._pieces.stamp(None), losses)

    def _losses(self, wave: Sequence[int], check: bytes) -> list[float]:
        """The summed losses of these batches, each scored by the rank that holds it."""
        ran = self._ran if self._ran is not None and same_stamp(self._ran.stamp, self._pieces.stamp(None)) else None
        table = torch.zeros(len(wave), dtype=torch.float64)
        with torch.inference_mode():
            for place, index in enumerate(wave):
                if self._world.mine(index):
                    loss = self._loss_of(index) if ran is None else ran.losses[index]
                    table[place] = self._batches[index].images * loss
        return [float(loss) for loss in self._world.sum(table, check)]

    def _loss_of(self, index: int, check: bool = False) -> float:
        teacher = self._teacher[index]
        self.image_forwards += self._batches[index].images

        def output() -> Tensor:
            found = self._output(index)
            if check:
                _expect_output(found, teacher, index)
            return found

        return batch_loss(self._loss, output, teacher)

    def _waves(self, parent: Sequence[float] | None, once: bool) -> list[list[int]]:
        """Batches in the order in which they are scored, cut where rejection is decided; `once`: never.

        In a race another batch comes first each time, so that no batch alone decides what the search sees.
        """
        order = list(range(len(self._batches)))
        if once:
            return [order]
        if parent is not None:
            self.raced += 1
            first = self.raced % len(order)
            order = order[first:] + order[:first]
        size = math.ceil(len(order) / WAVES)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _output(self, index: int) -> Tensor:
        started = time.perf_counter()
        output = self._entries.output(index) if self._entered else run(self._model, self._batches[index], index)
        self.forward_seconds += time.perf_counter() - started
        return compared(output, self._select)


@dataclass(frozen=True)
class _Ran:
    """Losses by batch, of this rank, of what the model holds when its stamp is this one."""

    stamp: list[Any]
    losses: dict[int, float]


def _expect_output(output: Tensor, teacher: Tensor, index: int) -> None:
    if output.shape != teacher.shape:
        raise FloatModelMismatchError(
            f"float_model: expected outputs of shape {tuple(output.shape)} as the quantized model gives on batch "
            f"{index}, got {tuple(teacher.shape)}"
        )
    if not bool(torch.isfinite(output).all()):
        raise NonFiniteError(f"the quantized model's output on calibration batch {index} holds NaN or inf")


def batch_loss(loss: Loss, output: Callable[[], Tensor], teacher: Tensor) -> float:
    """Loss of what a model gives for a batch; inf for scales that QNNPACK's add refuses when it runs."""
    try:
        found = output()
    except (RuntimeError, CalibrationDataError):
        if torch.backends.quantized.engine != "qnnpack":
            raise
        return math.inf
    return float(loss(found, teacher))


def _margin(seen: int, waves: int) -> float:
    return RACE_MARGIN * math.sqrt((waves - seen) / (seen * max(waves - 1, 1)))
