"""Other float weights in the place of those that are known, in scales that are wider or narrower by as much; and other
biases beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite


def replace_weight(backend: Backend, name: str, weight: Tensor) -> None:
    """Give a layer another float weight in the place of the one that is known, and scales that are wider by as much."""
    qparams, site = backend.read(name), backend.sites[name]
    wider = _peak(weight, site) / _peak(backend.float_weights[name], site)
    backend.weights.set_float(name, weight)
    backend.write(name, QParams(qparams.scale * wider.double(), qparams.zero_point))


def replace_bias(backend: Backend, name: str, bias: Tensor) -> None:
    """Give a layer another bias (C,) than the one that is packed with its weight, whose codes stay."""
    backend.weights.write_codes(name, backend.read(name), backend.weight(name).int_repr(), bias)


def add_to_bias(backend: Backend, name: str, added: Tensor) -> None:
    """Add to the bias (C,) that is packed with a weight; where none is, that is the bias."""
    given = backend.weights.biases.given(name)
    replace_bias(backend, name, added if given is None else given + added)


def _peak(weight: Tensor, site: ScaleSite) -> Tensor:
    """Largest magnitude that each scale of a weight is for; 1 where all are zero."""
    peak = weight.abs().amax() if site.axis is None else weight.abs().flatten(1).amax(1)
    return torch.where(peak > 0, peak, 1.0)
