"""Running a graph node by node."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from cptv_ao.core.batches import Batch
from cptv_ao.core.tensors import copied
from cptv_ao.fx.inputs import taken_apart


class Watcher(Interpreter):
    """Runs a graph node by node, shows each node's value to `see`, and takes what that returns in its place.

    Args:
        model: a quantized model, or the twin of one.
    """

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        self._see: Any = None

    def watch(self, batch: Batch, see: Any) -> Any:
        """Run on a batch, which is left as it is; `see(node, value)` returns the value to go on with."""
        self._see = see
        assert isinstance(self.module, GraphModule)
        with torch.no_grad():
            return self.run(*ordered(self.module, batch))

    def run_node(self, n: Node) -> Any:
        return self._see(n, super().run_node(n))


class Recorder(Interpreter):
    """Runs a model node by node and keeps what each node returned, by name."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def ordered(model: GraphModule, batch: Batch) -> list[Any]:
    """The inputs in the order of the placeholders, as copies: a model may work in place on them."""
    args, kwargs = taken_apart(model, batch.args, batch.kwargs)
    names = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return [copied(given[name]) for name in takewhile(given.__contains__, names)]
