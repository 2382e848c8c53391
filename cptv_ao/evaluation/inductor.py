"""What `torch.compile` makes of a PT2E graph: products of integers, where inductor knows torchao's fusions and freezes;
else the graph as it is written, in float."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cptv_ao.fx.decomposed_ops import calls, is_decomposed, packet_of

# They register when it is imported.
_FUSIONS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
_FLOAT = "accept_on: torch.compile computes this graph in float, "


def fused_by_inductor(model: GraphModule, make: Callable[[Any], Any] | None) -> list[str]:
    """Have inductor know torchao's fusions where it is what compiles this graph.

    Args:
        make: `RefineConfig.accept_on`.

    Returns:
        What is to be said where no product runs in integers.
    """
    if not _is_inductor(make) or not any(is_decomposed(node) for node in model.graph.nodes):
        return []
    from torch._inductor import config

    if not config.freezing:
        return [_FLOAT + "for freezing is off: torch._inductor.config.freezing = True gives products of integers"]
    signed = [node.name for node in model.graph.nodes if _convolves_int8(node)]
    if signed:
        return [_FLOAT + f"for torchao's fusions fail on a convolution of int8 activations ({signed[0]}), not of uint8"]
    own = config.pre_grad_custom_pass
    try:
        import_module(_FUSIONS)
    except ImportError as error:
        return [_FLOAT + f"for torchao's fusions are missing ({error}): pip install 'cptv_ao[pt2e]'"]
    if own is not None:
        config.pre_grad_custom_pass = own  # the user's
    return []


def _is_inductor(make: Any) -> bool:
    """`torch.compile`, or a `functools.partial` of it, unless it is for another backend."""
    backend = (getattr(make, "keywords", None) or {}).get("backend", "inductor")
    return getattr(make, "func", make) is torch.compile and backend == "inductor"


def _convolves_int8(node: Node) -> bool:
    aten = torch.ops.aten
    if packet_of(node.target) not in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution):
        return False
    source = node.args[0]
    return isinstance(source, Node) and calls(source.target, "dequantize_per_tensor") and torch.int8 in source.args
