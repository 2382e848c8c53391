"""Whether a twin can be run at all: some ops are only found not to be known when they meet values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.decomposed_ops import called
from cptv_ao.fx.ops import op_name
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.qtensor_ops import OnCodes

_ATTENTION = {functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention}


class Checker(Interpreter):
    """Runs a twin node by node, and says which one cannot be computed, how much the nodes give, and where 0 / 0 is."""

    def __init__(self, twin: GraphModule) -> None:
        super().__init__(twin)
        #: what all nodes returned
        self.bytes = 0
        #: how much each token attends to each, which fused attention keeps nowhere
        self.attention_bytes = 0
        #: names of the nodes that returned what is no number, and were given none of that
        self.undefined: list[str] = []
        self._undefined = set[Node]()

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
            given = _numbers(value)
            self.bytes += sum(numbers.numel() * numbers.element_size() for numbers in given)
            self.attention_bytes += self._attended(n)
            if any(map(_is_undefined, given)):
                if self._undefined.isdisjoint(n.all_input_nodes):
                    self.undefined.append(n.name)
                self._undefined.add(n)
            return value
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            told = _told(n, self.submodules)
            raise UnsupportedModelError(f"{n.name}: the float twin does not know {told}: {why}", n.name) from error

    def _attended(self, n: Node) -> int:
        module = self.submodules.get(str(n.target))
        if (module.function if isinstance(module, OnCodes) else called(n)) not in _ATTENTION:
            return 0
        query, key = _numbers(self.fetch_args_kwargs_from_env(n))[:2]
        return query[..., 0].numel() * key.shape[-2] * query.element_size()


def _numbers(value: Any) -> list[Tensor]:
    leaves = (leaf.codes if isinstance(leaf, QTensor) else leaf for leaf in tree_leaves(value))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _is_undefined(numbers: Tensor) -> bool:
    """Whether one of them is no number; of 8-bit floats torch does not tell."""
    return numbers.is_floating_point() and numbers.element_size() > 1 and bool(numbers.isnan().any())


def _told(node: Node, modules: dict[str, nn.Module]) -> str:
    """What a node of a twin stands for."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if module is None:
        return op_name(node)
    return module.extra_repr() if isinstance(module, OnCodes) else f"{type(module).__name__} with these inputs"
