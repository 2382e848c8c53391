"""Batch norms that FX did not fuse, folded into the layers before them (arXiv 1712.05877)."""

from __future__ import annotations

import torch

from cptv_ao.backends.backend import Backend
from cptv_ao.core.channel_scaling import fold_factors
from cptv_ao.core.qparams import same
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.lowered_patterns import UnfusedNorm


def _fold(backend: Backend, norm: UnfusedNorm) -> bool:
    """Move a norm into its layer, and let the scales on both sides of it move as one; False where it was there."""
    found = {name: fetch(backend.model, path).detach().float() for name, path in norm.tensors.items()}
    mean, zero = found["running_mean"], torch.zeros_like(found["running_mean"])
    identity = {"running_mean": zero, "running_var": zero + (1 - norm.eps), "weight": zero + 1, "bias": zero}
    done = all(torch.equal(value, identity[name]) for name, value in found.items())
    if not done:
        factor = fold_factors(found["running_var"], found.get("weight"), found.get("bias"), norm.eps)
        bias = backend.weights.bias(norm.weight)
        offset = (zero if bias is None else bias) - mean
        backend.weights.scale_channels(norm.weight, factor, factor * offset + found.get("bias", zero))
        for name, path in norm.tensors.items():
            backend.rewrites.put(norm.weight, path, identity[name])
        backend.write(norm.output, backend.read(norm.after))
    if same(backend.read(norm.output), backend.read(norm.after)):
        backend.rewrites.tie(norm.output, norm.after)
    return not done
