"""What a model's output is, as far as its graph and its shape tell."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.objective import OutputKind
from cptv_ao.core.tensors import first_floating
from cptv_ao.fx.output_layer import ends_in_layer
from cptv_ao.fx.running import run


def output_kind(model: GraphModule, teacher: nn.Module, batch: Batch, config: RefineConfig) -> OutputKind:
    """Asked only where a loss has to be chosen.

    Args:
        model: the quantized graph.
        teacher: runs on one image, for the shape.
    """
    if config.loss != "auto":
        return "logits"
    with torch.no_grad():
        output = (config.output or first_floating)(run(teacher, batch.few(1), 0))
    if output.dim() > 2 and output.flatten(1).shape[1] > output.shape[1]:
        return "map"
    # What the user's own function picks may be of any node.
    return "logits" if config.output is not None or ends_in_layer(model) else "embedding"
