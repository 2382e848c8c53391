"""Which form a graph has: the only room that asks."""

from __future__ import annotations

from torch import nn

from cptv_ao.backends.graph_form import GraphForm
from cptv_ao.backends.lowered import LoweredForm
from cptv_ao.backends.pt2e import Pt2eForm

# The first one that fits; the last one says what is wrong with a model that is of no form.
_FORMS: tuple[GraphForm, ...] = (Pt2eForm(), LoweredForm())


def form_of(model: nn.Module) -> GraphForm:
    """The form of a converted model; that of lowered graphs for what is no such model."""
    return next((form for form in _FORMS if form.fits(model)), _FORMS[-1])
