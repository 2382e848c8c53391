"""Running a model on a held batch. A model may work in place on its inputs (`x.sub_(mean)`), so it is given copies:
whatever runs here, float, prepared, quantized, compiled or a twin, the batch is the same afterwards."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import CalibrationDataError, CptvError
from cptv_ao.core.nested import Path, mapped
from cptv_ao.core.output_tree import named_tensors
from cptv_ao.core.tensors import copied
from cptv_ao.fx.inputs import unlike_exported


def unwrapped(model: nn.Module | None) -> nn.Module | None:
    """The module inside of what runs it on several devices, or compiled: its names are those that were quantized."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # nothing is compiled where it was not imported
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def own_inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the inputs of a batch, positional and by keyword."""
    return copied(batch.args), copied(dict(batch.kwargs))


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """What a model returns for a batch, which is left as it is."""
    args, kwargs = own_inputs(batch)
    return model(*args, **kwargs)


def has_hooks(model: nn.Module) -> bool:
    """Whether calling a model does more than its forward: hooks of its own, or those of all modules."""
    return bool(model._forward_hooks or model._forward_pre_hooks) or _has_global_hooks()


def _has_global_hooks() -> bool:
    room = nn.modules.module
    return bool(room._global_forward_hooks or room._global_forward_pre_hooks)


def changed_by_hooks(model: nn.Module, batch: Batch) -> str:
    """What is to be said where forward hooks change what a model returns for a batch; nothing else."""
    hooked = [
        path or "the model itself" for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks
    ]
    if not hooked:
        return ""
    with torch.no_grad():
        with_hooks = run(model, batch, 0)
        with _without_hooks(model):
            without = run(model, batch, 0)
    pairs = zip(named_tensors(with_hooks).values(), named_tensors(without).values(), strict=False)
    if all(torch.equal(a, b) for a, b in pairs):
        return ""
    return f"forward hooks change what the model returns (on {hooked[0]}), and its float twin has none of them"


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    names = ("_forward_hooks", "_forward_pre_hooks")
    held = [(m, name, vars(m)[name]) for m in model.modules() for name in names if vars(m).get(name)]
    try:
        for module, name, _ in held:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for module, name, hooks in held:
            setattr(module, name, hooks)


def run(model: Callable[..., Any], batch: Batch, index: int) -> Any:
    """As `call`; what the model raises about the input is told with the batch.

    Raises:
        CalibrationDataError: the model does not accept the batch.
    """
    try:
        return call(model, batch)
    except CptvError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        shapes = [tuple(v.shape) for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        raise CalibrationDataError(
            f"calib_loader, batch {index}: the model failed on inputs of shape {shapes}: {error}{_hint(model, batch)}",
            index,
        ) from error


def _hint(model: Callable[..., Any], batch: Batch) -> str:
    """What to do about inputs that a model failed on, where something alike is taken, or is known to be."""
    tensors = list(batch.tensors.values())
    if unlike_exported(model, tensors):
        return "; it was exported for other shapes: export it with dynamic ones, or give inputs of those"
    if _takes(model, batch, lambda tensor: tensor.unsqueeze(0)):
        return "; it takes them with a dimension more: give batches (N, ...), of one image.unsqueeze(0)"
    kind = next((tensor.dtype for tensor in tensors if tensor.dtype != torch.float32 and not tensor.is_complex()), None)
    if other := _dtype_beside(model, tensors):
        return f"; its parameters are {other}, the images are not: give a model and images of the same dtype"
    if kind is not None and _takes(model, batch, Tensor.float):
        return f"; it takes them as torch.float32, got {kind}: give them as the model is given them when it is used"
    return ""


def _dtype_beside(model: Callable[..., Any], tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The one floating dtype of a model's parameters, where no image has it; None where it has several, or none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    kinds = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    (kind,) = kinds if len(kinds) == 1 else (None,)
    floating = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return kind if kind != torch.float32 and floating and kind not in floating else None


def _takes(model: Callable[..., Any], batch: Batch, change: Callable[[Tensor], Tensor]) -> bool:
    """Whether a model runs on the inputs once these are changed."""

    def each(_: Path, value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    try:
        with torch.no_grad():
            call(model, replace(batch, args=mapped(batch.args, each), kwargs=mapped(batch.kwargs, each)))
    except Exception:  # whatever a model raises about what it was not made for
        return False
    return True
