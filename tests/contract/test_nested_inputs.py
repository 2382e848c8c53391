"""Inputs that are dicts or tuples of tensors: of traced and of exported graphs, as loaders give them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import workloads
from helpers import nets, pt2e
from helpers.search import small_config
from torch import Tensor, nn

import cptv_ao


class Named(nn.Module):
    """Of a dict of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 12), nn.Linear(4, 12), nn.Linear(12, 5)

    def both(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.left(a) + self.right(b)))
        return out

    def forward(self, d: dict[str, Tensor]) -> Any:
        return self.both(d["a"], d["b"])


class Paired(Named):
    """Of a tuple of two."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        return self.both(pair[0], pair[1])


class Mixed(Named):
    """Of a tensor and a tuple; returns a dict."""

    def forward(self, a: Tensor, pair: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        return {"other": pair[0], "logits": self.both(a + pair[1], pair[0])}


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 6, generator=generator), torch.randn(20, 4, generator=generator)


def inputs(kind: type[nn.Module], a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """What the model is called with."""
    nested: dict[type[nn.Module], tuple[Any, ...]] = {Named: ({"a": a, "b": b},), Paired: ((a, b),), Mixed: (a, (b, a))}
    return nested[kind]


def logits(output: Any) -> Tensor:
    found: Tensor = output["logits"] if isinstance(output, dict) else output
    return found


def exported(model: nn.Module, example: tuple[Any, ...]) -> Any:
    flow = pt2e.torchao()
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with workloads.quietly():
        batch = torch.export.Dim("batch", min=2, max=1024)
        dynamic = torch.utils._pytree.tree_map(lambda _: {0: batch}, example)
        graph = pt2e.exported(model, example, dynamic_shapes=dynamic)
        config = x86.get_default_x86_inductor_quantization_config()
        prepared = flow.prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
        prepared(*example)
        return flow.convert_pt2e(prepared)


@pytest.mark.parametrize("kind", [Named, Paired, Mixed])
def test_an_exported_graph_is_refined_on_nested_inputs(kind: type[nn.Module]) -> None:
    model = nets.seeded(kind)
    batches = [inputs(kind, *data(seed)) for seed in range(4)]
    graph = exported(model, batches[0])
    config = small_config(gradient_steps=20, output=logits, loss="mse")
    given = [(*batch, "label") for batch in batches]
    report = cptv_ao.report(cptv_ao.refine(graph, given, float_model=model, config=config, progress=False))
    assert report.after.search < report.before.search
    assert not any("no proposals" in note for note in report.notes)
    assert any(stage.startswith("gradient") for stage in report.stages)


def test_a_traced_graph_is_refined_on_dicts() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = nets.seeded(Named)
    batches = [{"a": a, "b": b} for a, b in map(data, range(4))]
    with workloads.quietly():
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (batches[0],))
        prepared(batches[0])
        graph = convert_fx(prepared)
    found = []
    for given in (batches, [(batch, "label") for batch in batches]):
        config = small_config(gradient_steps=20, loss="mse")
        own = copy.deepcopy(graph)
        report = cptv_ao.report(cptv_ao.refine(own, given, float_model=model, config=config, progress=False))
        assert report.after.search < report.before.search
        assert any(stage.startswith("gradient") for stage in report.stages)
        found.append(report.after.search)
    assert found[0] == found[1]
