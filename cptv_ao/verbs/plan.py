"""Which layers to leave in float, and what that buys: `plan(model, calib_loader)`. Orchestration only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from cptv_ao.core.config import RefineConfig, given_config
from cptv_ao.core.value_kinds import is_number
from cptv_ao.diagnosis.plan_result import Plan
from cptv_ao.diagnosis.plan_run import IMAGES, planned
from cptv_ao.verbs.examined import examined


def plan(
    model: GraphModule,
    calib_loader: Iterable[Any],
    *,
    float_model: nn.Module | None = None,
    budget: float = 0.1,
    quantize: Callable[[Plan], GraphModule] | None = None,
    config: RefineConfig | None = None,
    progress: bool = True,
) -> Plan:
    """Find out which layers to leave in float: a small ordered set, and the loss after each addition.

    What is left is measured given what was chosen, so layers whose errors make up for each other, or that only help
    together (an outlier is rounded as long as its maker or its reader is quantized), are found as such. Losses are
    those of the float twin, in which parts compute in float; `quantize` has them confirmed. The model is only read.

    Args:
        model: what `convert_fx`, `convert_pt2e` or `convert_to_reference_fx` returned, with all that can be quantized.
        calib_loader: as for `refine`; the first 128 images are used, fewer of a large network.
        float_model: as for `refine`. Without it the errors of weights that are known as codes only are not seen.
        budget: share of the int8 operations that may be given up, above 0 and up to 1.
        quantize: your own pipeline as a function: given a plan, it prepares with `plan.qconfig_mapping(mapping)` or
            `plan.quantizer(quantizer)`, calibrates, converts and returns the model. It is called for four steps at
            most; their loss and time on kernels are in the plan, which ends with the best of them. None: the losses
            are those of the twin alone.
        config: of which `loss`, `temperature`, `output`, `weight_range` and `device` (where the twin runs) count; the
            default is that of `refine`.
        progress: show a progress bar on stderr.

    Returns:
        The plan; print it. `plan.qconfig_mapping(mapping)` is for stock `prepare_fx`, `plan.quantizer(quantizer)` for
        stock `prepare_pt2e`.

    Raises:
        UnsupportedModelError: as `refine`; or the float twin does not know an op.
        FloatModelMismatchError, CalibrationDataError, NonFiniteError: as `refine`.
        ValueError: a budget that is no share.

    Example:
        >>> found = cptv_ao.plan(quantized, calib_loader, float_model=model, budget=0.05)     # doctest: +SKIP
        >>> prepared = prepare_fx(model, found.qconfig_mapping(mapping), example_inputs)      # doctest: +SKIP
    """
    config = given_config(config)
    _check(budget, quantize)
    with examined(model, calib_loader, float_model, config, IMAGES) as (backend, sources, batches):
        return planned(backend, sources, batches, config, float(budget), quantize, progress)


def _check(budget: Any, quantize: Any) -> None:
    if not is_number(budget):
        raise TypeError(f"budget: expected a number, got {type(budget).__name__}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget: expected a share of the int8 operations, above 0 and up to 1, got {budget}")
    if quantize is not None and not callable(quantize):
        raise TypeError(f"quantize: expected a function of a plan, got {type(quantize).__name__}")
