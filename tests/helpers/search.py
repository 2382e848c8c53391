"""A search that is small enough for a test."""

from __future__ import annotations

from typing import Any

from cptv_ao import RefineConfig

LOSSES = ["kl", "infonce", "soft_infonce", "mse", "cosine"]


def small_config(**changes: Any) -> RefineConfig:
    """One pass of two candidates per block on three quarters of the batches, whatever the defaults are."""
    settings: dict[str, Any] = {"passes": 1, "evaluations": 2, "holdout": 0.25, "loss": "kl"}
    proposals: dict[str, Any] = {"population": (), "gradient_steps": 0}
    return RefineConfig(**(settings | proposals | changes))
