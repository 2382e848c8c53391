"""A forward cut at any node: the same values, the model's own tensors, and what is valid after a write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from cptv_ao.fx.segments import Segments, packed, same_stamp, storages

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Branched(nn.Module):
    """Two values cross the middle; one of them is worked on in place behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.off = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Dropout()
        self.shift = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        y = self.off(self.a(x))
        z = self.b(y)
        z = z + self.act(y)
        return {"out": z * scale + self.shift}


@pytest.fixture
def model() -> GraphModule:
    torch.manual_seed(0)
    return symbolic_trace(Branched().eval())


def names(model: GraphModule) -> list[str]:
    return [node.name for node in model.graph.nodes if node.op not in ("placeholder", "output")]


@torch.no_grad()
def test_cut_anywhere_it_gives_what_the_model_gives(model: GraphModule) -> None:
    wanted = model(X.clone(), 3.0)["out"]
    for name in names(model):
        segments = Segments(model)
        at = segments.cut([name])
        live = segments.start((X.clone(), 3.0), {}, at)
        assert torch.equal(segments.run(live, at, None)["out"], wanted), name
        assert torch.equal(segments.start((X.clone(),), {"scale": 3.0}, None)["out"], wanted)


@torch.no_grad()
def test_all_cuts_together_are_one_chain(model: GraphModule) -> None:
    segments = Segments(model)
    cuts = sorted({segments.cut([name]) for name in names(model)})
    assert len(cuts) > 3
    values: Any = segments.start((X.clone(),), {}, cuts[0])
    for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
        values = segments.run(values, start, stop)
    assert torch.equal(values["out"], model(X.clone())["out"])


@torch.no_grad()
def test_values_that_are_written_behind_a_cut_are_to_be_copied(model: GraphModule) -> None:
    segments = Segments(model)
    at = segments.cut(["b"])
    live = segments.start((X.clone(),), {}, at)
    assert len(live) == 2, "what a gives, and the scale"
    assert sum(segments.copies(at)) == 1
    before = [value.clone() if isinstance(value, Tensor) else value for value in live]
    segments.run(live, at, None)
    changed = [isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(live, before, strict=True)]
    assert changed == list(segments.copies(at))


@torch.no_grad()
def test_a_write_is_seen_at_once_and_told_by_the_stamp_behind_it_alone(model: GraphModule) -> None:
    segments = Segments(model)
    first, last = segments.cut(["b"]), segments.cut(["add"])
    live = segments.start((X.clone(),), {}, first)
    stamps = segments.stamp(first), segments.stamp(last)
    assert same_stamp(stamps[0], segments.stamp(first))
    model.b.weight.mul_(2)
    copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in live)
    assert torch.equal(segments.run(copies, first, None)["out"], model(X.clone())["out"])
    assert same_stamp(stamps[0], segments.stamp(first)), "b comes behind it"
    assert not same_stamp(stamps[1], segments.stamp(last))


def test_the_memory_that_values_hold_on_to() -> None:
    whole = torch.ones(100, 4)
    column = whole[:, 0]
    assert sum(storages([column, (whole,)]).values()) == 1600, "one storage, counted once"
    assert sum(storages(packed(column)).values()) == 400
    assert packed(whole[:90]) is not None and packed(whole[:90]).untyped_storage().nbytes() == 1600, "most of it"
