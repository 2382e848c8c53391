"""`accept_on=torch.compile`: inductor knows torchao's fusions, or the report says why products run in float."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from torch import nn
from torch._inductor import config
from torch.fx import GraphModule

from cptv_ao.evaluation.inductor import fused_by_inductor

pt2e.torchao()

FUSIONS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


@pytest.fixture(scope="module")
def graphs() -> dict[str, GraphModule]:
    """By the kind of their activations."""
    model = nets.seeded(pt2e.Residual)
    return {"uint8": pt2e.converted(model, pt2e.x86(), True), "int8": pt2e.converted(model, pt2e.xnnpack(), True)}


@pytest.fixture
def _freezing() -> Iterator[None]:
    with config.patch(freezing=True):
        yield


@pytest.fixture
def _not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, FUSIONS, raising=False)


@pytest.mark.usefixtures("_freezing", "_not_imported")
@pytest.mark.parametrize("make", [torch.compile, functools.partial(torch.compile, dynamic=True)])
def test_the_fusions_are_imported(graphs: dict[str, GraphModule], make: Any) -> None:
    with config.patch(pre_grad_custom_pass=None):
        assert fused_by_inductor(graphs["uint8"], make) == []
        assert FUSIONS in sys.modules
        assert config.pre_grad_custom_pass is not None, "theirs"


@pytest.mark.usefixtures("_freezing", "_not_imported")
def test_a_pass_of_the_user_stays(graphs: dict[str, GraphModule]) -> None:
    def own(graph: Any) -> None:
        """Does nothing."""

    with config.patch(pre_grad_custom_pass=own):
        fused_by_inductor(graphs["uint8"], torch.compile)
        assert config.pre_grad_custom_pass is own


@pytest.mark.usefixtures("_freezing", "_not_imported")
def test_what_the_fusions_fail_on_is_named(graphs: dict[str, GraphModule]) -> None:
    (note,) = fused_by_inductor(graphs["int8"], torch.compile)
    assert "in float" in note and "int8 activations (conv2d)" in note
    assert FUSIONS not in sys.modules


@pytest.mark.usefixtures("_not_imported")
def test_without_freezing_the_report_says_what_is_missing(graphs: dict[str, GraphModule]) -> None:
    (note,) = fused_by_inductor(graphs["uint8"], torch.compile)
    assert "in float" in note and "torch._inductor.config.freezing = True" in note
    assert FUSIONS not in sys.modules


@pytest.mark.usefixtures("_freezing")
def test_missing_fusions_are_told(graphs: dict[str, GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FUSIONS, None)  # as where it cannot be imported
    (note,) = fused_by_inductor(graphs["uint8"], torch.compile)
    assert "fusions are missing" in note and "pip install 'cptv_ao[pt2e]'" in note


@pytest.mark.usefixtures("_freezing", "_not_imported")
@pytest.mark.parametrize(
    "make", [None, lambda model: model, functools.partial(torch.compile, backend="eager")], ids=["none", "own", "eager"]
)
def test_nothing_is_imported_for_others(graphs: dict[str, GraphModule], make: Any) -> None:
    assert fused_by_inductor(graphs["uint8"], make) == []
    assert FUSIONS not in sys.modules


@pytest.mark.usefixtures("_freezing", "_not_imported")
def test_nor_for_graphs_that_quantize_nothing() -> None:
    assert fused_by_inductor(torch.fx.symbolic_trace(nn.Linear(2, 2)), torch.compile) == []
    assert FUSIONS not in sys.modules
