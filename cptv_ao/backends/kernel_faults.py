"""Kernels of torch that do not compute what they are for: transposed convolutions and clamps (torch 2.14).

oneDNN's transposed ones (the engines x86 and onednn) take the weight of a group, (inputs, outputs, ...), for one of
(outputs, inputs, ...) where these two numbers differ; FBGEMM's are wrong for some kernels that are as large as their
stride. QNNPACK's clamp, which ReLU6 and Hardtanh are, takes a channels_last tensor, as its convolutions return them,
for one in the order of its dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from cptv_ao.core.batches import Batch
from cptv_ao.fx.node_runner import ordered
from cptv_ao.fx.ops import op_of

_SIZE, _ZERO = 8, 60
# Share of the codes that may be off by more than one.
_TOLERATED = 1e-3


def is_right(packed: Any) -> bool:
    """Whether a kernel computes with the weight that was packed; tried where it is known that some do not, on another
    packed alike: QNNPACK remembers the scales that one was first used with."""
    if not hasattr(packed, "transpose") or not packed.transpose():
        return True
    weight: Tensor = packed.unpack()[0]
    if weight.qscheme() != torch.per_tensor_affine:
        return True
    shape = 2, len(weight), *[_SIZE] * (weight.dim() - 2)
    codes = torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))
    meant = _meant(packed, weight, codes)
    scale = float(meant.abs().max()) / 100 or 1.0
    ops = torch.ops.quantized
    prepack, op = {
        4: (ops.conv_transpose2d_prepack, ops.conv_transpose2d),
        5: (ops.conv_transpose3d_prepack, ops.conv_transpose3d),
    }[weight.dim()]
    settings = packed.stride(), packed.padding(), packed.output_padding(), packed.dilation(), packed.groups()
    own = prepack(weight, packed.unpack()[1], *settings)
    given = torch._make_per_tensor_quantized_tensor(codes.to(torch.uint8), 1.0, _ZERO)
    off = (op(given, own, scale, 128).int_repr().int() - 128 - meant / scale).abs() > 1
    return float(off.float().mean()) <= _TOLERATED


def scrambling_clamps(model: GraphModule, batch: Batch) -> list[str]:
    """The clamps of a model that give other codes than for the same values in the order of their dimensions: paths of
    modules, or names of nodes.

    Args:
        batch: some images, on which the model is run; not at all where it has no clamp.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    clamps = [node for node in model.graph.nodes if (op := op_of(node, modules)) is not None and op.effect == "clamps"]
    if not clamps:
        return []
    runner = _Twice(model, set(clamps))
    with torch.no_grad():
        runner.run(*ordered(model, batch))
    return [str(node.target) if node.op == "call_module" else node.name for node in clamps if node in runner.differing]


class _Twice(Interpreter):
    """Runs some nodes again, on copies of their inputs in the order of the dimensions."""

    def __init__(self, model: GraphModule, nodes: set[Node]) -> None:
        super().__init__(model)
        self._nodes = nodes
        self.differing: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        if n not in self._nodes:
            return super().run_node(n)
        args, kwargs = tree_map(_in_order, self.fetch_args_kwargs_from_env(n))
        meant = getattr(self, n.op)(n.target, args, kwargs)
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_quantized:
            off = (value.int_repr().int() - meant.int_repr().int()).abs() > 1
            if float(off.float().mean()) > _TOLERATED:
                self.differing.add(n)
        return value


def _in_order(value: Any) -> Any:
    return value.contiguous().clone() if isinstance(value, Tensor) else value


def _meant(packed: Any, weight: Tensor, codes: Tensor) -> Tensor:
    settings = packed.stride(), packed.padding(), packed.dilation(), True, packed.output_padding(), packed.groups()
    bias: Tensor | None = packed.unpack()[1]
    bias = None if bias is None else bias.detach()
    return torch.convolution(codes.float() - _ZERO, weight.dequantize(), bias, *settings)
