"""What a descent follows, and what that pulls at the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.core.losses import Loss
from cptv_ao.core.tensors import Select


@dataclass(frozen=True)
class Objective:
    """What a descent follows.

    Attributes:
        loss, select: as for the evaluator; a loss that cannot be differentiated is not followed.
        per_image: whether the loss is a mean over images, each on its own.
        feature_weight: what the distance of the layer inputs from those of the float network counts beside the loss, in
            losses, both as they are in the first step.
        cache_bytes: what may be kept of the layer inputs in float.
    """

    loss: Loss
    select: Select
    per_image: bool = False
    feature_weight: float = 0.0
    cache_bytes: int = 0

    def pull(self, outputs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (), and its gradient with respect to the outputs (N, C)."""
        followed = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(followed, teacher)
        return loss.detach(), torch.autograd.grad(loss, followed)[0]

    def pull_at(self, rows: slice, outputs: Tensor, teacher: Tensor) -> Tensor:
        """What a mean over images pulls at some of them, wherever the others are."""
        alone = torch.zeros_like(outputs)
        alone[rows] = outputs[rows]
        return self.pull(alone, teacher)[1][rows]
