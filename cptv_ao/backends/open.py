"""Opening a model: its sites, whichever form its graph has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.finite import check_finite
from cptv_ao.backends.float_weights import weight_ranges
from cptv_ao.backends.forms import form_of
from cptv_ao.backends.reference import fix_shared, is_reference, lower, write_back
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.contexts import without_torch_floods
from cptv_ao.core.sites import SiteTable


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
        return open_model(model).sites


def open_model(model: GraphModule) -> Backend:
    """Of a converted model, or of a lowered copy of a reference model."""
    return Backend(lower(model) if is_reference(model) else model)


@dataclass(frozen=True)
class OpenedModel:
    """A model that was given, and what is run and written of it until `commit`.

    Attributes:
        given: a converted model, or a reference model.
        backend: of that model, or of a lowered copy of a reference model.
    """

    given: GraphModule
    backend: Backend

    @staticmethod
    def of(model: GraphModule, float_model: nn.Module | None, config: RefineConfig) -> OpenedModel:
        """Of a model whose scales are numbers.

        Raises:
            UnsupportedModelError: the model is not a converted one.
            NonFiniteError: a scale is zero, NaN or infinite.
        """
        backend = open_backend(model, float_model, config)
        check_finite(backend)
        return OpenedModel(model, backend)

    @property
    def keeps_form(self) -> bool:
        """Whether nothing but scales may change: a reference model has no place for another bias or norm."""
        return self.backend.model is not self.given

    @property
    def float_weights(self) -> nn.Module | None:
        """The module that holds them, where that is the model itself: a reference model."""
        return self.given if self.keeps_form else None

    def commit(self) -> None:
        """Leave in the model that was given what is in the backend."""
        if self.keeps_form:
            write_back(self.backend.model, self.given)


def open_backend(model: GraphModule, float_model: nn.Module | None, config: RefineConfig) -> Backend:
    """Of the model, or of a lowered copy of a reference model, with the code ranges that can be known."""
    if float_model is not None and not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model: expected an nn.Module, got {type(float_model).__name__}")
    ranges, given, reference = weight_ranges(float_model), model, is_reference(model)
    if reference:
        ranges = weight_ranges(model) | ranges
        model = lower(model)
    if config.weight_range is not None:
        weights = [site for site in find_sites(model).values() if site.kind == "weight"]
        ranges = dict.fromkeys([site.name for site in weights], config.weight_range)
        own = {(site.qmin, site.qmax) for site in weights if not site.fixed}
        if form_of(model).enforces_ranges and own - {config.weight_range}:
            raise ValueError(
                f"RefineConfig.weight_range: a PT2E graph enforces the code ranges of its own nodes, {sorted(own)}, "
                f"got {config.weight_range}: leave it out, and quantize with observers of that range"
            )
    backend = Backend(model, ranges)
    if reference:
        fix_shared(backend, given)
    return backend
