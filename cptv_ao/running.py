"""Running a model on a held batch. A model may work in place on its inputs (`x.sub_(mean)`), so it is given copies:
whatever runs here, float, prepared, quantized, compiled or a twin, the batch is the same afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cptv_ao.data import Batch
from cptv_ao.errors import CalibrationDataError, CptvError


def copied(value: Any) -> Any:
    """The same with a copy of each tensor in it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    make = getattr(value, "_make", type(value))  # of a named tuple
    return make(copied(item) for item in value)


def own_inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the inputs of a batch, positional and by keyword."""
    return copied(batch.args), copied(batch.kwargs)


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """What a model returns for a batch, which is left as it is."""
    args, kwargs = own_inputs(batch)
    return model(*args, **kwargs)


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
            f"calib_loader, batch {index}: the model failed on inputs of shape {shapes}: {error}", index
        ) from error
