"""What a search is scored on: the calibration images, the teacher's outputs, and evaluators of a model on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cptv_ao.config import RefineConfig
from cptv_ao.data import Batch
from cptv_ao.errors import FloatModelMismatchError, NonFiniteError
from cptv_ao.evaluator import Evaluator, first_floating, run, teacher_outputs
from cptv_ao.losses import get_loss
from cptv_ao.report import Losses


@dataclass(frozen=True)
class Images:
    """Batches, and the teacher's output (N, C) on each."""

    batches: tuple[Batch, ...]
    targets: tuple[Tensor, ...]

    @staticmethod
    def of(batches: Sequence[Batch], teacher: nn.Module, config: RefineConfig) -> Images:
        """Run the teacher once."""
        return Images(tuple(batches), tuple(teacher_outputs(teacher, batches, config.output or first_floating)))


class Scoring:
    """Evaluators of one model on the search images and, where there are any, on the held-out ones.

    Raises:
        FloatModelMismatchError: the model's output has another shape than the teacher's.
        NonFiniteError: the model's output is NaN or infinite.
    """

    def __init__(self, model: GraphModule, search: Images, holdout: Images, config: RefineConfig) -> None:
        self.search = _evaluator(model, search, config)
        self.holdout = _evaluator(model, holdout, config) if holdout.batches else None

    @property
    def image_forwards(self) -> int:
        """Images scored so far."""
        return self.search.image_forwards + (self.holdout.image_forwards if self.holdout else 0)

    def losses(self) -> Losses:
        """Of the scales that are in the model now."""
        return Losses(self.search.score(), None if self.holdout is None else self.holdout.score())


def _evaluator(model: GraphModule, images: Images, config: RefineConfig) -> Evaluator:
    select, loss = config.output or first_floating, get_loss(config.loss, config.temperature)
    evaluator = Evaluator(model, images.batches, images.targets, loss, select, config.cache_bytes)
    for index, (output, target) in enumerate(zip(evaluator.outputs(), images.targets, strict=True)):
        if output.shape != target.shape:
            raise FloatModelMismatchError(
                f"float_model: expected outputs of shape {tuple(output.shape)} as the quantized model gives on batch "
                f"{index}, got {tuple(target.shape)}"
            )
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError(f"the quantized model's output on calibration batch {index} holds NaN or inf")
    return evaluator


class Shipped:
    """Losses of what a function makes of a model (`torch.compile`), each time of a fresh copy of it.

    Args:
        model: whose scales change between calls.
        make: gives what is run.
        search, holdout: as for `Scoring`.
    """

    def __init__(
        self, model: GraphModule, make: Callable[[Any], Any], search: Images, holdout: Images, config: RefineConfig
    ) -> None:
        self._model, self._make = model, make
        self._search, self._holdout = search, holdout
        self._select, self._loss = config.output or first_floating, get_loss(config.loss, config.temperature)

    def losses(self) -> Losses:
        """Of the scales that are in the model now."""
        made = self._make(copy.deepcopy(self._model))
        with torch.no_grad():
            held_out = self._mean(made, self._holdout) if self._holdout.batches else None
            return Losses(self._mean(made, self._search), held_out)

    def _mean(self, made: Callable[..., Any], images: Images) -> float:
        total = 0.0
        for index, (batch, target) in enumerate(zip(images.batches, images.targets, strict=True)):
            output = self._select(run(made, batch, index)).flatten(1)
            total += float(self._loss(output, target)) * batch.images
        return total / sum(batch.images for batch in images.batches)
