"""A model that is only looked at: opened, with its calibration images and its float original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.backends.open import OpenedModel
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.contexts import eval_mode, plain_torch
from cptv_ao.core.loader import read_batches
from cptv_ao.evaluation.teacher import FloatSources
from cptv_ao.fx.running import unwrapped


class Examined(NamedTuple):
    """What is looked at; the float weights are attached."""

    backend: Backend
    sources: FloatSources
    batches: list[Batch]


@contextmanager
def examined(
    model: GraphModule, calib_loader: Iterable[Any], float_model: nn.Module | None, config: RefineConfig, images: int
) -> Iterator[Examined]:
    """Open a model while the context lasts.

    Args:
        images: that are read, or whole batches until these are there.

    Raises:
        UnsupportedModelError, FloatModelMismatchError, CalibrationDataError: as `cptv_ao.refine`.
    """
    float_model = unwrapped(float_model)
    with plain_torch():
        opened = OpenedModel.of(model, float_model, config)
        backend, sources = opened.backend, FloatSources.of(opened, float_model)
        batches = read_batches(calib_loader, backend.form.intake(backend.model), images)
        with eval_mode(backend.model, float_model):
            if sources.weights is not None:
                attach_float_weights(backend, sources.weights)
            yield Examined(backend, sources, batches)
