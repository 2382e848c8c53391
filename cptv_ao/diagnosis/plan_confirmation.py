"""A plan on kernels: models are quantized anew as it says, and scored and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.contexts import eval_mode
from cptv_ao.core.losses import get_exact_loss
from cptv_ao.core.progress import Advance
from cptv_ao.core.tensors import compared
from cptv_ao.diagnosis.plan_result import Plan, PlanStep, with_steps
from cptv_ao.evaluation.calibration import Images
from cptv_ao.fx.running import run

# Steps that are tried, at most, the last one among them; runs of a batch, of which the fastest counts.
STEPS, _RUNS = 4, 4


def confirmed(
    plan: Plan,
    model: GraphModule,
    quantize: Callable[[Plan], GraphModule],
    images: Images,
    config: RefineConfig,
    advance: Advance,
) -> Plan:
    """The plan with what kernels say of some of its steps; it ends with the one whose kernels lose least.

    Args:
        model: that was given.
        quantize: of the user.
    """
    steps, notes = list(plan.steps), list[str]()
    count = min(STEPS, len(steps))
    best, least = 0, plan.loss
    for index in [len(steps) * (i + 1) // count for i in range(count)]:
        try:
            made = quantize(plan.upto(index))
        except Exception as error:  # of torch.ao, which not all mixtures of float and int8 can be had of
            first = (str(error).splitlines() or [""])[0]
            notes.append(f"step {index} is not confirmed: quantize failed ({type(error).__name__}: {first[:120]})")
            break
        if not isinstance(made, nn.Module):
            raise TypeError(f"quantize: expected it to return a converted model, got {type(made).__name__}")
        steps[index - 1] = _on_kernels(steps[index - 1], made, model, images, config)
        advance(f"step {index} on kernels")
        loss = steps[index - 1].loss
        if loss is not None and loss < least:
            best, least = index, loss
    if best < len(steps):
        left = len(steps) - best
        notes.append(f"{left} more step{'s' if left > 1 else ''} did not bring the loss of the kernels down")
    return with_steps(plan, steps[:best], notes)


def _on_kernels(step: PlanStep, made: nn.Module, given: nn.Module, images: Images, config: RefineConfig) -> PlanStep:
    select, loss = config.select, get_exact_loss(config.loss, config.temperature)
    with eval_mode(made), torch.inference_mode():
        mean = images.mean(lambda index, batch, target: float(loss(compared(run(made, batch, index), select), target)))
        seconds, before = _seconds(made, given, batch=images.batches[0])
    return replace(step, loss=mean, seconds=seconds, slowdown=seconds / before)


def _seconds(*models: nn.Module, batch: Batch) -> list[float]:
    """Of an image in a batch, of each model: the fastest of some runs, side by side."""
    taken = [[math.inf] for _ in models]
    for _ in range(_RUNS):
        for model, times in zip(models, taken, strict=True):
            started = time.perf_counter()
            run(model, batch, 0)
            times.append(time.perf_counter() - started)
    return [min(times) / batch.images for times in taken]
