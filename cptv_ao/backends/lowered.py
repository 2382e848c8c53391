"""Lowered graphs, as `convert_fx` returns them, and what is told of models that are none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.graph_form import GraphForm
from cptv_ao.backends.lowered_scanner import Scanner
from cptv_ao.backends.scale_slots import ScannedGraph
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.quantized_ops import is_observer


class LoweredForm(GraphForm):
    """What `convert_fx` returns: quantized modules and ops, which run on the kernels of an engine."""

    def fits(self, model: nn.Module) -> bool:
        return isinstance(model, GraphModule)  # `scan` says what is wrong with one that is not converted

    def scan(self, model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]]) -> ScannedGraph:
        return _scan(model, weight_ranges)


def _scan(model: GraphModule, weight_ranges: Mapping[str, tuple[int, int]]) -> ScannedGraph:
    if not isinstance(model, GraphModule):
        raise UnsupportedModelError(
            f"expected the GraphModule that convert_fx returns, got {type(model).__name__}; "
            "run prepare_fx, calibrate, convert_fx first"
        )
    scanner = Scanner(model, weight_ranges)
    for node in model.graph.nodes:
        scanner.visit(node)
    found = scanner.found()
    if any(map(is_observer, model.modules())):
        # convert_fx rewrites the graph of the prepared model too, so that quantized ops may be found in it.
        raise UnsupportedModelError(
            "expected a converted model, got one that is only prepared (it holds observers); "
            "call convert_fx and pass what it returns"
        )
    if scanner.is_reference:
        raise UnsupportedModelError(
            "expected the lowered model that convert_fx returns, got a reference model (convert_to_reference_fx); "
            "call convert_fx instead"
        )
    if not found.sites:
        raise UnsupportedModelError(
            "expected a converted model, found no quantized op in the graph; was the qconfig_mapping empty? "
            "(an exported graph on torch 2.11: X86InductorQuantizer needs torch.export.export(..., strict=True))"
        )
    return found
