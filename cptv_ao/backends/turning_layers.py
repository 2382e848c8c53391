"""Layers that turn what they read and choose nothing, as there are behind the norm of a rotated residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.fx.paths import fetch

# Cosine of the angle between two rows of a turned identity, at most: float32 products have less, those of logits more.
_RIGHT_ANGLE = 1e-3


def turns(backend: Backend, node: str) -> bool:
    """Whether a node's weight is known in float, as wide as high, and its rows are at right angles to one another."""
    weight = _weight(backend, node)
    if weight is None or weight.dim() != 2 or weight.shape[0] != weight.shape[1] or len(weight) < 2:
        return False
    rows = torch.nn.functional.normalize(weight.double(), dim=1)
    return float((rows @ rows.T).fill_diagonal_(0.0).abs().max()) < _RIGHT_ANGLE


def _weight(backend: Backend, node: str) -> Tensor | None:
    """The float weight of a layer, quantized or not."""
    sites = [site.name for site in backend.sites.values() if site.kind == "weight" and node in site.nodes]
    if sites:
        return backend.float_weights.get(sites[0]) if len(sites) == 1 else None
    calls = [one for one in backend.model.graph.nodes if one.name == node and one.op == "call_module"]
    layer = fetch(backend.model, str(calls[0].target)) if calls else None
    return layer.weight.detach() if type(layer) is nn.Linear else None
