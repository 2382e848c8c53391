"""Layers that turn what they read and choose nothing: what `cptv_ao.recipe` puts behind a norm that is returned."""

from __future__ import annotations

import torch

from cptv_ao.backends.backend import Backend

# Cosine of the angle between two rows of a turned identity, at most: float32 products have less, those of logits more.
_RIGHT_ANGLE = 1e-3


def turns(backend: Backend, node: str) -> bool:
    """Whether a node's weight is known in float, as wide as high, and its rows are at right angles to one another."""
    sites = [site.name for site in backend.sites.values() if site.kind == "weight" and node in site.nodes]
    weight = backend.float_weights.get(sites[0]) if len(sites) == 1 else None
    if weight is None or weight.dim() != 2 or weight.shape[0] != weight.shape[1] or len(weight) < 2:
        return False
    rows = torch.nn.functional.normalize(weight.double(), dim=1)
    return float((rows @ rows.T).fill_diagonal_(0.0).abs().max()) < _RIGHT_ANGLE
