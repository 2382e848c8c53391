"""Values that a graph puts on a second scale stay on the first one: one rounding in the place of two."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import nets
from helpers.cases import Case, backend_of, in_float
from helpers.search import small_config
from helpers.state import everything
from torch import Tensor, nn

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.transforms.equalize import equalize

TOLD = "1 second scale of activations left out, with nothing computed behind the first"


class Flattened(nn.Module):
    """A convolution whose output FX quantizes, dequantizes, flattens and quantizes again."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.conv, self.fc, self.between = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5), between

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).flatten(2)
        if self.between is not None:
            rows = self.between(rows)
        out: Tensor = self.fc(rows.transpose(1, 2))
        return out


def quantized(model: nn.Module) -> Case:
    batches = list(nets.images(32, 3, 16, 16).split(8))
    case = Case(model, *nets.quantize(model, batches), batches)
    (second,) = (node for node in case.converted.graph.nodes if node.name == "quantize_per_tensor_2")
    scale = getattr(case.converted, str(second.args[1].target))
    scale.mul_(1.07)  # as another observer, or a search, leaves it
    return case


def test_a_value_stays_on_the_scale_that_it_is_on() -> None:
    case = quantized(nets.seeded(Flattened))
    backend, image = backend_of(case), case.batches[0]
    wanted = in_float(backend, image)
    with torch.no_grad():
        before = float((case.converted(image) - case.float_model(image)).square().mean())
        assert TOLD in equalize(backend, [Batch((image,), {}, 8)])
        after = float((case.converted(image) - case.float_model(image)).square().mean())
    torch.testing.assert_close(in_float(backend, image), wanted)
    values: dict[str, Tensor] = {}
    for node in ("conv", "quantize_per_tensor_2"):
        values[node] = seen(case, node, image)
    assert torch.equal(values["conv"].flatten(2), values["quantize_per_tensor_2"])
    assert after < 0.95 * before, (before, after)


def seen(case: Case, name: str, image: Tensor) -> Tensor:
    """The codes that a node gives."""
    found: dict[str, Tensor] = {}

    class Seeing(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name == name:
                found[name] = value.int_repr()
            return value

    with torch.no_grad():
        Seeing(case.converted).run(image)
    return found[name]


def test_they_move_as_one_and_come_back() -> None:
    case = quantized(nets.seeded(Flattened))
    backend = backend_of(case)
    sites, state, given = backend.sites, backend.snapshot(), everything(case.converted)
    assert TOLD in equalize(backend, [Batch((case.batches[0],), {}, 8)])
    (pair,) = (group for group in backend.sites.groups().values() if len(group) > 1)
    assert [site.nodes[0] for site in pair] == ["conv", "quantize_per_tensor_2"]
    backend.restore_all(state)
    assert dict(backend.sites) == dict(sites) and everything(case.converted) == given


def test_what_is_computed_in_between_has_a_scale_of_its_own() -> None:
    case = quantized(nets.seeded(lambda: Flattened(nn.GELU())))
    assert not [line for line in equalize(backend_of(case), [Batch((case.batches[0],), {}, 8)]) if "stay on" in line]


class InParts(Flattened):
    """Two halves of what a layer gives are put on scales of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).flatten(2).transpose(1, 2).chunk(2, -1)
        out: Tensor = self.left(left) + self.right(right)
        return out


def test_parts_of_a_value_keep_scales_of_their_own() -> None:
    model, batches = nets.seeded(InParts), list(nets.images(32, 3, 16, 16).split(8))
    case = Case(model, *nets.quantize(model, batches), batches)
    backend = backend_of(case)
    equalize(backend, [Batch((batches[0],), {}, 8)])
    joined = [group for group in backend.sites.groups().values() if len(group) > 1]
    assert all("chunk" not in node for group in joined for site in group for node in site.nodes)
    assert len(joined) <= 1


def test_a_search_tells_of_it_and_is_no_worse() -> None:
    case = quantized(nets.seeded(Flattened))
    given = copy.deepcopy(case.converted)
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=small_config(), progress=False)
    report = cptv_ao.report(case.converted)
    assert TOLD in report.notes and not report.after.worse_than(report.before)
    assert torch.equal(given(case.batches[0]).isnan(), torch.zeros_like(given(case.batches[0])).bool())
