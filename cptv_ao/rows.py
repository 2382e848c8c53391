"""Whether a batch may be cut: not where the output for an image depends on the other images beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cptv_ao.data import Batch
from cptv_ao.errors import CptvError
from cptv_ao.outputs import Select, compared
from cptv_ao.running import call
from cptv_ao.scoring import Images

# Share of the largest output by which roundings differ where the number of images does.
_ROUNDING = 1e-3


def mixes_rows(teacher: Callable[..., Any], batch: Batch, target: Tensor, select: Select) -> bool:
    """Whether the halves of a batch have other outputs than the whole (a mean or a softmax over the batch).

    Args:
        teacher: the float model.
        target: its output on the batch (N, C).
    """
    if batch.fixed or batch.images < 2:
        return False
    if len(target) != batch.images:
        return True
    half = batch.images // 2
    try:
        with torch.no_grad():
            parts = [
                compared(call(teacher, part), select) for part in (batch.rows(0, half), batch.rows(half, batch.images))
            ]
            found = torch.cat(parts)
    except (CptvError, RuntimeError, TypeError, ValueError, IndexError, AssertionError):
        return True  # it takes this number of images only
    if found.shape != target.shape:
        return True
    return bool((found - target).abs().max() > _ROUNDING * target.abs().max())


def whole(images: Images) -> Images:
    """The same, to be run as whole batches everywhere."""
    return replace(images, batches=tuple(replace(batch, fixed=True) for batch in images.batches))
