"""Factors by channel behind a layer (LayerScale, Touvron et al., arXiv 2103.17239), folded into it.

    Before: quantized layer (scale for all channels) -> quantized.mul by factors, themselves on a scale
    After:  quantized layer on the scale of the product -> quantized.mul by ones, which changes no code

The factors are rounded no more, nor is what they multiply: of three roundings one is left.
"""

from __future__ import annotations

import torch

from cptv_ao.backends.backend import Backend
from cptv_ao.core.qparams import QParams, same
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.bn_folding import scale_channels
from cptv_ao.transforms.lowered_patterns import ScaledLayer

# One is this many codes, which all ranges hold: a product of a code with it is the code, exactly.
_ONE = 64


def fold_scale(backend: Backend, scaled: ScaledLayer) -> bool:
    """Move the factors into the layer, and let the scales on both sides of the product move as one; False where that
    was so."""
    given = fetch(backend.model, scaled.path).detach().float()
    factors = given.flatten()
    if len(factors) != len(backend.weight(scaled.weight)) or not bool(torch.isfinite(factors).all()):
        return False
    one = _exactly_one(backend.read(scaled.factors))
    done = same(backend.read(scaled.factors), one) and same(backend.read(scaled.output), backend.read(scaled.product))
    if not bool((factors == 1).all()):
        done, bias = False, backend.weights.biases.given(scaled.weight)
        scale_channels(backend, scaled.weight, factors, None if bias is None else bias * factors)
        backend.rewrites.put(scaled.weight, scaled.path, torch.ones_like(given))
    if not done:
        backend.write(scaled.factors, one)
        backend.write(scaled.output, backend.read(scaled.product))
    backend.rewrites.fix([scaled.factors], "holds ones: its factors are in the layer before it")
    backend.rewrites.tie(scaled.output, scaled.product)
    return not done


def _exactly_one(like: QParams) -> QParams:
    return QParams(torch.full_like(like.scale, 1 / _ONE), torch.zeros_like(like.zero_point))
