"""What `refine` and `diagnose` start from: the sites of a model, its float weights and its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import weight_ranges
from cptv_ao.backends.reference import fix_shared, is_reference, lower
from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.contexts import without_torch_floods
from cptv_ao.core.errors import CalibrationDataError, UnsupportedModelError
from cptv_ao.core.sites import SiteTable
from cptv_ao.simulation.twin import unquantized


@dataclass(frozen=True)
class Sources:
    """Where the teacher's outputs and the float weights come from; None: nothing but the quantized model is there."""

    teacher: nn.Module | None
    weights: nn.Module | None

    @staticmethod
    def of(model: GraphModule, lowered: GraphModule, float_model: nn.Module | None) -> Sources:
        """Of a model that was given and what is run of it: a reference model holds float weights itself."""
        return Sources(float_model, float_model if float_model is not None or lowered is model else model)

    def teacher_for(self, backend: Backend, batch: Batch) -> nn.Module:
        """The float model, or else the quantized one in float (with the float weights that its backend knows).

        Args:
            batch: some calibration images, on which the twin is tried.

        Raises:
            UnsupportedModelError: there is no float model, and the float twin does not know an op.
        """
        if self.teacher is not None:
            return self.teacher
        try:
            return unquantized(backend).checked(batch).module
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"without float_model the teacher is the quantized model in float, which cannot be had: {error}; pass "
                "float_model= (the float or the prepared model)",
                error.node,
            ) from error


def find_sites(model: GraphModule) -> SiteTable:
    """List every scale of a converted model; `print()` it for a readable table.

    Args:
        model: what `convert_fx` or `convert_pt2e` returned, or `convert_to_reference_fx`: the sites of what that
            lowers to.

    Returns:
        The sites by name, in graph order; `.unknown` names quantized ops that were not understood.

    Raises:
        UnsupportedModelError: the model is not converted, or holds no quantized op.
    """
    with without_torch_floods():
        return Backend(lower(model) if is_reference(model) else model).sites


def open_backend(model: GraphModule, float_model: nn.Module | None, config: RefineConfig) -> Backend:
    """Of the model, or of a lowered copy of a reference model, with the code ranges that can be known."""
    if float_model is not None and not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model: expected an nn.Module, got {type(float_model).__name__}")
    ranges, given, reference = weight_ranges(float_model), model, is_reference(model)
    if reference:
        ranges = weight_ranges(model) | ranges
        model = lower(model)
    if config.weight_range is not None:
        names = [site.name for site in find_sites(model).values() if site.kind == "weight"]
        ranges = dict.fromkeys(names, config.weight_range)
    backend = Backend(model, ranges)
    if reference:
        fix_shared(backend, given)
    return backend


def check_negatives(config: RefineConfig, batches: Sequence[Batch]) -> None:
    """InfoNCE takes its negatives from the batch: one image has none."""
    if not (isinstance(config.loss, str) and "infonce" in config.loss):
        return
    for index, batch in enumerate(batches):
        if batch.images < 2:
            raise CalibrationDataError(
                f"calib_loader, batch {index}: {config.loss} needs at least 2 images per batch for its negatives, "
                "got 1; use larger batches (the paper: 100), drop_last=True, or another loss",
                index,
            )
