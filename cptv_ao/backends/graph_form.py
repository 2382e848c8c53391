"""What one form of quantized graph is, and what may be done with it.

A further form is one more file in this package: a class of its own here below, listed in `cptv_ao.backends.forms`. It
must say whether a model is of this form (`fits`) and list its sites and the slots that hold their scales (`scan`); the
rest of the attributes say what it can do. Above this package nobody asks for the form, only for what it can do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.scale_slots import ScannedGraph
from cptv_ao.core.intake import Intake
from cptv_ao.fx.inputs import taken


class GraphForm(ABC):
    """One form of graph; it holds nothing, so there is one instance of each."""

    #: Whether the graph computes in float between its quantize and dequantize nodes: it simulates itself, no kernel
    #: saturates in it, and it is searched on its twin.
    simulates_itself = False
    #: Whether codes beyond the calibrated range are clipped by the graph, so that a wider container is no choice.
    enforces_ranges = False
    #: Whether scales are numbers in the code, which a state_dict does not hold.
    scales_in_code = False
    #: Whether a weight's site is called by the path of its module, or is that of a quantized op; else it is that of any
    #: op, a constant's among them, and its scope is the module that it was traced in.
    weights_of_modules = True

    @abstractmethod
    def fits(self, model: nn.Module) -> bool:
        """Whether a model is of this form."""

    @abstractmethod
    def scan(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]]) -> ScannedGraph:
        """List the sites of a graph of this form, in graph order.

        Args:
            weight_ranges: nominal `(qmin, qmax)` by weight site; where absent, and the graph does not tell them,
                inferred from the codes.

        Raises:
            UnsupportedModelError: the model is not converted, or has no quantized op.
        """

    def intake(self, model: GraphModule) -> Intake:
        """What inputs a model takes."""
        return taken(model)
