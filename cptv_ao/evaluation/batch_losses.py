"""What the outputs of a model lose on each batch; the ranks share the batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.errors import CalibrationDataError, FloatModelMismatchError, NonFiniteError
from cptv_ao.core.losses import EachLoss, Loss
from cptv_ao.core.packed_outputs import PackedOutputs, not_finite
from cptv_ao.core.tensors import Select, compared
from cptv_ao.evaluation.race import WAVES
from cptv_ao.evaluation.tail_runner import TailRunner
from cptv_ao.fx.segments import same_stamp


class BatchLosses:
    """Losses of the scales that are in the model now, batch by batch.

    Args:
        runner: runs the model on the batches.
        batches: the images.
        teacher: the teacher's output per batch, (N, ...).
        loss: `(candidate (N, C), teacher (N, C)) -> scalar`.
        select: picks the compared tensor from what the model returns.
        world: the ranks that share the batches.
    """

    def __init__(
        self,
        runner: TailRunner,
        batches: Sequence[Batch],
        teacher: Sequence[Tensor],
        loss: Loss,
        select: Select,
        world: World,
    ) -> None:
        self._runner, self._batches, self._teacher = runner, tuple(batches), tuple(teacher)
        self._loss, self._select, self._world = loss, select, world
        self._ran: _Ran | None = None
        self._first: dict[int, Tensor] = {}  # losses of several outputs per batch, at the first look
        #: images scored so far by this rank, each counted as one forward whether the whole model ran or a tail
        self.image_forwards = 0

    def sums(self, wave: Sequence[int], check: bytes) -> list[float]:
        """The losses of these batches, each times its images and scored by the rank that holds it.

        Args:
            check: what is scored, in bytes: must be the same on all ranks.
        """
        ran = self._ran if self._ran is not None and same_stamp(self._ran.stamp, self._runner.stamp()) else None
        table = torch.zeros(len(self._batches), dtype=torch.float64)
        with torch.inference_mode():
            for index in self._begun(wave) if ran is None else filter(self._world.mine, wave):
                loss = self._loss_of(index) if ran is None else ran.losses[index]
                table[index] = self._batches[index].images * loss
        return [float(loss) for loss in self._world.sum(table[list(wave)], check)]

    def outputs(self) -> list[Tensor]:
        """The compared outputs per batch, (N, C) each; of this rank's batches."""
        with torch.inference_mode():
            return [self._output(index).clone() for index in self._begun(range(len(self._batches)))]

    def check(self) -> None:
        """Run this rank's batches once, and look at what comes out. `sums` then knows the losses of the scales that
        are in the model now.

        Raises:
            FloatModelMismatchError: the model's output has another shape than the teacher's.
            NonFiniteError: the model's output is NaN or infinite.
        """
        losses: dict[int, float] = {}
        with torch.inference_mode():
            for index in self._begun(range(len(self._batches))):
                losses[index] = self._loss_of(index, check=True)
        self._ran = _Ran(self._runner.stamp(), losses)

    def first_by_output(self) -> Tensor:
        """The losses (outputs,) of each of several outputs that `check` has seen, on every rank."""
        count = len(next(iter(self._first.values()))) if self._first else 0
        table = torch.zeros(len(self._batches), int(self._world.most(count)[0]), dtype=torch.float64)
        for index, each in self._first.items():
            table[index] = self._batches[index].images * each
        return self._world.sum(table).sum(0) / sum(batch.images for batch in self._batches)

    def _begun(self, indices: Iterable[int]) -> Iterator[int]:
        """Those of this rank, which have begun to run: no more at one time than are scored between two decisions."""
        mine = [index for index in indices if self._world.mine(index)]
        size = max(1, math.ceil(len(self._batches) / WAVES))
        for start in range(0, len(mine), size):
            wave = mine[start : start + size]
            self._runner.begin(wave)
            yield from wave

    def _output(self, index: int) -> Tensor:
        parts = [compared(part, self._select) for part in self._runner.output(index)]
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
