"""Where the kernels saturate: ops whose codes are not those of exact arithmetic on the very same inputs.

8-bit kernels that add products in pairs of int16 (AVX2 without VNNI, FBGEMM's depthwise convolutions everywhere) are
exact as long as the activation codes stay below 128, which is what reduce_range is for.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from cptv_ao.core.batches import Batch
from cptv_ao.fx.node_runner import Recorder, ordered
from cptv_ao.simulation.layer_inputs import LayerInputs, layer_inputs
from cptv_ao.simulation.modules import QuantizedLayer
from cptv_ao.simulation.qtensor import QTensor, from_kernel
from cptv_ao.simulation.quantizers import Quantizer
from cptv_ao.simulation.twin import Twin

# Share of an op's codes that may be off by more than one before it counts as saturating.
_TOLERATED = 1e-4


def saturating_inputs(model: GraphModule, twin: Twin, batch: Batch) -> dict[str, int]:
    """The activation sites whose codes some kernel of the model cannot add up, and the highest code of each.

    Args:
        model: the lowered model.
        twin: its twin, with the same scales and weight codes.
        batch: some images; each weighted op of the twin gets the inputs that its kernel was given.
    """
    recorder = Recorder(model)
    with torch.no_grad():
        recorder.run(*ordered(model, batch))
        sources = input_sites(twin, layer_inputs(twin, batch.few(1)))
        found: dict[str, int] = {}
        for node in twin.module.graph.nodes:
            layer = twin.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(layer, QuantizedLayer) or layer not in sources:
                continue
            if any(given.name not in recorder.values for given in node.all_input_nodes):
                continue  # of a value that was written in place, which the kernels have under another name
            given = map_arg(node.args, lambda n: tree_map(from_kernel, recorder.values[n.name]))
            wanted = layer(*given)
            got = recorder.values[node.name].int_repr()
            off = (wanted.codes + wanted.zero_point - got).abs() > 1
            if float(off.float().mean()) > _TOLERATED:
                highest = int((given[0].codes + given[0].zero_point).max())
                found[sources[layer]] = max(highest, found.get(sources[layer], 0))
    return found


def input_sites(twin: Twin, given: LayerInputs) -> dict[QuantizedLayer, str]:
    """The activation site that what each weighted layer was given is quantized by."""
    names = {id(m.scale): m.site.name for m in twin.module.modules() if isinstance(m, Quantizer)}
    return {
        layer: names[id(value.scale)]
        for layer, value in given.items()
        if isinstance(layer, QuantizedLayer) and isinstance(value, QTensor) and id(value.scale) in names
    }
