"""What a search is scored on: the calibration images, the teacher's outputs, and evaluators of a model on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.distributed import World
from cptv_ao.core.errors import NonFiniteError
from cptv_ao.core.losses import EachLoss, JointLoss, get_exact_loss
from cptv_ao.core.outcome import Losses
from cptv_ao.core.tensors import Select, compared
from cptv_ao.evaluation.batch_losses import batch_loss
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.fx.running import run

# What block visits may cost without a gain, and in all where neither seconds nor evaluations are given, in floating
# point operations of the float network.
_IDLE, _VISITS = 2e14, 5e13


class SplitEvaluators:
    """Evaluators of one model on the search images and, where there are any, on the held-out ones.

    Raises:
        FloatModelMismatchError: the model's output has another shape than the teacher's.
        NonFiniteError: the model's output is NaN or infinite.
    """

    def __init__(self, model: GraphModule, calibration: Calibration) -> None:
        config, world = calibration.config, calibration.world
        #: images that visits may score on without a gain before they are given up; none behind the descent of a GPU,
        #: which makes some ten steps where the kernels score once
        self.idle_images = _IDLE / calibration.cost.flops
        #: images that visits may score on in all
        limited = config.max_seconds is not None or config.max_evaluations is not None
        self.visit_images = math.inf if limited else _VISITS / calibration.cost.flops
        if config.gradient_steps and not is_cpu(config.device):
            self.idle_images = 0.0
        self.search = _evaluator(model, calibration.search, config, world)
        self.holdout = _evaluator(model, calibration.holdout, config, world) if calibration.holdout.batches else None

    @property
    def image_forwards(self) -> int:
        """Images scored so far by this rank."""
        return self.search.image_forwards + (self.holdout.image_forwards if self.holdout else 0)

    def losses(self) -> Losses:
        """Of the scales that are in the model now."""
        return Losses(self.search.score(), None if self.holdout is None else self.holdout.score())

    def by_output(self) -> tuple[Losses, ...]:
        """Of each of several outputs, of the scales that were in the model at the start."""
        held_out = None if self.holdout is None else self.holdout.first_by_output()
        return by_output(self.search.first_by_output(), held_out)


def check_losses(losses: Losses) -> Losses:
    """Those of the model that was given.

    Raises:
        NonFiniteError: no search can start from them.
    """
    for value, images in ((losses.search, "search"), (losses.holdout, "held-out")):
        if value is not None and not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of the model that was given is NaN or inf on the calibration images ({images} ones): "
                f"expected a finite number, got {value}"
            )
    return losses


def _evaluator(model: GraphModule, images: Images, config: RefineConfig, world: World) -> Evaluator:
    select, loss = config.select, get_exact_loss(config.loss, config.temperature)
    evaluator = Evaluator(model, images.batches, images.targets, loss, select, config.cache_bytes, world)
    evaluator.check()
    return evaluator


class Shipped:
    """Losses of what a function makes of a model (`torch.compile`), each time of a fresh copy of it.

    Args:
        model: whose scales change between calls.
        make: gives what is run.
    """

    def __init__(self, model: GraphModule, make: Callable[[Any], Any], calibration: Calibration) -> None:
        self._model, self._make, self._calibration = model, make, calibration
        self._known: dict[Losses, tuple[Losses, ...]] = {}

    def losses(self) -> Losses:
        """Of the scales that are in the model now."""
        made, calibration = self._make(copy.deepcopy(self._model)), self._calibration
        config, world, holdout = calibration.config, calibration.world, calibration.holdout
        with torch.no_grad():
            search = each_loss(made, calibration.search, config, world)
            held_out = each_loss(made, holdout, config, world) if holdout.batches else None
        losses = Losses(float(search.mean()), None if held_out is None else float(held_out.mean()))
        self._known[losses] = by_output(search, held_out)
        return losses

    def by_output(self, losses: Losses) -> tuple[Losses, ...]:
        """Those of each output, of losses that were measured here."""
        return self._known[losses]


def each_loss(made: Callable[..., Any], images: Images, config: RefineConfig, world: World) -> Tensor:
    """The losses (outputs,) of each output of what is run; of a single one its own.

    Args:
        images: of all ranks, each of which runs its own.
    """
    loss = get_exact_loss(config.loss, config.temperature)
    outputs = len(config.loss.losses) if isinstance(config.loss, JointLoss) else 1
    rows = []
    for index, (batch, target) in enumerate(zip(images.batches, images.targets, strict=True)):
        each = [0.0] * outputs
        if world.mine(index):
            output = partial(_output, made, batch, index, config.select)
            each = (
                loss.each(output(), target).tolist()
                if isinstance(loss, EachLoss)
                else [batch_loss(loss, output, target)]
            )
        rows.append([batch.images * value for value in each])
    return world.sum(torch.tensor(rows, dtype=torch.float64)).sum(0) / images.count


def _output(made: Callable[..., Any], batch: Batch, index: int, select: Select) -> Tensor:
    return compared(run(made, batch, index), select)


def by_output(search: Tensor, held_out: Tensor | None) -> tuple[Losses, ...]:
    """Losses (outputs,) on both sets, output by output."""
    held: list[Any] = [None] * len(search) if held_out is None else held_out.tolist()
    return tuple(Losses(*pair) for pair in zip(search.tolist(), held, strict=True))
