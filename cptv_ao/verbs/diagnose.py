"""Which layer, how bad, what now: `diagnose(model, calib_loader)`. Orchestration only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from cptv_ao.core.config import RefineConfig, given_config
from cptv_ao.diagnosis.advice import advise
from cptv_ao.diagnosis.results import Diagnosis
from cptv_ao.diagnosis.run import _IMAGES, _diagnosis
from cptv_ao.reporting.report import is_refined
from cptv_ao.verbs.examined import examined


def diagnose(
    model: GraphModule,
    calib_loader: Iterable[Any],
    *,
    float_model: nn.Module | None = None,
    config: RefineConfig | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Find out which blocks and sites of a quantized model cost how much, why, and what to do about it.

    The loss of the model is that of its own kernels. The share of it that a block causes is taken on the float twin,
    where one block at a time computes in float: the table says which figure is which. Where the twin does not know an
    op, the float model's output of a block takes the place of the kernels' instead. The model is only read.

    It takes the first 128 images (of a PT2E graph whole batches until these are there), so shuffle them. It costs at
    most `blocks / 2 + 32` forwards of the twin, each about three times as long as the model's own: seconds for a small
    network, five minutes of one thread for a deit_tiny. Give fewer images to have it sooner.

    Args:
        model: what `convert_fx`, `convert_pt2e` or `convert_to_reference_fx` returned, refined or not.
        calib_loader: as for `refine`.
        float_model: as for `refine`. Without it the model is compared with itself in float, and the errors of weights
            that are known as codes only are not seen.
        config: of which `loss`, `temperature`, `output`, `blocks`, `weight_range`, `cache_bytes` and `device` (where
            the twin runs) count; the default is that of `refine`.
        progress: show a progress bar on stderr.

    Returns:
        The blocks by the share of the loss they cause, the sites, what the graph tells, and advice; print it.

    Raises:
        UnsupportedModelError, FloatModelMismatchError, CalibrationDataError, NonFiniteError: as `refine`.

    Example:
        >>> print(cptv_ao.diagnose(quantized, calib_loader, float_model=model))       # doctest: +SKIP
    """
    config = given_config(config)
    with examined(model, calib_loader, float_model, config, _IMAGES) as (backend, sources, batches):
        found = _diagnosis(backend, sources, batches, config, progress)
    return replace(found, advice=advise(found, refined=is_refined(model)))
