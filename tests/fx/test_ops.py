"""The table of ops: by function, method, module and op of torch.ops; paths; runs node by node."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers its ops
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional

from cptv_ao.core.batches import Batch
from cptv_ao.fx.node_runner import Recorder, Watcher
from cptv_ao.fx.op_table import RELU
from cptv_ao.fx.ops import of_function, of_module, op_name, op_of
from cptv_ao.fx.paths import ModulePaths, fetch
from cptv_ao.fx.producers import producer
from cptv_ao.fx.readers import read_once, reads


def traced(module: nn.Module) -> GraphModule:
    return symbolic_trace(module)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.flatten(self.blocks(x), 1)
        return (y * self.gain).reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    ("found", "name", "keeps"),
    [
        (of_function(torch.flatten), "flatten", True),
        (of_function(torch.ops.aten.flatten.using_ints), "flatten", True),
        (of_function(functional.max_pool2d), "max_pool", True),
        (of_module(nn.Flatten()), "flatten", True),
        (of_function(torch.ops.quantized_decomposed.quantize_per_tensor.default), "quantize", False),
    ],
)
def test_one_row_for_all_that_stands_for_an_op(found: Any, name: str, keeps: bool) -> None:
    assert found is not None and (found.name, found.keeps) == (name, keeps)


def test_what_is_not_in_the_table_is_not_understood() -> None:
    class Own(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Named(nn.Flatten):
        pass

    assert of_function(torch.cumsum) is None
    assert of_module(Own()) is None, "its forward is another"
    assert of_module(Named()) is of_module(nn.Flatten())
    patched = nn.Flatten()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert of_module(patched) is None


def test_a_row_stays_itself_in_copies_of_what_holds_it() -> None:
    (held,) = copy.deepcopy([of_module(nn.ReLU())])
    assert held is RELU, "a twin is copied to be scored in several threads"


def test_nodes_are_known_by_what_they_call() -> None:
    model = traced(Net())
    modules = dict(model.named_modules())
    known = {node.name: op_of(node, modules) for node in model.graph.nodes}
    wanted = {"blocks_0": "linear", "blocks_1": "relu", "flatten": "flatten", "reshape": "reshape"}
    assert {name: op.name for name in wanted if (op := known[name]) is not None} == wanted
    assert known["x"] is None
    names = {node.name: op_name(node) for node in model.graph.nodes}
    assert (names["flatten"], names["reshape"], names["mul"]) == ("flatten", "reshape", "mul")
    nodes = {node.name: node for node in model.graph.nodes}
    assert producer(nodes["flatten"], {nodes["blocks_0"]}, modules) is nodes["blocks_0"]
    assert producer(nodes["reshape"], {}, modules) is nodes["mul"], "it computes other codes"


def test_a_shape_is_read_without_the_numbers() -> None:
    (asked,) = (node for node in traced(Net()).graph.nodes if node.target is getattr)
    assert not reads(asked)
    assert all(reads(node) for node in traced(Net()).graph.nodes if node.name in ("blocks_0", "mul"))
    assert read_once(traced(Net()).graph.nodes) == {"blocks.0", "blocks.1", "gain"}


def test_buffers_are_named_after_the_longest_path_that_fits() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module(), nn.Module()])
    model.blocks[1].norm_1 = nn.LayerNorm(4)
    paths = ModulePaths(model)
    assert paths.of_attribute("blocks_1_norm_1_scale_0") == "blocks.1.norm_1"
    assert paths.name("blocks_1_norm_1_scale_0") == "blocks.1.norm_1.scale_0"
    assert paths.name("blocks_0_scale") == "blocks.0.scale"
    assert paths.name("other_scale") == "other_scale"
    assert fetch(model, "blocks.1.norm_1.weight") is model.blocks[1].norm_1.weight


def test_node_by_node_it_is_the_same_and_the_batch_stays() -> None:
    model = traced(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()))
    given = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(0))
    batch, before, seen = Batch((given,), {}, 2), given.clone(), []

    def see(node: Any, value: Any) -> Any:
        seen.append(node.name)
        return value * 10 if node.op == "call_module" and node.name == "_1" else value

    output = Watcher(model).watch(batch, see)
    assert torch.equal(given, before)
    assert torch.equal(output, before.relu().flatten(1) * 10), "what see returns goes on"
    assert seen == [node.name for node in model.graph.nodes]
    recorder = Recorder(model)
    recorder.run(before.clone())
    assert torch.equal(recorder.values["_1"], before.relu().flatten(1))
