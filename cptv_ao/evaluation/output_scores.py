"""What each output of a model loses, for the report: of what ships, before a search and after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.core.outcome import Losses, Outcome, OutputLoss
from cptv_ao.core.output_losses import OutputLosses
from cptv_ao.core.output_tree import WHOLE
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.evaluation.compared_outputs import OneOutput
from cptv_ao.evaluation.scoring import Shipped, SplitEvaluators, by_output, each_loss


class OutputScores:
    """Losses by output.

    Args:
        model: with the scales that it was given.
        kernels: has just been made of it.
        shipped: measures what ships; None: the kernels do.
        calibration: for the loss and the images.
    """

    def __init__(
        self, model: GraphModule, kernels: SplitEvaluators, shipped: Shipped | None, calibration: Calibration
    ) -> None:
        self._model, self._shipped, self._calibration = model, shipped, calibration
        joint = calibration.config.loss
        self._joint = joint if isinstance(joint, OutputLosses) and len(joint.counted) > 1 else None
        self._before = kernels.by_output() if self._joint is not None and shipped is None else ()
        #: images run so far by this rank
        self.image_forwards = 0

    @property
    def verdict_forwards(self) -> int:
        """Images that are run once the search is over."""
        return 0 if self._joint is None or self._shipped is not None else self._calibration.images

    def told(self, report: Outcome) -> tuple[OutputLoss, ...]:
        """The outputs, for a report of the model as it is now."""
        if self._joint is None:
            return (OutputLoss(self._only, report.loss, report.before, report.after),)
        if self._shipped is not None:
            before, after = (self._shipped.by_output(losses) for losses in (report.before, report.after))
        else:
            before = self._before
            after = before if report.after == report.before else self._losses()
        return tuple(
            OutputLoss(term.name, term.loss_name, was, now, term.size)
            for term, was, now in zip(self._joint.counted, before, after, strict=True)
        )

    @property
    def _only(self) -> str:
        """The name of an output that is alone."""
        config = self._calibration.config
        if isinstance(config.loss, OutputLosses):
            return config.loss.counted[0].name
        return config.select.name if isinstance(config.select, OneOutput) else WHOLE

    def _losses(self) -> tuple[Losses, ...]:
        """Of each output, with the scales that are in the model now."""
        search, holdout = self._calibration.search, self._calibration.holdout
        with torch.inference_mode():
            return by_output(self._each(search), self._each(holdout) if holdout.batches else None)

    def _each(self, images: Images) -> Tensor:
        world = self._calibration.world
        self.image_forwards += sum(batch.images for i, batch in enumerate(images.batches) if world.mine(i))
        return each_loss(self._model, images, self._calibration.config, world)
