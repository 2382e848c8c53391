"""Whether a twin can be run at all: some ops are only found not to be known when they meet values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.ops import op_name
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.qtensor_ops import OnCodes


class Checker(Interpreter):
    """Runs a twin node by node, and says which one cannot be computed, and how much the nodes give."""

    def __init__(self, twin: GraphModule) -> None:
        super().__init__(twin)
        #: what all nodes returned
        self.bytes = 0

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
            self.bytes += sum(numbers.numel() * numbers.element_size() for numbers in _numbers(value))
            return value
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            told = _told(n, self.submodules)
            raise UnsupportedModelError(f"{n.name}: the float twin does not know {told}: {why}", n.name) from error


def _numbers(value: Any) -> list[Tensor]:
    leaves = (leaf.codes if isinstance(leaf, QTensor) else leaf for leaf in tree_leaves(value))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _told(node: Node, modules: dict[str, nn.Module]) -> str:
    """What a node of a twin stands for."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if module is None:
        return op_name(node)
    return module.extra_repr() if isinstance(module, OnCodes) else f"{type(module).__name__} with these inputs"
