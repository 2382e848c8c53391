"""Batch norms that FX did not fuse, folded into the layers before them (arXiv 1712.05877)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.channel_scaling import fold_factors
from cptv_ao.core.qparams import same
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.lowered_patterns import UnfusedNorm


def is_folded(backend: Backend, norm: UnfusedNorm) -> bool:
    """Whether a norm is the identity, since it was moved into its layer before."""
    found = _tensors(backend, norm)
    identity = _identity(norm, found["running_mean"])
    return all(torch.equal(value, identity[name]) for name, value in found.items())


def _tensors(backend: Backend, norm: UnfusedNorm) -> dict[str, Tensor]:
    return {name: fetch(backend.model, path).detach().float() for name, path in norm.tensors.items()}


def _identity(norm: UnfusedNorm, like: Tensor) -> dict[str, Tensor]:
    """What the tensors of a norm are that changes nothing."""
    zero = torch.zeros_like(like)
    return {"running_mean": zero, "running_var": zero + (1 - norm.eps), "weight": zero + 1, "bias": zero}


def _fold(backend: Backend, norm: UnfusedNorm) -> bool:
    """Move a norm into its layer, and let the scales on both sides of it move as one; False where it was there."""
    done = is_folded(backend, norm)
    if not done:
        found = _tensors(backend, norm)
        mean, zero = found["running_mean"], torch.zeros_like(found["running_mean"])
        identity = _identity(norm, mean)
        factor = fold_factors(found["running_var"], found.get("weight"), found.get("bias"), norm.eps)
        bias = backend.weights.biases.given(norm.weight)
        offset = (zero if bias is None else bias) - mean
        scale_channels(backend, norm.weight, factor, factor * offset + found.get("bias", zero))
        for name, path in norm.tensors.items():
            backend.rewrites.put(norm.weight, path, identity[name])
        backend.write(norm.output, backend.read(norm.after))
    if same(backend.read(norm.output), backend.read(norm.after)):
        backend.rewrites.tie(norm.output, norm.after)
    return not done


def scale_channels(backend: Backend, name: str, factor: Tensor, bias: Tensor | None) -> None:
    """Multiply what a layer gives, channel by channel, and give it another bias.

    Args:
        name: of its weight, whose scales are per channel of the output.
        factor: (C,); where it is negative, codes change their sign (-128 becomes 127), where it is 0, they are 0.
        bias: (C,), the whole new one; None of a layer that has none.
    """
    codes, given, store = backend.weight(name).int_repr(), backend.read(name), backend.weights
    shape = (-1, *[1] * (codes.dim() - 1))
    scale = given.scale * torch.where(factor == 0, 1.0, factor.abs().double())
    qparams = replace(given, scale=scale).checked(backend.sites[name])
    turned = codes.short() * factor.sign().short().reshape(shape)
    store.write_codes(name, qparams, turned.clamp(-128, 127).to(torch.int8), bias)
    if name in store.floats:
        store.set_float(name, store.floats[name] * factor.reshape(shape))
