"""A search that is small enough for a test, and the loss that it lowers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cptv_ao import RefineConfig
from cptv_ao.core import losses

LOSSES = ["kl", "infonce", "soft_infonce", "mse", "cosine"]


def small_config(**changes: Any) -> RefineConfig:
    """One pass of two candidates per block on three quarters of the batches, whatever the defaults are."""
    settings: dict[str, Any] = {"passes": 1, "evaluations": 2, "holdout": 0.25, "loss": "kl"}
    proposals: dict[str, Any] = {"population": (), "gradient_steps": 0}
    return RefineConfig(**(settings | proposals | changes))


def loss_of(model: Any, teacher: Any, batches: list[Tensor]) -> float:
    """Mean KL over images, by full forwards of the user's own model."""
    with torch.inference_mode():
        values = [float(losses.kl(model(b).flatten(1), teacher(b).flatten(1))) * len(b) for b in batches]
    return sum(values) / sum(len(b) for b in batches)
