"""A search that is small enough for a test, and the loss that it lowers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cptv_ao import RefineConfig
from cptv_ao.core import losses
from cptv_ao.core.batches import Batch
from cptv_ao.core.tensors import first_floating
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.twin import Twin
from helpers.cases import Case, backend_of

#: what the descents of the tests follow
KL = Objective(losses.kl, first_floating, per_image=True)
#: the loss of a report, as it is computed
exact_kl = losses.get_exact_loss("kl", 1.0)
LOSSES = ["kl", "infonce", "soft_infonce", "mse", "cosine"]


def small_config(**changes: Any) -> RefineConfig:
    """One pass of two candidates per block on three quarters of the batches, whatever the defaults are."""
    settings: dict[str, Any] = {"passes": 1, "evaluations": 2, "holdout": 0.25, "loss": "kl"}
    proposals: dict[str, Any] = {"population": (), "gradient_steps": 0}
    return RefineConfig(**(settings | proposals | changes))


def loss_of(model: Any, teacher: Any, batches: list[Tensor]) -> float:
    """Mean KL over images, by full forwards of the user's own model."""
    with torch.inference_mode():
        values = [float(exact_kl(model(b).flatten(1), teacher(b).flatten(1))) * len(b) for b in batches]
    return sum(values) / sum(len(b) for b in batches)


def learnt(case: Case, images: Tensor) -> tuple[Twin, Batch, list[LearnableQParams]]:
    """A twin that rounds its weights, the images as a batch, and what a descent moves of it."""
    backend, batch = backend_of(case), Batch((images,), {}, len(images))
    twin = Twin(backend).checked(batch)
    twin.reround_weights()
    return twin, batch, [LearnableQParams.of(twin, group, True) for group in backend.movable().values()]


def leaves_of(groups: Sequence[LearnableQParams]) -> list[Tensor]:
    """What a gradient is of."""
    return [leaf for g in groups for leaf in (g.log_scale, g.offset, g.shift) if leaf is not None]


def step_images(batches: Sequence[Batch], teacher: Sequence[Tensor]) -> StepImages:
    """Batches as they are, one a step."""
    return StepImages(
        Calibration(RefineConfig(), Images(tuple(batches), tuple(teacher))), max(b.images for b in batches)
    )
