"""What a graph tells without a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import nets
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.core.blocks import find_blocks
from cptv_ao.diagnosis.graph_survey import Survey


class Block(nn.Module):
    """A layer, and behind it what has no site."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)).transpose(0, 1).transpose(0, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(functional.relu(x))


def survey(
    make: Callable[[], nn.Module], mapping: QConfigMapping | None = None, **options: Any
) -> tuple[Survey, Backend]:
    net = nets.seeded(make)
    _, converted = nets.quantize(net, [nets.images(6, 8)], mapping=mapping, **options)
    backend = Backend(converted)
    return Survey(backend, find_blocks(backend.sites.values(), None)), backend


def floats(backend: Backend) -> set[str]:
    """Nodes whose values are floating tensors, by running it."""
    found: set[str] = set()

    class See(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                found.add(n.name)
            return value

    See(backend.model).run(nets.images(6, 8))
    return found


def test_the_output_of_a_block_is_the_last_value_that_was_traced_in_it() -> None:
    found, backend = survey(Net)
    nodes = {node.name: node for node in backend.model.graph.nodes}
    outputs = found.block_outputs()
    assert list(outputs) == ["blocks.0", "blocks.1", "head"]
    for block in ("blocks.0", "blocks.1"):
        assert nodes[outputs[block]].target == "transpose", "no site is there"
    assert nodes[outputs["head"]].target == "head"
    assert found.paths({outputs["head"]}) == ("head",)


def test_what_computes_in_float_is_told_and_what_only_moves_is_not() -> None:
    found, backend = survey(Net)
    layers, ops = found.in_float(floats(backend))
    assert layers == () and ops == {"Softplus": 2}


def test_a_layer_that_was_left_in_float_is_told_by_its_path() -> None:
    mapping = nets.mapping().set_module_name("blocks.1.fc", None)
    found, backend = survey(Net, mapping)
    layers, ops = found.in_float(floats(backend))
    assert layers == ("blocks.1.fc",) and ops["Softplus"] == 2
    assert found.in_float(()) == ((), {}), "nothing of what holds no floating tensor"


@pytest.mark.parametrize(("bits", "wide"), [(8, True), (4, False)])
def test_activations_before_weights_that_may_overflow(bits: int, wide: bool) -> None:
    found, backend = survey(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), weight_bits=bits)
    sites = {name for name, site in backend.sites.items() if site.kind == "activation"}
    before = found.before_wide_weights()
    assert before <= sites and bool(before) == wide
    assert not wide or len(before) == 2, "that of the input, and the first layer's"


def test_codes_beyond_the_nominal_range_are_told() -> None:
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(8, 4)))
    _, converted = nets.quantize(net, [nets.images(6, 8)], weight_bits=3)
    site = next(name for name, site in Backend(converted).sites.items() if site.kind == "weight")
    for ranges, wanted in (({site: (-4, 4)}, 0), ({site: (-2, 1)}, 1)):
        backend = Backend(converted, ranges)
        wide = Survey(backend, find_blocks(backend.sites.values(), None)).wide_weights()
        assert len(wide) == wanted
        assert not wanted or (wide[0].startswith(f"{site} (") and wide[0].endswith(" for -2..1)"))
