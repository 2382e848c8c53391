"""Scoring scales: the loss between the model's outputs and the teacher's, on the model's own kernels.

Only the tail of the graph, from the searched block on, runs per candidate (`TailRunner`), and a candidate that shows
itself to be worse on the way is not scored to the end (`cptv_ao.evaluation.race`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import CalibrationDataError, FloatModelMismatchError, NonFiniteError
from cptv_ao.core.losses import EachLoss, Loss
from cptv_ao.core.packed_outputs import PackedOutputs, not_finite
from cptv_ao.core.tensors import Select, compared, first_floating
from cptv_ao.evaluation.race import WAVES, margin, waves_of
from cptv_ao.evaluation.tail_runner import TailRunner
from cptv_ao.fx.segments import same_stamp

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
        self._teacher = tuple(teacher)
        self._loss = loss
        self._select = select
        self._world = world
        #: runs the model, and holds what is cached
        self.runner = TailRunner(model, self._batches, cache_bytes, world.mine)
        self._last: tuple[float, ...] | None = None  # losses per batch of the last candidate scored in full
        self._parent: tuple[float, ...] | None = None
        self._ran: _Ran | None = None
        self._first: dict[int, Tensor] = {}  # losses of several outputs per batch, at the first look
        #: races so far
        self.raced = 0
        self.images = sum(batch.images for batch in self._batches)
        #: images scored so far by this rank, each counted as one forward whether the whole model ran or a tail
        self.image_forwards = 0

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
            for index, loss in zip(wave, self._losses(wave, check), strict=True):
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
        with torch.inference_mode():
            return [self._output(index).clone() for index in self._begun(range(len(self._batches)))]

    def check(self) -> None:
        """Run this rank's batches once, and look at what comes out. `score` then knows the losses of the scales that
        are in the model now.

        Raises:
            FloatModelMismatchError: the model's output has another shape than the teacher's.
            NonFiniteError: the model's output is NaN or infinite.
        """
        losses: dict[int, float] = {}
        with torch.inference_mode():
            for index in self._begun(range(len(self._batches))):
                losses[index] = self._loss_of(index, check=True)
        self._ran = _Ran(self.runner.stamp(), losses)

    def first_by_output(self) -> Tensor:
        """The losses (outputs,) of each of several outputs that `check` has seen, on every rank."""
        count = len(next(iter(self._first.values()))) if self._first else 0
        table = torch.zeros(len(self._batches), int(self._world.most(count)[0]), dtype=torch.float64)
        for index, each in self._first.items():
            table[index] = self._batches[index].images * each
        return self._world.sum(table).sum(0) / self.images

    def _losses(self, wave: Sequence[int], check: bytes) -> list[float]:
        """The summed losses of these batches, each scored by the rank that holds it."""
        ran = self._ran if self._ran is not None and same_stamp(self._ran.stamp, self.runner.stamp()) else None
        table = torch.zeros(len(self._batches), dtype=torch.float64)
        with torch.inference_mode():
            for index in self._begun(wave) if ran is None else filter(self._world.mine, wave):
                loss = self._loss_of(index) if ran is None else ran.losses[index]
                table[index] = self._batches[index].images * loss
        return [float(loss) for loss in self._world.sum(table[list(wave)], check)]

    def _begun(self, indices: Iterable[int]) -> Iterator[int]:
        """Those of this rank, which have begun to run: no more at one time than are scored between two decisions."""
        mine = [index for index in indices if self._world.mine(index)]
        size = max(1, math.ceil(len(self._batches) / WAVES))
        for start in range(0, len(mine), size):
            wave = mine[start : start + size]
            self.runner.begin(wave)
            yield from wave

    def _output(self, index: int) -> Tensor:
        parts = [compared(part, self._select) for part in self.runner.output(index)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _loss_of(self, index: int, check: bool = False) -> float:
        teacher = self._teacher[index]
        self.image_forwards += self._batches[index].images

        def output() -> Tensor:
            found = self._output(index)
            if check:
                _expect_output(found, teacher, index, self._select)
                if isinstance(self._loss, EachLoss):
                    self._first[index] = self._loss.each(found, teacher)
            return found

        return batch_loss(self._loss, output, teacher)


@dataclass(frozen=True)
class _Ran:
    """Losses by batch, of this rank, of what the model holds when its stamp is this one."""

    stamp: list[Any]
    losses: dict[int, float]


def _expect_output(output: Tensor, teacher: Tensor, index: int, select: Select) -> None:
    if output.shape != teacher.shape:
        shapes = [
            select.told(t) if isinstance(select, PackedOutputs) else str(tuple(t.shape)) for t in (output, teacher)
        ]
        raise FloatModelMismatchError(
            f"float_model: expected outputs of shape {shapes[0]} as the quantized model gives on batch {index}, got "
            f"{shapes[1]}"
        )
    if bad := not_finite(select, output):
        raise NonFiniteError(f"the quantized model's {bad} on calibration batch {index} holds NaN or inf")


def batch_loss(loss: Loss, output: Callable[[], Tensor], teacher: Tensor) -> float:
    """Loss of what a model gives for a batch; inf for scales that QNNPACK's add refuses when it runs."""
    try:
        found = output()
    except (RuntimeError, CalibrationDataError):
        if torch.backends.quantized.engine != "qnnpack":
            raise
        return math.inf
    return float(loss(found, teacher))
