"""What each output of a model loses, for the report: of what ships, before a search and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cptv_ao.core.losses import EachLoss, get_exact_loss
from cptv_ao.core.outcome import Losses, Outcome, OutputLoss
from cptv_ao.core.output_losses import OutputLosses
from cptv_ao.core.output_tree import WHOLE
from cptv_ao.core.tensors import compared
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.evaluation.compared_outputs import OneOutput
from cptv_ao.fx.running import run


class OutputScores:
    """Losses by output.

    Args:
        calibration: for the loss and the images.
        shipping: makes what ships, with the scales that are in the model now.
    """

    def __init__(self, calibration: Calibration, shipping: Callable[[], Callable[..., Any]]) -> None:
        self._calibration, self._shipping = calibration, shipping
        joint = calibration.config.loss
        self._joint = joint if isinstance(joint, OutputLosses) else None
        #: images run so far by this rank
        self.image_forwards = 0

    @property
    def several(self) -> bool:
        """Whether there is more than one output."""
        return self._joint is not None and len(self._joint.counted) > 1

    def losses(self) -> tuple[Losses, ...]:
        """Of each output, with the scales that are in the model now."""
        made, calibration = self._shipping(), self._calibration
        with torch.inference_mode():
            search = self._means(made, calibration.search)
            held = self._means(made, calibration.holdout) if calibration.holdout.batches else [None] * len(search)
        return tuple(Losses(*pair) for pair in zip(search, held, strict=True))

    def told(self, before: tuple[Losses, ...], report: Outcome) -> tuple[OutputLoss, ...]:
        """The outputs, for a report.

        Args:
            before: of each output; of one alone nothing, its losses are those of the report.
            report: of the model as it is now.
        """
        if self._joint is None or not self.several:
            only = self._calibration.config.select
            name = only.name if isinstance(only, OneOutput) else WHOLE
            name = name if self._joint is None else self._joint.counted[0].name
            return (OutputLoss(name, report.loss, report.before, report.after),)
        after = before if report.after == report.before else self.losses()
        return tuple(
            OutputLoss(term.name, term.loss_name, was, now, term.size)
            for term, was, now in zip(self._joint.counted, before, after, strict=True)
        )

    def _means(self, made: Callable[..., Any], images: Images) -> list[float]:
        config, world = self._calibration.config, self._calibration.world
        loss = get_exact_loss(config.loss, config.temperature)
        assert self._joint is not None and isinstance(loss, EachLoss)
        table = torch.zeros(len(images.batches), len(self._joint.counted), dtype=torch.float64)
        for index, (batch, target) in enumerate(zip(images.batches, images.targets, strict=True)):
            if world.mine(index):
                table[index] = batch.images * loss.each(compared(run(made, batch, index), config.select), target)
                self.image_forwards += batch.images
        means: list[float] = (world.sum(table).sum(0) / images.count).tolist()
        return means
